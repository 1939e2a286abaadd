"""Every architecture in every variant that files come in: logits equal those of libllama on a tiny random model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edgelm.engine.registry import get_backend
from edgelm.files.ggml_types import TensorType
from edgelm.files.gguf import open_model
from edgelm.testing import TensorData, tiny_model, write_gguf
from edgelm.testing.evaluate import evaluate, logits_error

Tensors = dict[str, TensorData]

N_PROMPT, N_DECODE = 96, 4  # beyond every sliding window (16) and every stretched context (64) of the variants
# of the logits' spread. llama.cpp keeps queries and attention weights in float16, NumPy does not: over the layers of a
# random model the difference grows.
LIMITS = {"llamacpp": 1e-5, "numpy": 2e-2}
LAYERS_OF_LIMIT = 5


def fused(tensors: Tensors) -> None:
    """Put the matrices of q, k and v, and their biases, into one tensor each."""
    for name in [name for name in tensors if ".attn_q." in name]:
        parts = [tensors.pop(name.replace("attn_q", f"attn_{letter}")) for letter in "qkv"]
        shape = (*parts[0].shape[:-1], sum(part.shape[-1] for part in parts))
        together = b"".join(data(part) for part in parts)
        fused_name = name.replace("attn_q", "attn_qkv")
        tensors[fused_name] = TensorData(fused_name, parts[0].type, shape, together)


def apart(tensors: Tensors) -> None:
    """The reverse, for four heads of queries over two of keys and values."""
    for name in [name for name in tensors if "attn_qkv" in name]:
        whole = tensors.pop(name)
        width, rows = whole.shape
        sizes = {"q": rows // 2, "k": rows // 4, "v": rows // 4}
        start = 0
        for letter, n in sizes.items():
            part = data(whole)[start * width * 4 : (start + n) * width * 4]
            part_name = name.replace("qkv", letter)
            tensors[part_name] = TensorData(part_name, whole.type, (width, n), part)
            start += n


def biased(*matrices: str) -> Callable[[Tensors], None]:
    """Give the matrices of these names biases."""

    def edit(tensors: Tensors) -> None:
        rng = np.random.default_rng(5)
        for name in [name for name in tensors if name.split(".")[-2] in matrices]:
            n = tensors[name].shape[1]
            bias = name.replace(".weight", ".bias")
            tensors[bias] = TensorData(bias, TensorType.F32, (n,), rng.normal(0, 0.5, n).astype("<f4").tobytes())

    return edit


def data(tensor: TensorData) -> bytes:
    return tensor.data() if callable(tensor.data) else tensor.data


@dataclass(frozen=True)
class Variant:
    architecture: str
    name: str = "plain"
    spec: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    edit: Callable[[Tensors], None] | None = None
    n_prompt: int = N_PROMPT

    def __str__(self) -> str:
        return f"{self.architecture}-{self.name}"

    def write(self, folder: Path) -> Path:
        metadata = {f"{self.architecture}.{key}": value for key, value in self.metadata.items()}
        path = tiny_model(folder / "tiny.gguf", self.architecture, metadata=metadata, **self.spec)
        return path if self.edit is None else rewrite(path, self.edit)


def rewrite(path: Path, edit: Callable[[Tensors], None]) -> Path:
    """Write a copy of a model whose tensors `edit` has changed."""
    model = open_model(path)
    whole = path.read_bytes()
    tensors = {
        info.name: TensorData(info.name, info.type, info.shape, whole[info.offset : info.offset + info.n_bytes])
        for info in model.tensors.values()
    }
    edit(tensors)
    return write_gguf(path.with_name("edited.gguf"), model.metadata, list(tensors.values()))


STRETCHED = {"rope_scaling": "yarn", "rope_factor": 4.0, "n_original_context": 64}
LINEAR = {"rope_scaling": "linear", "rope_factor": 4.0}
LONG = {"rope_scaling": "longrope", "n_original_context": 64}
SHORT = {"rope_scaling": "longrope", "n_original_context": 256}

VARIANTS = [
    Variant("llama"),
    Variant("llama", "untied", {"tied": False}),
    Variant("llama", "all-heads", {"n_kv_heads": 4}),
    Variant("llama", "biases", {"biases": True}, edit=biased("ffn_up", "ffn_gate", "ffn_down")),
    Variant("llama", "fused", {"biases": True}, edit=fused),
    Variant("llama", "head-of-its-own", {"head_dim": 32}),
    Variant("llama", "linear", LINEAR),
    Variant("llama", "linear-by-default", metadata={"rope.scaling.factor": 4.0}),
    Variant("llama", "linear-old-key", metadata={"rope.scale_linear": 4.0}),
    Variant("llama", "scaling-none", metadata={"rope.scaling.type": "none", "rope.scaling.factor": 4.0}),
    Variant("llama", "yarn", STRETCHED),
    Variant("llama", "yarn-attn-factor", STRETCHED, {"rope.scaling.attn_factor": 1.3}),
    Variant(
        "llama",
        "yarn-own-ramp",
        STRETCHED,
        {
            "rope.scaling.yarn_beta_fast": 16.0,
            "rope.scaling.yarn_beta_slow": 2.0,
            "rope.scaling.yarn_ext_factor": 0.5,
            "rope.scaling.yarn_attn_factor": 1.5,
            "rope.scaling.yarn_log_multiplier": 0.5,
        },
    ),
    Variant("llama", "llama3", {"rope_scaling": "llama3"}),
    Variant("llama", "longrope-long", LONG),
    Variant("llama", "longrope-short", SHORT),
    Variant("llama", "sliding-is-ignored", metadata={"attention.sliding_window": 16}),
    Variant("llama", "attention-scale-is-ignored", metadata={"attention.scale": 0.05}),
    Variant("qwen2"),
    Variant("qwen2", "untied-biased-head", {"tied": False}, edit=biased("output")),
    Variant("qwen2", "no-biases", {"biases": False}),
    Variant("qwen2", "fused", edit=fused),
    Variant("qwen2", "yarn", STRETCHED),
    Variant("qwen3"),
    Variant("qwen3", "untied", {"tied": False}),
    Variant("qwen3", "yarn", STRETCHED),
    Variant("qwen3", "linear", LINEAR),
    Variant("gemma2"),
    Variant("gemma2", "default-caps", metadata={"attn_logit_softcapping": None, "final_logit_softcapping": None}),
    Variant("gemma2", "tight-caps", {"attn_softcap": 2.0, "final_softcap": 3.0}),
    Variant("gemma2", "default-window", metadata={"attention.sliding_window": None}),
    Variant("gemma2", "27b", {"n_layers": 46}),
    Variant("gemma2", "linear", LINEAR),
    Variant("gemma2", "yarn", STRETCHED),
    Variant("gemma2", "sliding-base", {"rope_base_swa": 500.0}),
    Variant("gemma2", "pattern", {"n_layers": 4, "window_pattern": 3}),
    Variant("gemma3"),
    Variant("gemma3", "default-pattern", {"n_layers": 7, "window_pattern": 0}),
    Variant("gemma3", "listed-pattern", metadata={"attention.sliding_window_pattern": [False, True, True]}),
    Variant("gemma3", "all-slide", metadata={"attention.sliding_window_pattern": 0}),
    Variant("gemma3", "none-slides", {"sliding_window": 0}),
    Variant("gemma3", "default-sliding-base", {"rope_base_swa": 0.0}),
    Variant("gemma3", "linear", LINEAR),
    Variant("gemma3", "yarn", STRETCHED),
    Variant("gemma3", "untied-capped", {"tied": False, "final_softcap": 5.0}),
    Variant("gemma3", "27b", {"n_layers": 62, "n_ff": 32}),
    Variant("gemma3", "long-prompt", {"n_context": 512}, n_prompt=300),
    Variant("phi3"),
    Variant("phi3", "tied", {"tied": True}),
    Variant("phi3", "separate", edit=apart),
    Variant("phi3", "partial-rotary", {"rope_dim": 12}),
    Variant("phi3", "longrope-long", LONG),
    Variant("phi3", "longrope-short", SHORT),
    Variant("phi3", "longrope-partial", {**LONG, "rope_dim": 12}),
    Variant("phi3", "longrope-without-type", LONG, {"rope.scaling.type": None}),
    Variant("phi3", "sliding-is-ignored", {"sliding_window": 16}),
    Variant("smollm3"),
    Variant("smollm3", "untied", {"tied": False}),
    Variant("smollm3", "linear", LINEAR),
    Variant("smollm3", "yarn", STRETCHED),
    Variant("smollm3", "biases", {"biases": True}),
    Variant("granite"),
    Variant("granite", "untied", {"tied": False}),
    Variant("granite", "unscaled", {"embedding_scale": 0.0, "residual_scale": 0.0, "attention_scale": 0.0}),
    Variant("granite", "no-positions", metadata={"rope.scaling.finetuned": False}),
    Variant("granite", "biases", {"biases": True}, edit=biased("ffn_up", "ffn_gate", "ffn_down")),
    Variant("granite", "llama3", {"rope_scaling": "llama3"}),
    Variant("granite", "longrope", LONG),
    Variant("granite", "yarn", STRETCHED),
    Variant("olmo2"),
    Variant("olmo2", "all-heads", {"n_kv_heads": 4}),
    Variant("olmo2", "yarn", STRETCHED),
    Variant("olmo2", "olmo3", {**STRETCHED, "n_layers": 5, "sliding_window": 16}, {"rope.scaling.attn_factor": 1.2}),
]


@dataclass(frozen=True)
class Reference:
    """A model, tokens in passes, and the logits that libllama computes."""

    path: Path
    token_ids: list[int]
    passes: tuple[int, ...]
    n_context: int
    n_layers: int
    logits: npt.NDArray[np.float32]


@pytest.fixture(scope="module", params=VARIANTS, ids=str)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Reference]:
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python to compare with")
    variant: Variant = request.param
    path = variant.write(tmp_path_factory.mktemp("architecture"))
    metadata = open_model(path).metadata
    n_context, n_layers = (int(metadata[f"{variant.architecture}.{key}"]) for key in ("context_length", "block_count"))
    passes = (variant.n_prompt, *(1,) * N_DECODE)
    llama = llama_cpp.Llama(
        str(path), logits_all=True, n_ctx=n_context, n_threads=1, n_threads_batch=1, verbose=False, flash_attn=False
    )
    try:
        token_ids = np.random.default_rng(3).integers(5, llama.n_vocab(), sum(passes)).tolist()
        start = 0
        for n in passes:
            llama.eval(token_ids[start : start + n])
            start += n
        logits = np.array(llama.scores[: len(token_ids)])
    finally:
        llama.close()
    yield Reference(path, token_ids, passes, n_context, n_layers, logits)
    path.unlink()


@cache
def reason_against(backend: str) -> str:
    found = get_backend(backend).probe()
    return "" if found.available else found.reason


@pytest.mark.parametrize("backend", LIMITS)
def test_logits_equal_those_of_libllama(reference: Reference, backend: str) -> None:
    if reason := reason_against(backend):
        pytest.skip(reason)
    ours = evaluate(
        reference.path, reference.token_ids, backend=backend, n_context=reference.n_context, passes=reference.passes
    )
    assert np.isfinite(ours).all()
    limit = LIMITS[backend] * max(1.0, reference.n_layers / LAYERS_OF_LIMIT)
    assert logits_error(ours, reference.logits) < limit
