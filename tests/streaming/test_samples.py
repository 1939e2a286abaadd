"""Answers side by side: the prompt once, the weights once for all, and each answer what it would be alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engines import need

import edgelm
from edgelm import opening
from edgelm.errors import ConfigError, ContextOverflow
from edgelm.memory.predict import Rates
from edgelm.sizes import GB
from edgelm.testing import tiny_model

IDS = np.random.default_rng(6).integers(3, 250, 40).tolist()
N = 4


@pytest.fixture(autouse=True)
def _measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opening, "measured_rates", lambda *_, **__: Rates(1e9, 1e9))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: tiny_model(folder / f"{name}.gguf", name, n_vocab=384) for name in ("llama", "gemma3")}


def load(path: Path, **options: Any) -> edgelm.Model:
    return edgelm.load(path, **{"memory": GB, "backend": "numpy", "threads": 1, "context": 256, **options})


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("options", [{"temperature": 0.9, "seed": 5}, {"temperature": 1.4, "seed": 8, "top_k": 0}])
def test_each_answer_is_what_it_would_be_alone(
    models: dict[str, Path], architecture: str, options: dict[str, Any]
) -> None:
    """With windows of sixteen that are crossed."""
    with load(models[architecture]) as model:
        found = model.samples_of(IDS, N, max_tokens=24, ignore_eos=True, **options)
        assert [one.mean_logprob for one in found] == sorted((one.mean_logprob for one in found), reverse=True)
        for one in found:
            assert one.seed is not None
            alone = options | {"seed": one.seed}
            chunks = list(model.stream_ids(IDS, max_tokens=24, ignore_eos=True, speculate=False, logprobs=0, **alone))
            assert one.token_ids == tuple(chunk.token_id for chunk in chunks[:-1])
            mean = np.mean([chunk.logprobs.logprob for chunk in chunks if chunk.logprobs])
            assert one.mean_logprob == pytest.approx(mean, abs=1e-2)
            assert one.finish_reason == "length"


@pytest.mark.parametrize("backend", ["llamacpp", "onnx", "mlx"])
def test_every_backend_keeps_answers_apart(models: dict[str, Path], backend: str) -> None:
    with load(models["llama"], backend=need(backend)) as model:
        found = model.samples_of(IDS, N, max_tokens=6, ignore_eos=True)
        assert len({one.token_ids for one in found}) == 1  # greedy: all the same
        expected = [chunk.token_id for chunk in model.stream_ids(IDS, max_tokens=6, ignore_eos=True, speculate=False)]
        assert list(found[0].token_ids[:3]) == expected[:3]


def test_the_prompt_is_computed_once_and_a_pass_serves_all(models: dict[str, Path]) -> None:
    with load(models["llama"]) as model:
        widths: list[int] = []
        run = model._engine._pass  # type: ignore[attr-defined]

        def counted(ids: Any, *args: Any, **rest: Any) -> None:
            widths.append(len(ids))
            run(ids, *args, **rest)

        model._engine._pass = counted  # type: ignore[attr-defined]
        model.samples_of(IDS, N, max_tokens=10, ignore_eos=True, temperature=1.0, seed=1)
        assert widths == [len(IDS), *[N] * 9]
        assert model._engine.n_past == len(IDS)
        widths.clear()
        model.samples_of(IDS, 2, max_tokens=3, ignore_eos=True)
        assert widths == [1, 2, 2]  # only the last token of the prompt, for its logits


def test_answers_end_by_themselves_and_stops_are_kept(models: dict[str, Path]) -> None:
    with load(models["llama"]) as model:
        greedy = [c.token_id for c in model.stream_ids(IDS, max_tokens=8, ignore_eos=True) if c.token_id is not None]
        model.tokenizer.eos_ids |= {greedy[4]}
        (one, other) = model.samples_of(IDS, 2, max_tokens=30)
        assert list(one.token_ids) == greedy[: greedy.index(greedy[4])]
        assert (one.finish_reason, other.finish_reason) == ("stop", "stop")
        text = model.chat().samples("the cat", 2, max_tokens=12)
        assert len(text) == 2


def test_what_there_is_no_room_for_is_a_sentence(models: dict[str, Path]) -> None:
    with load(models["llama"], context=64) as model:
        with pytest.raises(ConfigError, match="17 answers side by side are more than the 16"):
            model.samples_of(IDS, 17)
        with pytest.raises(ContextOverflow):
            model.samples_of(IDS * 2, 4)
        with pytest.raises(ConfigError, match="at least 1"):
            model.samples_of(IDS, 0)
        found = model.samples_of(IDS, 4, ignore_eos=True)
        assert sum(len(one.token_ids) for one in found) <= 64 - len(IDS) + 4
    with load(models["llama"], speculate=False) as model, pytest.raises(ConfigError, match="more than the 1"):
        model.samples_of(IDS, 2)
