"""The public model: cancelling, queues, asyncio."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from streams import PROMPT, eventually, in_thread, join, load, long, text, tokens

import edgelm
from edgelm import Chunk, Model
from edgelm.engine import generate


def test_cancel_from_another_thread_ends_a_stream(model: Model) -> None:
    chunks: list[Chunk] = []
    for chunk in long(model):
        chunks.append(chunk)
        if len(chunks) == 3:
            join(in_thread(model.cancel))
    assert chunks[-1].finish_reason == "cancelled"
    assert len(tokens(chunks)) == 3
    assert len(tokens(list(model.stream(PROMPT, max_tokens=5, ignore_eos=True)))) == 5


def test_a_stream_that_has_not_begun_is_cancelled_too(model: Model) -> None:
    stream = long(model)
    model.cancel()
    (chunk,) = stream
    assert (chunk.finish_reason, chunk.text, chunk.usage.cached_tokens) == ("cancelled", "", 0)
    assert list(long(model))[-1].finish_reason == "length"  # what is asked for later is not


def test_cancel_while_the_prompt_is_encoded(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    encode = model.tokenizer.encode

    def interrupted(*args: Any, **options: Any) -> Any:
        model.cancel()  # as a signal handler does
        return encode(*args, **options)

    monkeypatch.setattr(model.tokenizer, "encode", interrupted)
    (chunk,) = long(model)
    assert chunk.finish_reason == "cancelled"


def test_cancel_reaches_into_prefill(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    prefill = generate.Conversation.prefill

    def interrupted(self: generate.Conversation, *given: Any) -> int:
        join(in_thread(model.cancel))
        return prefill(self, *given)

    monkeypatch.setattr(generate.Conversation, "prefill", interrupted)
    (chunk,) = long(model)
    assert (chunk.finish_reason, chunk.usage.cached_tokens) == ("cancelled", 0)
    monkeypatch.undo()
    assert len(tokens(list(model.stream(PROMPT, max_tokens=5, ignore_eos=True)))) == 5


def test_cancelled_answers_leave_the_cache_sound(model_file: Path, model: Model) -> None:
    for n in (1, 4):
        stream = long(model)
        for _ in range(n):
            next(stream)
        model.cancel()
        list(stream)
    with load(model_file) as fresh:
        expected = tokens(list(fresh.stream(PROMPT + " and", max_tokens=10, ignore_eos=True)))
    assert tokens(list(model.stream(PROMPT + " and", max_tokens=10, ignore_eos=True))) == expected


def test_a_timeout_ends_a_stream_and_none_after_it(model: Model) -> None:
    chunks = []
    for chunk in long(model, timeout_s=0.05):
        chunks.append(chunk)
        time.sleep(0.02)
    assert chunks[-1].finish_reason == "timeout"
    assert 1 <= len(tokens(chunks)) < 20
    stream = model.stream(PROMPT, max_tokens=2, ignore_eos=True, timeout_s=0.1)
    assert list(stream)[-1].finish_reason == "length"
    slow = long(model)
    next(slow)
    time.sleep(0.15)  # the time of the stream before would be over now
    assert list(slow)[-1].finish_reason == "length"


# threads


def test_threads_queue_and_each_gets_its_own_answer(model_file: Path, model: Model) -> None:
    prompts = ["the", "a cat", "dog and"]
    with load(model_file) as fresh:
        expected = {prompt: fresh.generate(prompt, max_tokens=12, ignore_eos=True) for prompt in prompts}
    found: dict[str, str] = {}

    def ask(prompt: str) -> None:
        found[prompt] = model.generate(prompt, max_tokens=12, ignore_eos=True)

    threads = [in_thread(lambda prompt=prompt: ask(prompt)) for prompt in prompts]
    for thread in threads:
        join(thread)
    assert found == expected


def test_cancelling_stops_those_in_the_queue_at_once(model: Model) -> None:
    stream = long(model)
    next(stream)
    waiting: list[Chunk] = []
    thread = in_thread(lambda: waiting.extend(long(model)))
    eventually(lambda: model.turns._waiting)
    model.cancel()
    join(thread)  # although the first stream has not been read on
    assert [chunk.finish_reason for chunk in waiting] == ["cancelled"]
    assert next(stream).finish_reason == "cancelled"


def test_a_second_stream_in_the_same_thread_is_a_mistake_not_a_deadlock(model: Model) -> None:
    stream = long(model)
    next(stream)
    with pytest.raises(edgelm.ConfigError, match="this thread is still reading"):
        next(long(model))
    assert next(stream).token_id is not None
    stream.close()
    assert len(tokens(list(long(model)))) == 100


def test_a_stream_left_halfway_frees_the_model(model: Model) -> None:
    for _ in range(3):
        for chunk in long(model):
            if chunk.usage.completion_tokens == 2:
                break
        del chunk
        gc.collect()
    thread = in_thread(lambda: list(model.stream("a", max_tokens=2)))
    join(thread)


# asyncio


def test_astream_gives_what_stream_gives(model: Model) -> None:
    async def collect() -> list[Chunk]:
        return [chunk async for chunk in model.astream(PROMPT, max_tokens=6, ignore_eos=True)]

    chunks = asyncio.run(collect())
    assert tokens(chunks) == tokens(list(model.stream(PROMPT, max_tokens=6, ignore_eos=True)))
    assert chunks[-1].finish_reason == "length"


def test_aanswer_gives_what_answer_gives_and_stops_only_itself(model: Model) -> None:
    asked: Any = [{"role": "user", "content": PROMPT}]

    async def scene() -> tuple[list[Chunk], list[Chunk]]:
        async def ask(most: int) -> list[Chunk]:
            found: list[Chunk] = []
            answer = model.chat().aanswer(asked, max_tokens=40, ignore_eos=True)
            async for chunk in answer:
                found.append(chunk)
                if len(found) == most:
                    break
            await answer.aclose()
            return found

        whole, left = await asyncio.gather(ask(100), ask(3))
        return whole, left

    whole, left = asyncio.run(scene())
    assert tokens(whole) == tokens(list(model.chat().answer(asked, max_tokens=40, ignore_eos=True)))
    assert whole[-1].finish_reason == "length"
    assert len(left) == 3


def test_two_astreams_queue_in_one_loop_and_errors_come_through(model: Model) -> None:
    async def ask(prompt: str, **options: Any) -> list[Chunk]:
        return [chunk async for chunk in model.astream(prompt, max_tokens=6, ignore_eos=True, **options)]

    async def both() -> list[Any]:
        return await asyncio.gather(ask("the"), ask("a cat"), ask("the", top_k=-1), return_exceptions=True)

    first, second, failed = asyncio.run(both())
    assert [first[-1].finish_reason, second[-1].finish_reason] == ["length", "length"]
    assert isinstance(failed, edgelm.ConfigError)


def test_leaving_an_astream_stops_its_thread(model: Model) -> None:
    async def leave() -> int:
        stream = model.astream(PROMPT, max_tokens=100, ignore_eos=True)
        async for _ in stream:
            break
        await stream.aclose()
        return sum(thread.name == "edgelm-stream" for thread in threading.enumerate())

    assert asyncio.run(leave()) == 0
    assert len(tokens(list(long(model)))) == 100


def test_cancelling_a_task_stops_its_stream_and_no_other(model: Model) -> None:
    """Also one that still waits in the queue: the stream before it goes on to its end."""

    async def scene() -> tuple[list[Chunk], list[Chunk]]:
        begun = asyncio.Event()
        first: list[Chunk] = []

        async def collect(into: list[Chunk]) -> None:
            async for chunk in model.astream(PROMPT, max_tokens=100, ignore_eos=True):
                into.append(chunk)
                begun.set()

        running = asyncio.create_task(collect(first))
        await begun.wait()
        second: list[Chunk] = []
        queued = asyncio.create_task(collect(second))
        await asyncio.sleep(0.01)
        queued.cancel()
        with pytest.raises(asyncio.CancelledError):
            await queued
        await running
        return first, second

    first, second = asyncio.run(scene())
    assert first[-1].finish_reason == "length"
    assert not any(chunk.finish_reason == "length" for chunk in second)
    eventually(lambda: not any(thread.name == "edgelm-stream" for thread in threading.enumerate()))


def test_a_chat_streams_for_asyncio_and_keeps_what_was_said(model: Model) -> None:
    async def collect(chat: edgelm.Chat) -> list[Chunk]:
        return [chunk async for chunk in chat.astream("the cat", max_tokens=6)]

    chat, other = model.chat(), model.chat()
    chunks = asyncio.run(collect(chat))
    assert text(chunks) == other.send("the cat", max_tokens=6)
    assert chat.messages == other.messages


def test_cancelling_the_task_of_a_chat_leaves_other_chats_alone(model_file: Path) -> None:
    """A chat whose answer was broken off keeps the text so far; one that had not begun is as before."""

    async def scene(first: edgelm.Chat, second: edgelm.Chat, third: edgelm.Chat) -> Chunk:
        begun = asyncio.Event()

        async def collect(chat: edgelm.Chat, most: int) -> list[Chunk]:
            seen = []
            async for chunk in chat.astream("the cat", max_tokens=most):
                seen.append(chunk)
                begun.set()
            return seen

        running = asyncio.create_task(collect(first, 400))
        await begun.wait()
        queued = asyncio.create_task(collect(second, 400))
        last = asyncio.create_task(collect(third, 6))
        await asyncio.sleep(0)
        for task in (running, queued):
            task.cancel()
        await asyncio.gather(running, queued, return_exceptions=True)
        assert running.cancelled()
        assert queued.cancelled()
        return (await last)[-1]

    with load(model_file, context=512) as model:
        model.tokenizer.eos_ids = frozenset()  # type: ignore[misc]
        chats = [model.chat() for _ in range(3)]
        assert asyncio.run(scene(*chats)).finish_reason == "length"
        assert [len(chat.messages) for chat in chats] == [2, 0, 2]
        assert chats[0].messages[1]["content"]
