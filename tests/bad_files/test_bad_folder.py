"""One small bad folder for each way a model folder can be wrong, and the error that it must raise."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgelm.engine.architecture import record
from edgelm.engine.folders import open_folder
from edgelm.engine.loading import open_path
from edgelm.engine.registry import get_architecture
from edgelm.errors import EdgeLMError, ModelFileError, UnsupportedModel
from edgelm.files import BadHeader, BadTensor, DuplicatePart, MismatchedPart, MissingPart, NotAModelFile, TruncatedFile
from edgelm.testing import tiny_folder
from edgelm.testing.tiny import ARCHITECTURES
from edgelm.testing.tiny_folder import write_safetensors
from edgelm.text.tokenizer import load_tokenizer

N_EXAMPLES = 60

Break = Callable[[Path], None]


def gone(name: str) -> Break:
    return lambda folder: (folder / name).unlink()


def holds(name: str, content: str | bytes) -> Break:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data) and None


def config(**changes: Any) -> Break:
    return changed("config.json", lambda content: content.update(changes))


def changed(name: str, change: Callable[[dict[str, Any]], Any]) -> Break:
    def edit(folder: Path) -> None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content))

    return edit


def index(change: Callable[[dict[str, Any]], Any]) -> Break:
    return changed("model.safetensors.index.json", change)


def copied(source: str, target: str) -> Break:
    return lambda folder: (folder / target).write_bytes((folder / source).read_bytes()) and None


SHARDED, QUANTIZED = {"n_files": 2}, {"quantized": {"": (4, 32)}}
PART = "model-00002-of-00002.safetensors"
Q_PROJ = "model.layers.0.self_attn.q_proj"

BAD: dict[str, tuple[dict[str, Any], Break, type[EdgeLMError], str]] = {
    "no config": ({}, gone("config.json"), NotAModelFile, "no config.json"),
    "no weights": ({}, gone("model.safetensors"), MissingPart, "neither model.safetensors nor"),
    "config is no JSON": ({}, holds("config.json", "{"), BadHeader, "not sound JSON"),
    "config is no text": ({}, holds("config.json", b"\xff\xfe\x00"), BadHeader, "not sound JSON"),
    "config is a list": ({}, holds("config.json", "[]"), BadHeader, "not hold a JSON object"),
    "config is deep": ({}, holds("config.json", "[" * 200_000), BadHeader, "nested too deeply"),
    "weights are damaged": ({}, holds("model.safetensors", "x" * 100), BadHeader, "bytes, more than"),
    "a part is missing": (SHARDED, gone(PART), MissingPart, "1 of 2 weight files are missing"),
    "a part is cut off": (SHARDED, lambda f: (f / PART).write_bytes((f / PART).read_bytes()[:-1]) and None,
                          TruncatedFile, "its tensors reach to"),
    "index is empty": (SHARDED, index(dict.clear), BadHeader, "weight_map is not"),
    "index of numbers": (SHARDED, index(lambda c: c.update(weight_map={"a": 1})), BadHeader, "weight_map is not"),
    "index leaves the folder": (
        SHARDED, index(lambda c: c["weight_map"].update(a="../a.safetensors")), BadHeader, "not the name of"),
    "index names another kind": (
        SHARDED, index(lambda c: c["weight_map"].update(a="a.bin")), BadHeader, "not the name of"),
    "index promises more": (SHARDED, index(lambda c: c["weight_map"].update(a=PART)), MismatchedPart, "is not in"),
    "index is wrong": (
        SHARDED, index(lambda c: c["weight_map"].update(dict.fromkeys(c["weight_map"], PART))),
        MismatchedPart, "is not in"),
    "parts are the same": (
        SHARDED, copied("model-00001-of-00002.safetensors", PART), DuplicatePart, "is also in"),
    "no model_type": ({}, config(model_type=None), UnsupportedModel, "does not say model_type"),
    "unknown model_type": ({}, config(model_type="mamba"), UnsupportedModel, "'mamba' is not supported (supported:"),
    "model_type is a number": ({}, config(model_type=3), ModelFileError, "not a string"),
    "no layers": ({}, config(num_hidden_layers=None), UnsupportedModel, "num_hidden_layers"),
    "layers are text": ({}, config(num_hidden_layers="3"), ModelFileError, "not a whole number"),
    "endless layers": ({}, config(num_hidden_layers=2**31), ModelFileError, "not between"),
    "negative width": ({}, config(hidden_size=-64), ModelFileError, "not between"),
    "another activation": ({}, config(hidden_act="relu"), UnsupportedModel, "activation 'relu'"),
    "another rope": ({}, config(rope_scaling={"type": "dynamic", "factor": 2.0}), UnsupportedModel, "'dynamic'"),
    "rope is text": ({}, config(rope_scaling="linear"), ModelFileError, "not an object"),
    "windows": ({}, config(use_sliding_window=True), UnsupportedModel, "sliding windows"),
    "quantized by others": (
        {}, config(quantization_config={"quant_method": "gptq"}), UnsupportedModel, "quantized by 'gptq'"),
    "another mode of MLX": (
        QUANTIZED, config(quantization={"mode": "mxfp4", "bits": 4, "group_size": 32}), UnsupportedModel, "'mxfp4'"),
    "other bits": (
        QUANTIZED, config(quantization={"bits": 8, "group_size": 32}), BadTensor, "do not fit 8 bits in groups of 32"),
    "other group": (
        QUANTIZED, config(quantization={"bits": 4, "group_size": 64}), BadTensor, "do not fit 4 bits in groups of 64"),
    "unknown bits": (
        QUANTIZED, config(quantization={"bits": 7, "group_size": 32}), UnsupportedModel, "7 bits in groups of 32"),
    "no bits": (QUANTIZED, config(quantization={"group_size": 32}), UnsupportedModel, "does not say bits"),
    "bits of one matrix": (
        QUANTIZED, config(quantization={"bits": 4, "group_size": 32, Q_PROJ: {"bits": 3}}), BadTensor, "fit 3 bits"),
    "head missing": ({}, config(tie_word_embeddings=False), BadTensor, "there is no lm_head"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_folder_raises_its_own_error(name: str, tmp_path: Path) -> None:
    options, damage, kind, fact = BAD[name]
    folder = tiny_folder(tmp_path / "model", "llama", **options)
    open_path(folder)
    damage(folder)
    with pytest.raises(EdgeLMError) as caught:
        open_path(folder)
    assert type(caught.value) is kind
    assert fact in str(caught.value)
    assert str(caught.value).startswith(str(folder))


def tensors(change: Callable[[dict[str, tuple[str, Any, bytes]]], Any]) -> Break:
    def edit(folder: Path) -> None:
        arrays: dict[str, tuple[str, Any, bytes]] = {
            name: ("F16", (1,), bytes(2)) for name in (f"{Q_PROJ}.bias", "lm_head.weight")
        }
        change(arrays)
        write_safetensors(folder / "model.safetensors", arrays)

    return edit


WORDS = {f"{Q_PROJ}.weight": ("U32", (8, 4), bytes(128))}
SCALES, BIASES = f"{Q_PROJ}.scales", f"{Q_PROJ}.biases"
BAD_TENSORS: dict[str, tuple[Break, type[EdgeLMError], str]] = {
    "integers": (tensors(lambda a: a.update(WORDS)), UnsupportedModel, "of type U32, which edgelm computes with only"),
    "doubles": (tensors(lambda a: a.update(x=("F64", (1,), bytes(8)))), UnsupportedModel, "of type F64"),
    "no biases": (
        tensors(lambda a: a.update(WORDS | {SCALES: ("F16", (8, 1), bytes(16))})), UnsupportedModel, "no biases"),
    "biases of another shape": (
        tensors(lambda a: a.update(
            WORDS | {SCALES: ("F16", (8, 1), bytes(16)), BIASES: ("F16", (4, 1), bytes(8))})),
        BadTensor, "differ in shape or type"),
    "integer scales": (
        tensors(lambda a: a.update(
            WORDS | {SCALES: ("U8", (8, 1), bytes(8)), BIASES: ("U8", (8, 1), bytes(8))})),
        BadTensor, "packed words and scales"),
    "words in three dimensions": (
        tensors(lambda a: a.update({
            f"{Q_PROJ}.weight": ("U32", (8, 2, 2), bytes(128)), SCALES: ("F16", (8, 1), bytes(16)),
            BIASES: ("F16", (8, 1), bytes(16))})),
        BadTensor, "in two dimensions"),
    "two of a name": (
        tensors(lambda a: a.update({"language_model.lm_head.weight": ("F16", (1,), bytes(2))})),
        BadTensor, "two tensors of the folder"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors_raise_their_own_error(name: str, tmp_path: Path) -> None:
    damage, kind, fact = BAD_TENSORS[name]
    rules = {"bits": 4, "group_size": 32}
    folder = tiny_folder(tmp_path, "llama", config={"tie_word_embeddings": None, "quantization": rules})
    damage(folder)
    with pytest.raises(EdgeLMError) as caught:
        open_folder(folder)
    assert type(caught.value) is kind
    assert fact in str(caught.value)


def test_tensors_that_nothing_uses_are_an_error(tmp_path: Path) -> None:
    def more(arrays: dict[str, np.ndarray]) -> None:
        arrays["model.layers.0.self_attn.extra.weight"] = np.zeros((2, 32), np.float32)

    model = open_folder(tiny_folder(tmp_path, "llama", edit=more))
    with pytest.raises(UnsupportedModel, match=r"would not use \(blk\.0\.self_attn.extra.weight\)"):
        record(get_architecture("llama"), model, 64)


def without_queries(arrays: dict[str, np.ndarray]) -> None:
    del arrays[f"{Q_PROJ}.weight"]


def test_a_missing_tensor_is_an_error(tmp_path: Path) -> None:
    model = open_folder(tiny_folder(tmp_path, "llama", edit=without_queries))
    with pytest.raises(UnsupportedModel, match="attn_q"):
        record(get_architecture("llama"), model, 64)


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "llama")
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"holds no tokenizer\.json"):
        load_tokenizer(open_folder(folder))


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8)
    | st.sampled_from([0, 1, 2, -1, 2**31, 0.5, "linear", "llama3", "yarn", "longrope", "full_attention"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
        st.sampled_from(["type", "rope_type", "factor", "rope_theta", "bits", "group_size", "short_factor", "a"]),
        inner, max_size=4),
    max_leaves=6,
)  # fmt: skip
keys = st.sampled_from([
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta",
    "rope_scaling", "rope_parameters", "max_position_embeddings", "rms_norm_eps", "vocab_size", "eos_token_id",
    "tie_word_embeddings", "sliding_window", "sliding_window_pattern", "layer_types", "quantization",
    "quantization_config", "query_pre_attn_scalar", "hidden_act", "partial_rotary_factor", "no_rope_layers",
    "embedding_multiplier", "logits_scaling", "text_config", "original_max_position_embeddings",
    "attn_logit_softcapping", "use_sliding_window",
])  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: tiny_folder(tmp_path_factory.mktemp(name), name, n_layers=1) for name in ARCHITECTURES}


@settings(deadline=None, max_examples=N_EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.sampled_from(sorted(ARCHITECTURES)), changes=st.dictionaries(keys, values, min_size=1, max_size=4))
def test_any_config_opens_or_raises(folders: dict[str, Path], name: str, changes: dict[str, Any]) -> None:
    path = folders[name] / "config.json"
    whole = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(whole) | changes))
        model = open_folder(folders[name])
        record(get_architecture(model.architecture), model, 64)
        load_tokenizer(model)
    except EdgeLMError as error:
        assert str(error)  # noqa: PT017
    finally:
        path.write_text(whole)


@settings(deadline=None, max_examples=N_EXAMPLES, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tokenizer_opens_or_raises(folders: dict[str, Path], tmp_path: Path, data: st.DataObject) -> None:
    folder = folders[data.draw(st.sampled_from(["gemma3", "llama"]))]
    path = folder / "tokenizer.json"
    whole = path.read_text(encoding="utf-8")
    content = json.loads(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        place: Any = content
        while isinstance(place, dict) and place and data.draw(st.booleans()):
            name = data.draw(st.sampled_from(sorted(place)[:40]))
            if not isinstance(place[name], dict) or not place[name]:
                break
            place = place[name]
        place[data.draw(st.sampled_from(sorted(place)[:40] or ["a"]))] = data.draw(values)
    try:
        path.write_text(json.dumps(content), encoding="utf-8")
        load_tokenizer(open_folder(folder), cache_dir=tmp_path).encode("a b<s>\n")
    except EdgeLMError as error:
        assert str(error)  # noqa: PT017
    finally:
        path.write_text(whole, encoding="utf-8")
