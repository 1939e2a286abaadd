"""Tiny random models as folders of the Hugging Face kind: config.json, safetensors files, tokenizer.json.

Made of the same tensors as `tiny_model`, with the names, the order of rotated pairs and the norms of such folders.
Writes the JSON itself, so that nothing here depends on what reads it.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgelm.files.ggml_types import TensorType
from edgelm.testing.blocks import encode_floats
from edgelm.testing.tiny import TinySpec, tiny_parts, tiny_spec
from edgelm.testing.tiny_vocab import CONTROL, UNKNOWN, USER_DEFINED

Floats = NDArray[np.float32]
Encoded = tuple[str, Sequence[int], bytes]
"""Type, shape and bytes of an array."""

_TOP = {
    "token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}  # fmt: skip
_MODULES = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_POST_NORM_MODULES = {
    "post_attention_norm": "post_attention_layernorm", "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}  # fmt: skip
_PAIRS_SIDE_BY_SIDE = ("llama", "smollm3", "granite")
_MODEL_TYPES = {"gemma3": "gemma3_text"}
_CLASSES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM", "phi3": "Phi3ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM", "granite": "GraniteForCausalLM", "olmo2": "Olmo2ForCausalLM",
}  # fmt: skip


def tiny_folder(
    folder: Path | str,
    architecture: str,
    *,
    dtype: str = "F32",
    n_files: int = 1,
    seed: int = 0,
    config: Mapping[str, Any] | None = None,
    edit: Callable[[dict[str, Floats]], None] | None = None,
    quantized: Mapping[str, tuple[int, int]] | None = None,
    **overrides: Any,
) -> Path:
    """Write a random model and return its folder.

    `dtype` is that of all tensors: F32, F16 or BF16. `config` is added to config.json, a value of None removes a key;
    `edit` may change the tensors; `quantized` gives bits and group of MLX's affine quantization: of matrices whose name
    contains a key, of all others under "" (none if there is no such key). `overrides` are fields of `TinySpec`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    spec = tiny_spec(architecture, **overrides)
    metadata, tensors = tiny_parts(spec, "F32", seed)
    arrays: dict[str, Floats] = {}
    for tensor in tensors:
        data = tensor.data() if callable(tensor.data) else tensor.data
        values = np.frombuffer(data, np.float32).reshape(tensor.shape[::-1])
        if not tensor.name.startswith("rope_"):
            arrays[_name(spec, tensor.name)] = _as_in_folders(spec, tensor.name, values)
    if edit is not None:
        edit(arrays)
    keys = {**_config(spec, metadata, dtype), **(config or {})}
    if quantized:
        keys["quantization"] = _rules(arrays, quantized)
    keys = {key: value for key, value in keys.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(keys, indent=1))
    encoded: dict[str, Encoded] = {}
    for name, array in arrays.items():
        form = _form(name, quantized or {}) if array.ndim == 2 else None
        if form is None:
            encoded[name] = dtype, array.shape, encode_floats(TensorType[dtype], array)
        else:
            encoded |= _quantized(name, array, dtype, *form)
    write_weights(folder, encoded, n_files)
    write_tokenizer(folder, metadata)
    return folder


