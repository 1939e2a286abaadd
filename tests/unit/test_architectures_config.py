"""What is read of a model's metadata, and which models are refused instead of being computed wrongly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgelm.engine.architecture import ModelConfig, read_config, record, rope_spec, sliding_windows
from edgelm.engine.ir import Trace
from edgelm.engine.registry import get_architecture
from edgelm.errors import ModelFileError, UnsupportedModel
from edgelm.files.gguf import open_model
from edgelm.files.meta import Meta
from edgelm.testing import ARCHITECTURES, TensorData, tiny_model, write_gguf

NUMBERS = {
    "block_count": 6,
    "embedding_length": 64,
    "attention.head_count": 4,
    "context_length": 256,
    "attention.layer_norm_rms_epsilon": 1e-5,
}


def config(n_context: int = 256, /, **changed: Any) -> ModelConfig:
    """The config of a model that says `NUMBERS`, changed; in keys, `__` stands for a dot."""
    own = {**NUMBERS, **{key.replace("__", "."): value for key, value in changed.items()}}
    metadata = {f"llama.{key}": value for key, value in own.items() if value is not None}
    return read_config(Meta(Path("model.gguf"), "llama", metadata), n_context)


def trace(folder: Path, architecture: str, n_context: int = 256, **arguments: Any) -> Trace:
    model = open_model(tiny_model(folder / "tiny.gguf", architecture, **arguments))
    return record(get_architecture(architecture), model, n_context)


def test_unsaid_numbers_follow_from_the_others() -> None:
    cfg = config()
    assert cfg.n_kv_heads == cfg.n_heads == (4,) * 6
    assert (cfg.head_dim_k, cfg.head_dim_v, cfg.rope_dims, cfg.rope_base) == (16, 16, 16, 10000.0)


def test_values_are_as_wide_as_the_embedding_per_head_even_if_keys_are_not() -> None:
    cfg = config(attention__key_length=32)
    assert (cfg.head_dim_k, cfg.head_dim_v, cfg.rope_dims) == (32, 16, 32)


@pytest.mark.parametrize(
    "changed",
    [
        {"block_count": 0},
        {"block_count": 2**31 - 1},
        {"attention__head_count": 0},
        {"attention__head_count_kv": 0},
        {"embedding_length": 0},
        {"rope__freq_base": 0.0},
        {"rope__dimension_count": 0},
        {"attention__layer_norm_rms_epsilon": -1.0},
    ],
)
def test_absurd_numbers_are_refused(changed: dict[str, Any]) -> None:
    with pytest.raises(ModelFileError, match="not between"):
        config(**changed)


@pytest.mark.parametrize("missing", NUMBERS)
def test_missing_numbers_are_named(missing: str) -> None:
    with pytest.raises(UnsupportedModel, match=f"llama.{missing}"):
        config(**{missing.replace(".", "__"): None})


def test_uneven_heads_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="4 attention heads cannot share 3"):
        config(attention__head_count_kv=3)


def test_mixtures_of_experts_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="mixture of 8 experts"):
        config(expert_count=8)


@pytest.mark.parametrize(
    ("changed", "freq_scale", "ext_factor"),
    [
        ({}, 1.0, 0.0),
        ({"rope__scaling__factor": 4.0}, 0.25, 0.0),
        ({"rope__scale_linear": 4.0}, 0.25, 0.0),
        ({"rope__scaling__factor": 0.0}, 1.0, 0.0),
        ({"rope__scaling__type": "none", "rope__scaling__factor": 4.0}, 1.0, 0.0),
        ({"rope__scaling__type": "linear", "rope__scaling__factor": 4.0}, 0.25, 0.0),
        ({"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}, 0.25, 1.0),
        ({"rope__scaling__type": "longrope"}, 1.0, 0.0),
    ],
)
def test_rope_scaling(changed: dict[str, Any], freq_scale: float, ext_factor: float) -> None:
    spec = rope_spec(config(**changed), 4, neox=True)
    assert (spec.freq_scale, spec.ext_factor, spec.attn_factor) == (freq_scale, ext_factor, 1.0)


def test_yarn_stretches_the_original_context() -> None:
    yarn = {"rope__scaling__type": "yarn", "rope__scaling__factor": 4.0}
    assert rope_spec(config(**yarn), 4, neox=True).n_ctx_orig == 256
    assert rope_spec(config(**yarn, rope__scaling__original_context_length=64), 4, neox=True).n_ctx_orig == 64


@pytest.mark.parametrize("changed", [{"type": "dynamic"}, {"type": "yarn", "factor": 0.5}])
def test_unknown_rope_scaling_is_refused(changed: dict[str, Any]) -> None:
    cfg = config(**{f"rope__scaling__{key}": value for key, value in changed.items()})
    with pytest.raises(UnsupportedModel):
        rope_spec(cfg, 4, neox=True)


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [
        (None, (8, 8, 0, 8, 8, 0)),
        (2, (8, 0, 8, 0, 8, 0)),
        (1, (0,) * 6),
        (0, (8,) * 6),
        (np.array([1, 0, 0, 1, 0, 0], np.int32), (8, 0, 0, 8, 0, 0)),
        (np.array([False, True, True, False, True, True]), (0, 8, 8, 0, 8, 8)),
    ],
)
def test_sliding_windows(pattern: object, windows: tuple[int, ...]) -> None:
    cfg = config(attention__sliding_window=8, attention__sliding_window_pattern=pattern)
    assert sliding_windows(cfg, 3) == windows


def test_files_without_a_window_slide_by_the_default() -> None:
    assert sliding_windows(config(), 2) == (0,) * 6
    assert sliding_windows(config(), 2, default=4096) == (4096, 0) * 3


def test_a_pattern_of_the_wrong_length_is_refused() -> None:
    cfg = config(attention__sliding_window=8, attention__sliding_window_pattern=np.array([True, False]))
    with pytest.raises(ModelFileError, match="2 truth values, 6 are needed"):
        sliding_windows(cfg, 3)


@pytest.mark.parametrize(("n_context", "used"), [(64, "short"), (65, "long")])
def test_the_context_chooses_the_factors_of_longrope(tmp_path: Path, n_context: int, used: str) -> None:
    recorded = trace(tmp_path, "phi3", n_context, rope_scaling="longrope", n_original_context=64)
    factors = {op.weights[0].tensor for op in recorded.ops if op.kind == "rope"}
    assert factors == {f"rope_factors_{used}.weight"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_rows_are_selected_in_the_last_block_only(tmp_path: Path, architecture: str) -> None:
    recorded = trace(tmp_path, architecture)
    kinds = [op.kind for op in recorded.ops]
    last_attend = len(kinds) - 1 - kinds[::-1].index("attend")
    assert kinds.count("select") == 2
    assert kinds.index("select") == last_attend + 2  # after the projection of the attention
    assert recorded.values[recorded.logits].per == "output"


def test_smollm3_has_no_positions_in_every_fourth_layer(tmp_path: Path) -> None:
    kinds = [op.kind for op in trace(tmp_path, "smollm3", n_layers=8).ops if op.kind in ("rope", "attend")]
    assert kinds == (["rope", "rope", "attend"] * 3 + ["attend"]) * 2


def test_layers_with_the_same_window_share_a_group(tmp_path: Path) -> None:
    attends = trace(tmp_path, "gemma3", n_layers=4, window_pattern=2).attends
    assert [(spec.window, spec.group) for spec in attends] == [(16, 0), (0, 1)] * 2


def test_tensors_that_would_go_unused_are_refused(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "tiny.gguf", "llama")
    model, whole = open_model(path), path.read_bytes()
    tensors = [
        TensorData(info.name, info.type, info.shape, whole[info.offset : info.offset + info.n_bytes])
        for info in model.tensors.values()
    ]
    norm = next(tensor for tensor in tensors if tensor.name == "output_norm.weight")
    tensors.append(norm._replace(name="blk.0.attn_sinks.weight"))
    more = open_model(write_gguf(tmp_path / "more.gguf", model.metadata, tensors))
    with pytest.raises(UnsupportedModel, match=r"1 tensors .*blk\.0\.attn_sinks\.weight"):
        record(get_architecture("llama"), more, 256)


def test_unused_rope_factors_are_no_reason_to_refuse(tmp_path: Path) -> None:
    none = {"llama.rope.scaling.type": "longrope"}  # which has factors of its own
    kinds = {op.kind: len(op.weights) for op in trace(tmp_path, "llama", rope_scaling="llama3", metadata=none).ops}
    assert kinds["rope"] == 0


@pytest.mark.parametrize(
    ("architecture", "arguments", "message"),
    [
        ("granite", {"logit_scale": 0.0}, "granite.logit_scale"),
        ("granite", {"metadata": {"granite.deepstack_mapping": [-1, 0, 1]}}, "Vision"),
        ("olmo2", {"tied": True}, "'output.weight'"),
        ("llama", {"n_layers": 2, "metadata": {"llama.block_count": 3}}, "'blk.2.attn_norm.weight'"),
        ("llama", {"n_layers": 3, "metadata": {"llama.block_count": 2}}, "9 tensors"),
        ("qwen2", {"metadata": {"qwen2.attention.key_length": 8}}, "does not fit"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_reason(
    tmp_path: Path, architecture: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(UnsupportedModel, match=message):
        trace(tmp_path, architecture, **arguments)
