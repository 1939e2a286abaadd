"""Read model folders of onnxruntime-genai: `genai_config.json`, which says what the ports of `model.onnx` mean.

Checks that the two agree, and that the graph asks for nothing else. Knows no tokenizer; reads no weights.
Source: onnxruntime-genai's reference of its configuration (`docs/reference/config` on onnxruntime.ai).
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from edgelm.errors import UnsupportedModel
from edgelm.files.errors import BadHeader
from edgelm.files.folder import Config, read_object
from edgelm.files.graph import CacheNames, Graph, GraphModel, Port
from edgelm.files.index import GENAI_CONFIG as CONFIG
from edgelm.files.onnx import read_graph

MAX_LAYERS, MAX_HEADS, MAX_DIM, MAX_VOCAB = 1024, 4096, 8192, 2**24
_OTHER_PARTS = {
    "vision": "reads images", "speech": "hears speech", "embedding": "is cut into several graphs",
    "encoder": "has an encoder beside the decoder", "encoder_decoder_init": "has an encoder beside the decoder",
}  # fmt: skip
_WHOLE, _CACHE = ("int64", "int32"), ("float32", "float16")


class GenaiFolder(NamedTuple):
    """A folder as it says of itself. `search` are its defaults for sampling, which edgelm shows and does not apply."""

    path: Path
    kind: str
    """The family of the model, such as `llama`."""
    config: Config
    """The object `model` of the configuration."""
    model: GraphModel
    eos_ids: tuple[int, ...]
    search: Config


def read_genai_folder(path: Path) -> GenaiFolder:
    """Read configuration and graph, and check each against the other.

    Raises `UnsupportedModel` for what edgelm does not run, or a subclass of `ModelFileError`.
    """
    config = Config(path / CONFIG, read_object(path / CONFIG))
    model = config.part("model")
    kind, decoder = model.str("type"), model.part("decoder")
    for part, what in _OTHER_PARTS.items():
        if model.has(part):
            raise UnsupportedModel(f"{path}: this {kind} model {what}; edgelm runs text models of one graph")
    if decoder.has("pipeline"):
        raise UnsupportedModel(f"{path}: the decoder is a pipeline of several graphs; edgelm runs models of one graph")
    if decoder.part("session_options").has("custom_ops_library"):
        raise UnsupportedModel(f"{path}: it needs a library with operators of its own, which edgelm does not load")
    window = decoder.part("sliding_window")
    name = decoder.str("filename", "model.onnx")
    if Path(name).name != name or "\\" in name or ":" in name:
        raise BadHeader(config.path, f"the graph is said to be in {name[:80]!r}, not a file of this folder")
    graph = read_graph(path / name)
    if window.has("window_size") and not any(node.numbers.get("local_window_size", -1) > 0 for node in graph.nodes):
        raise UnsupportedModel(f"{path}: the graph looks at a window that its caches must slide with; edgelm's do not")
    return GenaiFolder(path, kind, model, _explained(graph, model, decoder), _eos_ids(model), config.part("search"))


def _eos_ids(model: Config) -> tuple[int, ...]:
    if isinstance(model.metadata.get("eos_token_id"), list):
        ids = model.numbers("eos_token_id")
        if any(number < 0 or not number.is_integer() for number in ids):
            raise BadHeader(model.path, "eos_token_id is not a list of token ids")
        return tuple(map(int, ids))
    return (model.int("eos_token_id"),) if model.has("eos_token_id") else ()


def _explained(graph: Graph, model: Config, decoder: Config) -> GraphModel:
    inputs, outputs = decoder.part("inputs"), decoder.part("outputs")
    n_layers = decoder.int("num_hidden_layers", least=1, most=MAX_LAYERS)
    names = tuple(
        CacheNames(
            *(_numbered(inputs, key, default, i) for key, default in _PAST),
            *(_numbered(outputs, key, default, i) for key, default in _PRESENT),
        )
        for i in range(n_layers)
    )
    positions = inputs.str("position_ids", "position_ids")
    found = GraphModel(
        graph,
        ids=inputs.str("input_ids", "input_ids"),
        mask=inputs.str("attention_mask", "attention_mask"),
        positions=positions if positions in graph.inputs else None,
        logits=outputs.str("logits", "logits"),
        layers=names,
        n_kv_heads=decoder.int("num_key_value_heads", least=1, most=MAX_HEADS),
        head_dim=decoder.int("head_size", least=1, most=MAX_DIM),
        n_vocab=_n_vocab(graph, outputs.str("logits", "logits"), model),
        n_context=min(model.int("context_length", least=1), _steady_context(graph)),
    )
    _check_ports(found)
    return found


def _steady_context(graph: Graph) -> int:
    """Return up to how many tokens positions keep their rotations: graphs that choose between two tables change them.

    Keys that the first table rotated would stay in the cache. Phi-3's long-context graphs change at 4,096 or later.
    """
    return 4096 if any(node.op == "If" for node in graph.nodes) else 2**31 - 1


_PAST = (("past_key_names", "past_key_values.%d.key"), ("past_value_names", "past_key_values.%d.value"))
_PRESENT = (("present_key_names", "present.%d.key"), ("present_value_names", "present.%d.value"))


def _numbered(config: Config, key: str, default: str, number: int) -> str:
    template = config.str(key, default)
    if template.count("%") != 1 or "%d" not in template:
        raise BadHeader(config.path, f"{key} is {template[:80]!r}, and has no %d for the layer")
    return template.replace("%d", str(number))


def _n_vocab(graph: Graph, logits: str, model: Config) -> int:
    shape = graph.outputs[logits].shape if logits in graph.outputs else ()
    known = shape[-1] if len(shape) == 3 else 0
    return known if 0 < known <= MAX_VOCAB else model.int("vocab_size", least=1, most=MAX_VOCAB)


def _check_ports(model: GraphModel) -> None:
    """Compare the graph's ports with what the names say: their number, types and shapes."""
    graph = model.graph
    compiled = next((node for node in graph.nodes if node.op == "EPContext"), None)
    if compiled is not None:
        raise UnsupportedModel(f"{graph.path}: the graph was compiled for one device; get the model's CPU variant")
    cache = (1, model.n_kv_heads, 0, model.head_dim)
    pasts = [name for layer in model.layers for name in (layer.past_key, layer.past_value)]
    presents = [name for layer in model.layers for name in (layer.present_key, layer.present_value)]
    wanted = {model.ids: (_WHOLE, (1, 0)), model.mask: (_WHOLE, (1, 0))} | dict.fromkeys(pasts, (_CACHE, cache))
    if model.positions is not None:
        wanted[model.positions] = (_WHOLE, (1, 0))
    given = {model.logits: (_CACHE, (1, 0, model.n_vocab))} | dict.fromkeys(presents, (_CACHE, cache))
    for what, ports, expected in (("input", graph.inputs, wanted), ("output", graph.outputs, given)):
        missing = [name for name in expected if name not in ports]
        if missing:
            raise UnsupportedModel(
                f"{graph.path}: the graph has no {what} {missing[0]!r}, which {CONFIG} names; edgelm runs decoders "
                "with a key and a value cache for each layer"
            )
        for name, (types, shape) in expected.items():
            _check_port(graph, what, ports[name], types, shape)
    unknown = [name for name in graph.inputs if name not in wanted]
    if unknown:
        raise UnsupportedModel(
            f"{graph.path}: the graph asks for {unknown[0]!r}, which edgelm does not know how to give; "
            "it runs graphs of token ids, mask, positions and caches"
        )
    if len({graph.inputs[name].type for name in pasts} | {graph.outputs[name].type for name in presents}) != 1:
        raise UnsupportedModel(f"{graph.path}: the caches of the graph are of several types; edgelm runs graphs of one")


def _check_port(graph: Graph, what: str, port: Port, types: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if port.type not in types:
        raise UnsupportedModel(
            f"{graph.path}: the {what} {port.name!r} is of type {port.type or 'unknown'}, "
            f"where edgelm runs {' and '.join(types)}"
        )
    fits = len(port.shape) == len(shape) and all(
        has in (0, needs) or (needs == 0 and what == "output" and has == 1)
        for has, needs in zip(port.shape, shape, strict=True)
    )
    if not fits:
        raise UnsupportedModel(
            f"{graph.path}: the {what} {port.name!r} has the shape {list(port.shape)}, where {list(shape)} is needed "
            "(0 is any number)"
        )
