"""The steps against llama.cpp's own samplers, where its library is installed: same tokens left, same logits."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import numpy as np
import pytest

from edgelm.engine.sampling import Sampling, _temperature, _truncated
from edgelm.engine.sampling_steps import dry_penalties, without_top_choices

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
        llama_cpp.llama_sampler_init_top_n_sigma(sampling.top_n_sigma or -1.0),
        llama_cpp.llama_sampler_init_top_k(sampling.top_k),
        llama_cpp.llama_sampler_init_typical(sampling.typical_p, 0),
        llama_cpp.llama_sampler_init_top_p(sampling.top_p, 0),
        llama_cpp.llama_sampler_init_min_p(sampling.min_p, 0),
        llama_cpp.llama_sampler_init_xtc(sampling.xtc_probability, sampling.xtc_threshold, 0, 1),
        llama_cpp.llama_sampler_init_temp_ext(
            sampling.temperature, sampling.dynatemp_range, sampling.dynatemp_exponent
        ),
    ):
        llama_cpp.llama_sampler_chain_add(chain, step)
    llama_cpp.llama_sampler_apply(chain, ctypes.byref(candidates))
    # XTC moves the beginning; top-n-sigma leaves what it forbids, with no chance
    first = (ctypes.addressof(candidates.data.contents) - tokens.ctypes.data) // TOKEN.itemsize
    left = tokens[first : first + candidates.size]
    left = left[left["logit"] > -np.inf]
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
        **_typical_or_sigma(choose),
        xtc_probability=float(choose.choice([0.0, 1.0])),
        xtc_threshold=float(choose.choice([0.02, 0.1, 0.3])),
        dynatemp_range=float(choose.choice([0.0, 0.4, 2.0])),
        dynatemp_exponent=float(choose.choice([1.0, 2.0])),
    )
    ids, kept = _truncated(logits, float(logits.max()), sampling)
    if sampling.xtc_probability and (left := without_top_choices(kept, sampling.xtc_threshold)) is not None:
        ids, kept = (left if ids is None else ids[left]), kept[left]
    ours = range(n_vocab) if ids is None else ids.tolist()
    theirs = llamas(logits, sampling)
    assert set(ours) == set(theirs)
    if len(theirs) == 1:  # whatever its logit is
        return
    temperature = np.float32(_temperature(kept, sampling))
    np.testing.assert_allclose(kept / temperature, [theirs[token] for token in ours], rtol=2e-4)


def _typical_or_sigma(choose: np.random.Generator) -> dict[str, float]:
    """One of both: llama.cpp computes an entropy that is no number once top-n-sigma has forbidden something."""
    if choose.random() < 0.5:
        return {"typical_p": float(choose.choice([1.0, 0.9, 0.5]))}
    return {"top_n_sigma": float(choose.choice([0.0, 1.0, 2.5]))}


@pytest.mark.models
@pytest.mark.parametrize("seed", range(30))
def test_repetitions_lose_what_llama_cpp_takes(seed: int, real_model: Any) -> None:
    """DRY with a line break as the only breaker, over histories of few distinct tokens."""
    choose = np.random.default_rng(seed)
    model = _vocabulary(str(real_model("smollm2-135m-instruct")))
    vocab = llama_cpp.llama_model_get_vocab(model)
    n_vocab, newline = llama_cpp.llama_vocab_n_tokens(vocab), 198
    history = choose.choice([newline, 300, 301, 302, 303][int(choose.random() < 0.5) :], 60).tolist()
    multiplier, base, allowed = float(choose.choice([0.5, 1.0])), float(choose.choice([1.2, 1.75])), 2
    last_n = int(choose.choice([20, 60]))
    breakers = (ctypes.c_char_p * 1)(b"\n")
    dry = llama_cpp.llama_sampler_init_dry(vocab, multiplier, base, allowed, last_n, breakers, 1)
    for token in history:
        llama_cpp.llama_sampler_accept(dry, token)
    tokens = np.zeros(n_vocab, dtype=TOKEN)
    tokens["id"] = np.arange(n_vocab)
    pointer = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token_data))
    candidates = llama_cpp.llama_token_data_array(data=pointer, size=n_vocab, selected=-1, sorted=False)
    llama_cpp.llama_sampler_apply(dry, ctypes.byref(candidates))
    llama_cpp.llama_sampler_free(dry)
    theirs = {int(one["id"]): float(-one["logit"]) for one in tokens if one["logit"]}
    seen = history if last_n < 0 else history[-last_n:]
    ours = dry_penalties(seen, multiplier, base, allowed, {newline})
    assert ours.keys() == theirs.keys()
    for token, penalty in ours.items():
        assert penalty == pytest.approx(theirs[token], rel=1e-4)


@cache
def _vocabulary(path: str) -> Any:
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    return llama_cpp.llama_model_load_from_file(path.encode(), params)
