"""The asyncio example: answers side by side, timeouts and cancelling that stop one answer, a loop that is on time."""

from __future__ import annotations

import asyncio
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import edgelm
from edgelm_examples import asyncio_app

Load = Callable[..., edgelm.Model]


def test_two_questions_are_answered_beside_other_work(slow: Path, loads: Load) -> None:
    async def scene() -> tuple[dict[str, asyncio_app.Answer], float]:
        stop, found = asyncio.Event(), dict[str, asyncio_app.Answer]()
        beats = asyncio.create_task(asyncio_app.longest_gap(stop))

        async def done(question: str, answer: asyncio_app.Answer) -> None:
            found[question] = answer

        await asyncio_app.answer_all(model, ["the cat", "the dog " * 60], 60, 24, done)
        stop.set()
        return found, await beats

    with loads(slow, memory="2GB", context=512) as model:
        began = time.perf_counter()
        found, worst_s = asyncio.run(scene())
        took_s = time.perf_counter() - began
        assert found["the cat"] == asyncio_app.Answer(model.chat().send("the cat", max_tokens=24), "length")
        assert [answer.ended for answer in found.values()] == ["length", "length"]
    assert worst_s < max(0.5, took_s / 4)


def test_a_timeout_ends_its_answer_and_no_other(slow: Path, loads: Load) -> None:
    async def scene() -> list[asyncio_app.Answer]:
        asked = (
            asyncio_app.answer(model, "the cat", 1.0, 10_000),
            asyncio_app.answer(model, "the dog", 0.2, 10_000),  # most likely, it still waits for the first one
            asyncio_app.answer(model, "a bird", 60, 6),
        )
        return await asyncio.gather(*asked)

    with loads(slow, memory="2GB", context=2048) as model:
        first, second, third = asyncio.run(scene())
    assert (first.ended, bool(first.text)) == ("timeout", True)
    assert second.ended == "timeout"
    assert third.ended == "length"


def test_cancelling_a_task_frees_the_model_for_the_next(slow: Path, loads: Load) -> None:
    async def scene() -> asyncio_app.Answer:
        task = asyncio.create_task(asyncio_app.answer(model, "the cat " * 200, 60, 10_000))
        await asyncio.sleep(0.2)  # somewhere in the reading of the question
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await asyncio_app.answer(model, "the dog", 60, 4)

    with loads(slow, memory="2GB", context=2048) as model:
        assert asyncio.run(scene()).ended == "length"


def test_a_question_that_fails_is_an_answer(tiny: Path, loads: Load) -> None:
    with loads(tiny, memory="2GB", context=64) as model:
        found = asyncio.run(asyncio_app.answer(model, "the cat " * 100, 60, 4))
    assert (found.text, "the context holds 64" in found.ended) == ("", True)


def test_as_its_reader_starts_it(tiny: Path, example: Callable[..., subprocess.Popen[str]]) -> None:
    child = example("asyncio_app", tiny, "the cat", "the dog", "--memory", "300MB", "--context", 256, "--max-tokens", 5)
    said, told = child.communicate(timeout=60)
    assert child.returncode == 0, told
    assert sorted(line for line in said.splitlines() if line.startswith("> ")) == ["> the cat", "> the dog"]
    assert "the loop was never more than" in told
    wrong = example("asyncio_app", tiny.with_name("nothing.gguf"), "the cat")
    said, told = wrong.communicate(timeout=60)
    assert (wrong.returncode, said, len(told.splitlines())) == (3, "", 1)