def write_weights(folder: Path, arrays: Mapping[str, Encoded], n_files: int = 1) -> None:
    """Write arrays to one safetensors file, or to several with an index."""
    if n_files == 1:
        write_safetensors(folder / "model.safetensors", arrays)
        return
    names = list(arrays)
    placed: dict[str, str] = {}
    for number in range(n_files):
        file_name = f"model-{number + 1:05d}-of-{n_files:05d}.safetensors"
        mine = {name: arrays[name] for name in names[number::n_files]}
        write_safetensors(folder / file_name, mine)
        placed |= dict.fromkeys(mine, file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": placed}))


def write_safetensors(path: Path, arrays: Mapping[str, Encoded], *, pad: int = 8) -> Path:
    """Write one file; its header is filled up to a multiple of `pad` bytes."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, shape, data) in arrays.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + len(data)]}
        at += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % pad)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in arrays.values()))
    return path


def write_tokenizer(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write tokenizer.json and tokenizer_config.json for a vocabulary given by the keys of GGUF."""
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), metadata["tokenizer.ggml.token_type"].tolist()
    byte_level = metadata["tokenizer.ggml.model"] == "gpt2"
    parts = _byte_level(metadata) if byte_level else _characters(metadata)
    kinds = {CONTROL: True, UNKNOWN: True, USER_DEFINED: False}
    added = [
        {"id": token, "content": tokens[token], "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": kinds[kind]}
        for token, kind in enumerate(types)
        if kind in kinds
    ]  # fmt: skip
    model = {"type": "BPE", "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None,
             "fuse_unk": not byte_level, "unk_token": None if byte_level else "<unk>", "byte_fallback": not byte_level,
             "vocab": {token: number for number, token in enumerate(tokens)}, **parts.pop("model")}  # fmt: skip
    whole = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "model": model, **parts}
    (folder / "tokenizer.json").write_text(json.dumps(whole, ensure_ascii=False))
    names = {role: tokens[metadata[f"tokenizer.ggml.{role}_token_id"]] for role in ("bos", "eos")}
    config = {f"{role}_token": name for role, name in names.items()}
    config |= {"tokenizer_class": "PreTrainedTokenizerFast", "chat_template": metadata.get("tokenizer.chat_template")}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def _byte_level(metadata: Mapping[str, Any]) -> dict[str, Any]:
    split = {
        "smollm": [{"type": "Digits", "individual_digits": True}],
        "gpt-2": [],
        "qwen2": [_split(r"\p{N}")],
        "llama-bpe": [_split(r"\p{N}{1,3}")],
    }[metadata["tokenizer.ggml.pre"]]
    own = metadata["tokenizer.ggml.pre"] in ("smollm", "gpt-2")
    bytes_ = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": own}
    return {
        "model": {
            "merges": [merge.split(" ") for merge in metadata["tokenizer.ggml.merges"]],
            "ignore_merges": metadata["tokenizer.ggml.pre"] == "llama-bpe",
        },
        "normalizer": {"type": "NFC"} if metadata["tokenizer.ggml.pre"] == "qwen2" else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*split, bytes_]},
        "post_processor": bytes_,
        "decoder": bytes_,
    }


