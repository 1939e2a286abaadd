"""Sampling: each step against a plain version of itself, the draw against its distribution, errors, limits."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgelm.engine.sampling import BadLogits, Sampling, _truncated, make_sampler
from edgelm.errors import ConfigError

OFF: dict[str, Any] = {"top_k": 0, "top_p": 1.0, "min_p": 0.0}


def row(n_vocab: int, seed: int = 0, scale: float = 3.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(n_vocab) * scale).astype(np.float32)


def plain_truncation(logits: np.ndarray, sampling: Sampling) -> set[int]:
    """The chain as its steps are defined, on sorted lists and in double precision."""
    kept = sorted(range(len(logits)), key=lambda i: (-logits[i], i))
    if sampling.top_k:
        kept = kept[: sampling.top_k]
    if sampling.typical_p < 1:
        p = softmax(logits[kept])
        surprise = np.abs(-np.log(p) + np.sum(p * np.log(p)))
        order = np.argsort(surprise, kind="stable")
        n_kept = int(np.searchsorted(np.cumsum(p[order]), sampling.typical_p, side="right")) + 1
        kept = sorted((kept[i] for i in order[:n_kept]), key=lambda i: (-logits[i], i))
    if sampling.top_p < 1:
        n_kept = int(np.searchsorted(np.cumsum(softmax(logits[kept])), sampling.top_p, side="left")) + 1
        kept = kept[:n_kept]
    if sampling.min_p > 0:
        p = softmax(logits[kept])
        kept = [i for i, chance in zip(kept, p, strict=True) if chance >= sampling.min_p * p[0]]
    return set(kept)


def softmax(logits: np.ndarray) -> np.ndarray:
    weights: np.ndarray = np.exp(logits.astype(np.float64) - logits.max())
    weights /= weights.sum()
    return weights


def survivors(logits: np.ndarray, sampling: Sampling) -> set[int]:
    ids, kept = _truncated(logits, float(logits.max()), sampling)
    found = set(range(len(logits))) if ids is None else set(ids.tolist())
    assert len(found) == len(kept)
    return found


@pytest.mark.parametrize("n_vocab", [5, 600, 5000, 40_000])
@pytest.mark.parametrize(
    "options",
    [
        {}, OFF, OFF | {"top_k": 1}, OFF | {"top_k": 40}, OFF | {"top_k": 3000}, OFF | {"top_p": 0.0},
        OFF | {"top_p": 0.5}, OFF | {"top_p": 0.99}, OFF | {"min_p": 0.05}, OFF | {"min_p": 1.0},
        OFF | {"typical_p": 0.5}, OFF | {"typical_p": 0.9, "top_k": 100}, {"typical_p": 0.7, "top_p": 0.8},
        {"top_k": 0, "top_p": 0.9, "min_p": 0.01},
    ],
)  # fmt: skip
def test_each_step_keeps_what_its_definition_keeps(n_vocab: int, options: dict[str, Any]) -> None:
    logits = row(n_vocab, seed=n_vocab)
    sampling = Sampling(temperature=1.0, **options)
    assert survivors(logits, sampling) == plain_truncation(logits, sampling)


@settings(max_examples=60, deadline=None)
@given(
    logits=st.lists(st.integers(-40, 40), min_size=1, max_size=60),
    top_k=st.integers(0, 70),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
)
def test_any_row_with_ties_leaves_the_best_and_no_more_than_asked(
    logits: list[int], top_k: int, top_p: float, min_p: float
) -> None:
    values = np.array(logits, dtype=np.float32) / 8
    kept = survivors(values, Sampling(temperature=1, top_k=top_k, top_p=top_p, min_p=min_p))
    assert kept
    assert values[list(kept)].max() == values.max()
    assert len(kept) <= (top_k or len(logits))
    outside = [value for token, value in enumerate(values) if token not in kept]
    assert not outside or max(outside) <= values[list(kept)].min()


def test_greedy_is_the_default_and_takes_the_first_of_equals() -> None:
    logits = np.array([0, 5, 1, 5], dtype=np.float32)
    assert make_sampler()(logits, []) == 1


def test_the_same_seed_gives_the_same_tokens_and_another_gives_others() -> None:
    def tokens(seed: int | None) -> list[int]:
        sample = make_sampler(Sampling(temperature=1.0, seed=seed, **OFF))
        return [sample(row(2000, seed=step), []) for step in range(20)]

    assert tokens(5) == tokens(5)
    assert tokens(5) != tokens(6)
    assert tokens(None) != tokens(None)


@pytest.mark.parametrize("n_vocab", [7, 513, 3000])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(n_vocab: int, temperature: float) -> None:
    logits, n_draws = row(n_vocab, scale=1.5), 10_000
    sample = make_sampler(Sampling(temperature=temperature, seed=3, **OFF))
    counts = np.bincount([sample(logits, []) for _ in range(n_draws)], minlength=n_vocab)
    expected = softmax(logits / temperature) * n_draws
    likely = expected >= 10
    chi2 = np.sum((counts - expected)[likely] ** 2 / expected[likely])
    freedom = int(likely.sum())
    assert chi2 < freedom + 5 * math.sqrt(2 * freedom)
    assert abs(counts[~likely].sum() - expected[~likely].sum()) < 5 * math.sqrt(expected[~likely].sum() + 1)


def test_truncated_draws_follow_what_is_left_in_proportion() -> None:
    logits = np.log(np.array([0.5, 0.3, 0.15, 0.05], dtype=np.float32))
    sample = make_sampler(Sampling(temperature=1.0, top_k=2, top_p=1, min_p=0, seed=1))
    counts = np.bincount([sample(logits, []) for _ in range(8000)], minlength=4)
    assert counts[2:].sum() == 0
    assert counts[0] / 8000 == pytest.approx(0.625, abs=0.025)


def test_penalties_are_llama_cpps() -> None:
    logits = np.array([2.0, -2.0, 3.0, 4.0], dtype=np.float32)
    sampling = Sampling(
        repeat_penalty=2.0, presence_penalty=0.25, frequency_penalty=0.5, penalty_last_n=4, logit_bias={2: 0.5}
    )
    make_sampler(sampling)(logits, [3, 3, 0, 1, 0, 0])
    np.testing.assert_allclose(logits, [2 / 2 - 0.25 - 1.5, -4 - 0.25 - 0.5, 3.5, 4.0])


@pytest.mark.parametrize(("last_n", "expected"), [(0, 2), (1, 2), (2, 1), (3, 0), (-1, 0), (100, 0)])
def test_penalties_look_back_as_far_as_they_are_told(last_n: int, expected: int) -> None:
    sample = make_sampler(Sampling(presence_penalty=10, penalty_last_n=last_n))
    logits = np.array([1, 2, 3, -99], dtype=np.float32)
    assert sample(logits, [1, 2, 3]) == expected


def test_a_read_only_row_is_not_written_to() -> None:
    logits = np.array([1, 2], dtype=np.float32)
    logits.flags.writeable = False
    assert make_sampler(Sampling(logit_bias={0: 5}))(logits, []) == 0
    assert logits[0] == 1


def test_a_bias_can_forbid_and_force() -> None:
    logits = row(100)
    best = int(logits.argmax())
    assert make_sampler(Sampling(logit_bias={best: -math.inf}))(logits.copy(), []) != best
    assert make_sampler(Sampling(temperature=1, logit_bias={3: 1000.0}))(logits.copy(), []) == 3
    with pytest.raises(ConfigError, match="token 100, but the vocabulary ends at 99"):
        make_sampler(Sampling(logit_bias={100: 1}))(logits, [])


def test_processors_run_in_order_after_the_penalties() -> None:
    seen: list[tuple[list[int], float]] = []

    def forbid(history: Sequence[int], logits: np.ndarray) -> np.ndarray:
        seen.append((list(history), float(logits[1])))
        logits[2] = -np.inf
        return logits

    def double(history: Sequence[int], logits: np.ndarray) -> np.ndarray:
        return logits * np.float32(2)

    for temperature in (0.0, 0.01):
        sample = make_sampler(Sampling(temperature=temperature, presence_penalty=1, seed=0), [forbid, double])
        assert sample(np.array([1, 1.5, 9], dtype=np.float32), [1]) == 0
    assert seen == [([1], 0.5)] * 2
    with pytest.raises(ConfigError, match=r"shape \(3,\)"):
        make_sampler(processors=[lambda _, logits: logits[:2]])(np.zeros(3, dtype=np.float32), [])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bad_logits_are_typed_errors(temperature: float) -> None:
    sample = make_sampler(Sampling(temperature=temperature, **OFF))
    logits = row(1000)
    logits[700] = np.nan
    with pytest.raises(BadLogits, match="NaN"):
        sample(logits, [])
    with pytest.raises(BadLogits, match="every token is forbidden"):
        sample(np.full(1000, -np.inf, dtype=np.float32), [])


def test_an_infinite_logit_wins_greedily_and_cannot_be_drawn() -> None:
    logits = np.array([0, np.inf], dtype=np.float32)
    assert make_sampler()(logits, []) == 1
    with pytest.raises(BadLogits, match="infinite"):
        make_sampler(Sampling(temperature=1))(logits, [])


@pytest.mark.parametrize("options", [{}, OFF, OFF | {"typical_p": 0.5}, OFF | {"top_p": 0.9}, OFF | {"top_k": 5}])
def test_forbidden_tokens_are_never_drawn(options: dict[str, Any]) -> None:
    sample = make_sampler(Sampling(temperature=2.0, seed=0, **options))
    logits = np.full(2000, -np.inf, dtype=np.float32)
    logits[[3, 1999]] = 0
    assert {sample(logits, []) for _ in range(50)} == {3, 1999}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature must be between 0 and .*, got -0.1"),
        ({"temperature": math.nan}, "temperature must be a finite number"),
        ({"temperature": "hot"}, "temperature must be a finite number, got 'hot'"),
        ({"top_p": 1.01}, "top_p must be between 0 and 1"),
        ({"min_p": -1}, "min_p must be between"),
        ({"typical_p": 2}, "typical_p must be between"),
        ({"top_k": -1}, "top_k must be a whole number of 0 or more"),
        ({"top_k": 1.5}, "top_k must be a whole number"),
        ({"repeat_penalty": 0}, "repeat_penalty must be between 1e-09 and"),
        ({"penalty_last_n": -2}, "penalty_last_n must be a whole number of -1 or more"),
        ({"presence_penalty": math.inf}, "presence_penalty must be a finite"),
        ({"seed": -1}, "seed must be a whole number of 0 or more"),
        ({"logit_bias": {-1: 1.0}}, "a token id in logit_bias"),
        ({"logit_bias": {1: math.nan}}, "logit_bias of token 1 must be a finite number"),
        ({"logit_bias": {1: 1e10}}, "logit_bias of token 1 must be between"),
        ({"temperature": 10**400}, "temperature must be between"),
    ],
)
def test_values_that_cannot_work_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**options)


ANY_NUMBER = st.sampled_from([0.0, 5e-324, 1e-46, 1e-40, 1e-9, 1e-3, 0.5, 1.0, 1.5, 2.0, 100.0, 1e9])
UNIT = st.sampled_from([0.0, 5e-324, 1e-46, 1e-9, 0.1, 0.5, 1.0])


@settings(max_examples=300, deadline=None)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(["temperature", "dry_multiplier", "top_n_sigma", "dynatemp_range"], ANY_NUMBER),
            **dict.fromkeys(["presence_penalty", "frequency_penalty", "mirostat_tau"], ANY_NUMBER),
            **dict.fromkeys(["top_p", "min_p", "typical_p"], UNIT),
            **dict.fromkeys(["xtc_probability", "xtc_threshold", "mirostat_eta"], UNIT),
            "repeat_penalty": ANY_NUMBER.filter(lambda value: value >= 1e-9),
            "dry_base": ANY_NUMBER.filter(lambda value: value >= 1),
            "dynatemp_exponent": ANY_NUMBER,
            "logit_bias": st.dictionaries(st.integers(0, 199), st.sampled_from([-math.inf, -1e9, 1e9]), max_size=3),
        },
    )
)
def test_every_value_that_is_accepted_can_be_computed_with(options: dict[str, Any]) -> None:
    sample = make_sampler(Sampling(**options, seed=0))
    history = [1, 2, 3, 1, 2, 3, 1, 2]
    for seed in range(3):  # a warning of NumPy, an overflow say, fails a test
        history.append(sample(row(200, seed), history))
    assert all(0 <= token < 200 for token in history)


def test_a_tiny_temperature_takes_the_likeliest_token() -> None:
    logits = row(200)
    assert make_sampler(Sampling(temperature=1e-300, seed=0))(logits.copy(), []) == logits.argmax()


def test_options_cannot_be_changed_from_outside() -> None:
    bias = {1: 1.0}
    sampling = Sampling(logit_bias=bias)
    bias[1] = 9.0
    assert sampling.logit_bias == {1: 1.0}
    assert hash(sampling) == hash(Sampling(logit_bias={2: 3.0}))
    assert sampling != Sampling(logit_bias={2: 3.0})


@pytest.mark.parametrize(("options", "limit"), [({}, 400_000), (OFF, 1_300_000), ({"top_k": 0}, 1_300_000)])
def test_a_large_vocabulary_needs_little_memory(options: dict[str, Any], limit: int) -> None:
    logits = row(262_144)
    sample = make_sampler(Sampling(temperature=0.8, repeat_penalty=1.1, seed=0, **options))
    sample(logits, [1, 2, 3])
    tracemalloc.start()
    try:
        sample(logits, [1, 2, 3])
        assert tracemalloc.get_traced_memory()[1] < limit
    finally:
        tracemalloc.stop()
