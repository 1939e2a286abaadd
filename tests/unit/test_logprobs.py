"""Log-probabilities of what is drawn and of what is given agree with each other and with a recomputation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgelm
from edgelm import opening
from edgelm.engine.sampling_steps import (
    Mirostat,
    dry_penalties,
    dynamic_temperature,
    within_sigma,
    without_top_choices,
)
from edgelm.errors import ConfigError, ContextOverflow
from edgelm.memory.predict import Rates
from edgelm.sizes import GB
from edgelm.testing import tiny_model
from edgelm.testing.evaluate import evaluate

IDS = [1, *np.random.default_rng(2).integers(3, 250, 30).tolist()]


@pytest.fixture(autouse=True)
def _measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "measured_rates", lambda *_, **__: Rates(1e9, 1e9, wide_bytes_per_s=1e12))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", "llama", n_vocab=384)


@pytest.fixture
def model(path: Path) -> Iterator[edgelm.Model]:
    with edgelm.load(path, memory=GB, backend="numpy", threads=1, context=128) as model:
        yield model


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(axis=-1, keepdims=True)
    return np.asarray(wide - np.log(np.exp(wide).sum(axis=-1, keepdims=True)))


def test_scores_agree_with_the_reference(model: edgelm.Model, path: Path) -> None:
    expected = log_softmax(evaluate(path, IDS))
    score = model.score_ids(IDS, 5)
    assert score.token_ids == tuple(IDS[5:])
    found = [expected[i - 1, IDS[i]] for i in range(5, len(IDS))]
    np.testing.assert_allclose(score.logprobs, found, atol=2e-3)
    assert score.perplexity == pytest.approx(np.exp(-np.mean(found)), rel=1e-2)


def test_scoring_reuses_what_is_stored_and_leaves_the_model_usable(model: edgelm.Model) -> None:
    whole = model.score_ids(IDS).logprobs
    np.testing.assert_allclose(model.score_ids(IDS, 20).logprobs, whole[19:], atol=2e-3)
    assert len(model.generate("the cat", max_tokens=4)) > 0
    np.testing.assert_allclose(model.score_ids(IDS).logprobs, whole, atol=2e-3)


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0, "seed": 4, "repeat_penalty": 1.3}, {"speculate": False}])
def test_chunks_carry_the_models_own_distribution(model: edgelm.Model, options: dict[str, Any]) -> None:
    chunks = list(model.stream_ids(IDS[:8], max_tokens=20, ignore_eos=True, logprobs=5, **options))
    drawn = [chunk.token_id for chunk in chunks if chunk.token_id is not None]
    score = model.score_ids([*IDS[:8], *drawn], 8)
    for chunk, expected in zip(chunks, score.logprobs, strict=False):
        assert chunk.logprobs is not None
        assert chunk.logprobs.logprob == pytest.approx(expected, abs=2e-3)
        assert len(chunk.logprobs.top) == 5
        values = [value for _, value in chunk.logprobs.top]
        assert values == sorted(values, reverse=True)
        assert chunk.logprobs.logprob <= values[0] + 1e-6
    assert chunks[-1].logprobs is None
    if "temperature" not in options:
        assert all(chunk.logprobs and chunk.logprobs.top[0][0] == chunk.token_id for chunk in chunks[:-1])


def test_what_cannot_be_scored_is_a_sentence(model: edgelm.Model) -> None:
    with pytest.raises(ContextOverflow) as caught:
        model.score_ids(IDS * 5)
    assert (caught.value.n_prompt_tokens, caught.value.n_context) == (155, 128)
    with pytest.raises(ConfigError, match="give at least one before"):
        model.score_ids([5])
    with pytest.raises(ConfigError, match="between 0 and 20"):
        list(model.stream("x", logprobs=21))
    assert model.score("the cat", " sat").total < 0


# --- steps


def test_a_repetition_costs_more_the_longer_it_is() -> None:
    history = [1, 2, 3, 4, 9, 1, 2, 3]
    assert dry_penalties(history, 1.0, 2.0, 2, ()) == {4: 2.0}
    assert dry_penalties(history, 1.0, 2.0, 3, ()) == {4: 1.0}
    assert dry_penalties(history, 1.0, 2.0, 4, ()) == {}
    assert dry_penalties(history, 1.0, 2.0, 2, {2}) == {}
    assert dry_penalties(history, 1.0, 2.0, 2, {4}) == {}
    assert dry_penalties([7] * 5, 1.0, 2.0, 2, ()) == {7: 4.0}
    assert dry_penalties([], 1.0, 2.0, 2, ()) == dry_penalties([3], 1.0, 2.0, 1, ()) == {}


def test_truncations_keep_what_their_papers_say() -> None:
    logits = np.array([5.0, 4.9, 0.0, -1.0, -np.inf], np.float32)
    assert within_sigma(logits, 1.0).tolist() == [0, 1]
    assert without_top_choices(logits, 0.3).tolist() == [1, 2, 3, 4]  # type: ignore[union-attr]
    assert without_top_choices(logits, 0.6) is None


def test_the_temperature_follows_the_entropy() -> None:
    flat, sharp = np.zeros(10, np.float32), np.array([50.0] + [0.0] * 9, np.float32)
    assert dynamic_temperature(flat, 1.0, 0.5, 1.0) == pytest.approx(1.5)
    assert dynamic_temperature(sharp, 1.0, 0.5, 1.0) == pytest.approx(0.5, abs=1e-6)
    assert dynamic_temperature(flat[:1], 0.7, 0.5, 1.0) == 0.7


def test_mirostat_keeps_the_surprise_it_was_asked_for() -> None:
    rng = np.random.default_rng(0)
    logits = (rng.standard_normal(2000) * 2).astype(np.float32)
    probabilities = np.exp(log_softmax(logits))
    surprises = {}
    for tau in (2.0, 5.0):
        mirostat = Mirostat(tau, 0.1)
        drawn = [mirostat.draw(logits, float(rng.random())) for _ in range(800)]
        surprises[tau] = float(-np.log2(probabilities[drawn[200:]]).mean())
    assert surprises[2.0] < surprises[5.0]
    assert surprises[5.0] == pytest.approx(5.0, abs=1.5)


def test_every_step_can_be_asked_for(model: edgelm.Model) -> None:
    for options in (
        {"dry_multiplier": 0.8},
        {"top_n_sigma": 1.5},
        {"xtc_probability": 1.0, "xtc_threshold": 0.05},
        {"dynatemp_range": 0.5},
        {"mirostat_tau": 4.0},
    ):
        first, second = (
            list(model.stream("the cat", max_tokens=12, temperature=0.9, seed=1, ignore_eos=True, **options))
            for _ in range(2)
        )
        assert [chunk.token_id for chunk in first] == [chunk.token_id for chunk in second]
    with pytest.raises(ConfigError, match="xtc_probability must be between 0 and 1"):
        model.generate("x", xtc_probability=2.0)