def _split(numbers: str) -> dict[str, Any]:
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + numbers
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )  # fmt: skip
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _characters(metadata: Mapping[str, Any]) -> dict[str, Any]:
    bos = metadata["tokenizer.ggml.bos_token_id"]
    name = metadata["tokenizer.ggml.tokens"][bos]
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prefix = [{"type": "Prepend", "prepend": "▁"}] if metadata.get("tokenizer.ggml.add_space_prefix", True) else []
    return {
        "model": {"merges": list(_merges(metadata)), "ignore_merges": False},
        "normalizer": {"type": "Sequence", "normalizers": [*prefix, replace]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {name: {"id": name, "ids": [bos], "tokens": [name]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "ByteFallback"},
            {"type": "Fuse"}, {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
    }  # fmt: skip


def _merges(metadata: Mapping[str, Any]) -> Iterator[list[str]]:
    """Yield every pair of tokens that makes a token, the best score first: as converters from SentencePiece do."""
    tokens = metadata["tokenizer.ggml.tokens"]
    scores = dict(zip(tokens, metadata["tokenizer.ggml.scores"].tolist(), strict=True))
    normal = [token for token, kind in zip(tokens, metadata["tokenizer.ggml.token_type"], strict=True) if kind == 1]
    known = set(normal)
    for token in sorted(normal, key=lambda token: -scores[token]):
        for at in range(1, len(token)):
            if token[:at] in known and token[at:] in known:
                yield [token[:at], token[at:]]


def _form(name: str, quantized: Mapping[str, tuple[int, int]]) -> tuple[int, int] | None:
    return next((form for key, form in quantized.items() if key and key in name), quantized.get(""))


def _rules(arrays: Mapping[str, Floats], quantized: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Return what config.json says of the quantization: a rule for all, and others for single matrices."""
    bits, group = quantized.get("", (4, 32))
    rules: dict[str, Any] = {"group_size": group, "bits": bits}
    for name, array in arrays.items():
        form = _form(name, quantized)
        if array.ndim == 2 and form != quantized.get(""):
            rules[name.removesuffix(".weight")] = form and {"bits": form[0], "group_size": form[1]}
    return {key: False if value is None else value for key, value in rules.items()}


def _quantized(name: str, array: Floats, dtype: str, bits: int, group: int) -> dict[str, Encoded]:
    """Return a matrix as MLX packs it: words, scales and biases; the quants are simply the nearest."""
    kind, rows = TensorType[dtype], len(array)
    groups = array.reshape(rows, -1, group)
    low = groups.min(axis=2, keepdims=True)
    scale = np.maximum(groups.max(axis=2, keepdims=True) - low, 1e-6) / (2**bits - 1)
    quants = np.clip(np.rint((groups - low) / scale), 0, 2**bits - 1).astype(np.uint8).reshape(rows, -1)
    planes = np.unpackbits(quants[..., None], axis=2, count=bits, bitorder="little").reshape(rows, -1)
    words = np.packbits(planes, axis=1, bitorder="little")
    module, shape = name.removesuffix(".weight"), scale.shape[:2]
    return {
        name: ("U32", (rows, words.shape[1] // 4), words.tobytes()),
        f"{module}.scales": (dtype, shape, encode_floats(kind, scale[..., 0])),
        f"{module}.biases": (dtype, shape, encode_floats(kind, low[..., 0])),
    }


def _name(spec: TinySpec, name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    _, layer, module, leaf = name.split(".")
    modules = _MODULES | (_POST_NORM_MODULES if spec.post_norms else {})
    if spec.fused:
        modules |= {"ffn_up": "mlp.gate_up_proj"}
    return f"model.layers.{layer}.{modules[module]}.{leaf}"


def _as_in_folders(spec: TinySpec, name: str, values: Floats) -> Floats:
    n_heads = {"attn_q": spec.n_heads, "attn_k": spec.n_kv_heads}.get(name.split(".")[-2], 0)
    if n_heads and spec.architecture in _PAIRS_SIDE_BY_SIDE:
        pairs = values.reshape(n_heads, -1, 2, *values.shape[1:])
        return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(values.shape)
    return values - 1 if spec.architecture.startswith("gemma") and name.endswith("norm.weight") else values


def _config(spec: TinySpec, metadata: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    config: dict[str, Any] = {
        "architectures": [_CLASSES[spec.architecture]],
        "model_type": _MODEL_TYPES.get(spec.architecture, spec.architecture),
        "hidden_act": "silu",
        "hidden_size": spec.n_embd,
        "intermediate_size": spec.n_ff,
        "num_hidden_layers": spec.n_layers,
        "num_attention_heads": spec.n_heads,
        "num_key_value_heads": spec.n_kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.n_context,
        "rms_norm_eps": 1e-5,
        "rope_theta": spec.rope_base,
        "attention_bias": spec.biases,
        "mlp_bias": False,
        "vocab_size": len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": spec.tied,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "torch_dtype": {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[dtype],
        "rope_scaling": _rope_scaling(spec),
    }
    if spec.architecture.startswith("gemma"):
        config |= {"hidden_activation": "gelu_pytorch_tanh", "query_pre_attn_scalar": spec.head_dim,
                   "sliding_window": spec.sliding_window, "hidden_act": None}  # fmt: skip
    if spec.architecture == "gemma2":
        caps = {"attn_logit_softcapping": spec.attn_softcap, "final_logit_softcapping": spec.final_softcap}
        config |= caps
    if spec.architecture == "gemma3":
        config |= {"sliding_window_pattern": spec.window_pattern, "rope_local_base_freq": spec.rope_base_swa}
    if spec.architecture == "granite":
        config |= {"embedding_multiplier": spec.embedding_scale, "residual_multiplier": spec.residual_scale,
                   "attention_multiplier": spec.attention_scale, "logits_scaling": spec.logit_scale}  # fmt: skip
    if spec.architecture == "phi3":
        config |= {"original_max_position_embeddings": spec.n_original_context}
    return config


def _rope_scaling(spec: TinySpec) -> dict[str, Any] | None:
    if not spec.rope_scaling:
        return None
    kind = "type" if spec.rope_scaling == "longrope" else "rope_type"  # as Phi-3's configs have it
    scaling: dict[str, Any] = {kind: spec.rope_scaling, "factor": spec.rope_factor}
    if spec.rope_scaling in ("yarn", "llama3"):
        scaling["original_max_position_embeddings"] = spec.n_original_context
    if spec.rope_scaling == "llama3":
        scaling |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if spec.rope_scaling == "longrope":
        half = (spec.rope_dim or spec.head_dim) // 2
        scaling |= {
            f"{name}_factor": np.linspace(1.0, top, half).tolist() for name, top in (("short", 1.5), ("long", 16.0))
        }
    return scaling
