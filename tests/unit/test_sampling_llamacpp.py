"""The steps against llama.cpp's own samplers, where its library is installed: same tokens left, same logits."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from edgelm.engine.sampling import Sampling, _truncated

llama_cpp: Any = pytest.importorskip("llama_cpp", reason="llama.cpp is the oracle here")

TOKEN = np.dtype([("id", "i4"), ("logit", "f4"), ("p", "f4")])


def llamas(logits: np.ndarray, sampling: Sampling) -> dict[int, float]:
    """Return the tokens that llama.cpp's chain leaves, with their logits after the temperature."""
    tokens = np.zeros(len(logits), dtype=TOKEN)
    tokens["id"], tokens["logit"] = np.arange(len(logits)), logits
    pointer = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
    candidates = llama_cpp.llama_token_data_array(data=pointer, size=len(logits), selected=-1, sorted=False)
    chain = llama_cpp.llama_sampler_chain_init(llama_cpp.llama_sampler_chain_default_params())
    for step in (
        llama_cpp.llama_sampler_init_top_k(sampling.top_k),
        llama_cpp.llama_sampler_init_typical(sampling.typical_p, 0),
        llama_cpp.llama_sampler_init_top_p(sampling.top_p, 0),
        llama_cpp.llama_sampler_init_min_p(sampling.min_p, 0),
        llama_cpp.llama_sampler_init_temp(sampling.temperature),
    ):
        llama_cpp.llama_sampler_chain_add(chain, step)
    llama_cpp.llama_sampler_apply(chain, ctypes.byref(candidates))
    left = tokens[: candidates.size]
    result = dict(zip(left["id"].tolist(), left["logit"].tolist(), strict=True))
    llama_cpp.llama_sampler_free(chain)
    return result


@pytest.mark.parametrize("seed", range(40))
def test_the_same_tokens_are_left(seed: int) -> None:
    choose = np.random.default_rng(seed)
    n_vocab = int(choose.choice([50, 3000, 49_152]))
    logits = (choose.standard_normal(n_vocab) * choose.choice([1, 3, 6])).astype(np.float32)
    sampling = Sampling(
        temperature=float(choose.choice([0.5, 1.0, 1.5])),
        top_k=int(choose.choice([0, 5, 40, 300])),
        top_p=float(choose.choice([1.0, 0.95, 0.5])),
        min_p=float(choose.choice([0.0, 0.05, 0.3])),
        typical_p=float(choose.choice([1.0, 0.9, 0.5])),
    )
    ids, kept = _truncated(logits, float(logits.max()), sampling)
    ours = range(n_vocab) if ids is None else ids.tolist()
    theirs = llamas(logits, sampling)
    assert set(ours) == set(theirs)
    np.testing.assert_allclose(kept / np.float32(sampling.temperature), [theirs[token] for token in ours], rtol=1e-5)
