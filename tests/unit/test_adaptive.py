"""The monitor of an adaptive model, with doubles for the model and the system; and the door to it."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import edgelm
from edgelm import adaptive
from edgelm.adaptive import Monitor
from edgelm.errors import BudgetTooSmall, ConfigError
from edgelm.memory.platform.base import Pressure
from edgelm.sizes import GB, MB
from edgelm.testing import tiny_model

ASKED, FLOOR = 300 * MB, 100 * MB
SHORT, CALM = Pressure(GB, 0), Pressure(GB, GB)


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "SAMPLE_S", 0.001)


class System:
    """What the monitor uses of a platform."""

    def __init__(self) -> None:
        self.now, self.n_asked, self.fails = CALM, 0, False

    def pressure(self) -> Pressure:
        self.n_asked += 1
        if self.fails:
            raise OSError("no such file")
        return self.now


class Plans:
    """What the monitor uses of a model."""

    def __init__(self) -> None:
        self.asked_bytes, self.floor, self.fails = ASKED, FLOOR, False
        self.plan = SimpleNamespace(budget_bytes=ASKED, planned_bytes=ASKED)

    def adapt_budget(self, budget_bytes: int) -> Any:
        if self.fails:
            raise ConfigError("the model is closed; load it again")
        if budget_bytes < self.floor:
            raise BudgetTooSmall(budget_bytes, self.floor, [])
        self.plan = SimpleNamespace(budget_bytes=budget_bytes, planned_bytes=budget_bytes)
        return self.plan


class Watched:
    def __init__(self, now: Pressure = CALM) -> None:
        self.model, self.system, self.said = Plans(), System(), list[str]()
        self.system.now = now
        self.monitor = Monitor(self.model, self.said.append, self.system)  # type: ignore[arg-type]
        self.monitor.start()

    @property
    def alive(self) -> bool:
        return self.monitor._thread.is_alive()


@pytest.fixture
def watched() -> Iterator[Watched]:
    one = Watched()
    yield one
    one.monitor.stop()
    assert not one.alive


def wait_for(what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_it_gives_back_takes_again_and_says_so() -> None:
    watched = Watched(SHORT)  # from the first sample on: a fall since the one before would be taken for a trend
    wait_for(lambda: watched.model.plan.budget_bytes == FLOOR)
    watched.system.now = CALM
    wait_for(lambda: watched.model.plan.budget_bytes == ASKED)
    watched.monitor.stop()
    assert watched.said[0] == "memory is short: budget 300 MB -> 204 MB"
    assert watched.said[-1] == "memory is free again: budget 250 MB -> 300 MB"
    assert len(watched.said) == 7


def test_another_budget_of_the_user_is_the_new_bound(watched: Watched) -> None:
    watched.model.asked_bytes = 150 * MB
    watched.model.adapt_budget(150 * MB)
    watched.system.now = SHORT
    wait_for(lambda: watched.model.plan.budget_bytes == FLOOR)
    watched.system.now = CALM
    wait_for(lambda: watched.model.plan.budget_bytes == 150 * MB)
    before = watched.system.n_asked
    wait_for(lambda: watched.system.n_asked > before + 30)
    assert watched.model.plan.budget_bytes == 150 * MB


def test_a_floor_that_has_risen_is_learned(watched: Watched) -> None:
    wait_for(lambda: watched.system.n_asked)
    watched.model.floor = FLOOR + 7 * MB
    watched.system.now = SHORT
    wait_for(lambda: watched.model.plan.budget_bytes == FLOOR + 7 * MB)
    assert watched.alive


def test_a_system_that_cannot_be_asked_ends_it_with_a_sentence(watched: Watched) -> None:
    watched.system.fails = True
    wait_for(lambda: not watched.alive)
    assert watched.said == ["the budget is no longer adapted: no such file"]


def test_a_model_that_fails_ends_it_with_a_sentence(watched: Watched) -> None:
    wait_for(lambda: watched.system.n_asked)
    watched.model.fails, watched.system.now = True, SHORT
    wait_for(lambda: not watched.alive)
    assert watched.said == ["the budget is no longer adapted: the model is closed; load it again"]


def test_a_listener_that_fails_is_shown_and_changes_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    model, system = Plans(), System()

    def listen(sentence: str) -> None:
        raise RuntimeError(f"mine, not yours: {sentence}")

    monitor = Monitor(model, listen, system)  # type: ignore[arg-type]
    monitor.start()
    system.now = SHORT
    wait_for(lambda: model.plan.budget_bytes == FLOOR)
    monitor.stop()
    assert "RuntimeError: mine, not yours: memory is short" in capfd.readouterr().err


def test_a_listener_may_stop_it() -> None:
    model, system = Plans(), System()
    monitor = Monitor(model, lambda _: monitor.stop(), system)  # type: ignore[arg-type]
    monitor.start()
    system.now = SHORT
    wait_for(lambda: not monitor._thread.is_alive())
    assert model.plan.budget_bytes == 204 * MB


def test_a_model_that_is_dropped_ends_it() -> None:
    model, system = Plans(), System()
    monitor = Monitor(model, None, system)  # type: ignore[arg-type]
    monitor.start()
    wait_for(lambda: system.n_asked > 3)
    del model
    gc.collect()
    wait_for(lambda: not monitor._thread.is_alive())


# --- the public door


def names() -> list[str]:
    return [thread.name for thread in threading.enumerate()]


def test_an_adaptive_model_adapts_within_what_was_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system, said = System(), list[str]()
    monkeypatch.setattr(adaptive, "current_platform", lambda: system)
    path = tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=384)
    with edgelm.load(path, memory="900MB", backend="numpy", context=64, adaptive=said.append) as model:
        expected = model.generate("once upon", max_tokens=12, ignore_eos=True)
        system.now = SHORT
        wait_for(lambda: len(said) > 0)
        assert model.generate("once upon", max_tokens=12, ignore_eos=True) == expected
        assert model.plan.budget_bytes < 900 * MB == model.asked_bytes
        model.set_budget("800MB")
        assert model.asked_bytes == 800 * MB
        assert model.adapt_budget(GB).budget_bytes == 800 * MB
        assert "edgelm-adaptive" in names()
    assert "edgelm-adaptive" not in names()
    assert said[0].startswith("memory is short: budget 900 MB -> ")


def test_a_model_is_not_adaptive_unless_asked(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "tiny.gguf", "llama", n_vocab=384)
    with edgelm.load(path, memory="900MB", backend="numpy", context=64):
        assert "edgelm-adaptive" not in names()
