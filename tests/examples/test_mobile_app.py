"""The demo for phones on Toga's dummy backend: all but the drawing, which needs a phone or a desktop's toolkit."""

from __future__ import annotations

import asyncio
import shutil
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edgelm

MOBILE = Path(__file__).resolve().parents[2] / "apps/mobile"
sys.path.append(str(MOBILE / "src"))
Load = Callable[..., edgelm.Model]


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch, loads: Load, tmp_path: Path) -> Iterator[Any]:
    monkeypatch.setenv("TOGA_BACKEND", "toga_dummy")
    pytest.importorskip("toga_dummy", reason="Toga's dummy backend is not installed: pip install '.[test]'")
    from edgelm_mobile.app import Demo, main

    monkeypatch.setattr(Demo, "model_path", lambda _self: tmp_path / "model.gguf")
    monkeypatch.setattr("edgelm_mobile.app.MEMORY", "2GB")  # the tests' own process is larger than an application
    app = main()
    yield app
    app.request_exit()
    run_until(app, lambda: app.model is None)
    app.loop.close()


def run_until(app: Any, what: Callable[[], bool]) -> None:
    async def wait() -> None:
        async with asyncio.timeout(40):
            while not what():
                await asyncio.sleep(0.005)

    app.loop.run_until_complete(wait())


def test_a_question_is_answered_and_the_next_one_stopped(demo: Any, slow: Path, tmp_path: Path) -> None:
    shutil.copy(slow, tmp_path / "model.gguf")
    run_until(demo, lambda: demo.button.enabled)
    assert demo.status.text == "numpy, 2000 MB"
    demo.chat._model.tokenizer.eos_ids = frozenset()
    demo.entry.value = "the cat"
    demo.button._impl.simulate_press()
    run_until(demo, lambda: len(demo.talk.value) > 30)
    assert demo.talk.value.startswith("> the cat\n")
    assert demo.button.text == "Stop"
    demo.button._impl.simulate_press()
    run_until(demo, lambda: demo.button.text == "Send")
    assert demo.status.text == "stopped"
    assert demo.answering is None


def test_a_model_that_is_not_there_is_a_sentence(demo: Any) -> None:
    run_until(demo, lambda: "loading" not in demo.status.text)
    assert "model.gguf" in demo.status.text
    assert not demo.button.enabled


def test_briefcase_finds_what_it_builds() -> None:
    """Sources and requirements of the project file are there; building itself needs SDKs, see docs/embedding.md."""
    project = tomllib.loads((MOBILE / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["briefcase"]
    (app,) = project["app"].values()
    assert all((MOBILE / source / "__main__.py").exists() for source in app["sources"])
    assert (MOBILE / app["requires"][0] / "pyproject.toml").exists()
    assert {"android", "iOS", "linux", "macOS", "windows"} <= set(app)
