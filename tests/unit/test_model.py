"""The public model: streams, statistics, cancelling, queues, chats, asyncio, and giving memory back."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgelm
from edgelm import Chunk, Model, opening
from edgelm.engine import generate
from edgelm.memory.platform import current_platform
from edgelm.memory.predict import Rates
from edgelm.testing import tiny_model

BUDGET = 2_000_000_000
PATIENCE_S = 20.0
PROMPT = "the cat and the dog"


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny.gguf", "llama")


@pytest.fixture(autouse=True)
def _measured_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for the device to be measured: each has a cache of its own."""
    monkeypatch.setattr(opening, "measured_rates", lambda *_, **__: Rates(1e9, 1e9))


def load(path: Path, **options: Any) -> Model:
    return edgelm.load(path, **{"memory": BUDGET, "backend": "numpy", "threads": 1, "context": 128, **options})


@pytest.fixture
def model(model_file: Path) -> Iterator[Model]:
    with load(model_file) as model:
        yield model


def tokens(chunks: list[Chunk]) -> list[int]:
    return [chunk.token_id for chunk in chunks if chunk.token_id is not None]


def text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


def in_thread(work: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def join(thread: threading.Thread) -> None:
    thread.join(PATIENCE_S)
    assert not thread.is_alive(), "it hangs"


def long(model: Model, **options: Any) -> Any:
    """A stream of many tokens, unless something stops it."""
    return model.stream(PROMPT, max_tokens=100, ignore_eos=True, **options)


# generation


def test_statistics_add_up(model: Model) -> None:
    chunks = list(model.stream(PROMPT, max_tokens=9, ignore_eos=True))
    last = chunks[-1]
    usage = last.usage
    assert (last.finish_reason, last.token_id) == ("length", None)
    assert all(chunk.finish_reason is None for chunk in chunks[:-1])
    assert [chunk.usage.completion_tokens for chunk in chunks] == [*range(1, 10), 9]
    assert usage.prompt_tokens == len(model.tokenizer.encode(PROMPT))
    assert usage.cached_tokens == 0
    assert 0 < usage.ttft_s < PATIENCE_S
    assert usage.prefill_tps > 0
    assert usage.decode_tps > 0
    assert 0 < usage.rss_bytes <= usage.peak_bytes <= usage.budget_bytes == BUDGET == model.plan.budget_bytes
    assert usage.bytes_streamed == 0
    assert usage.wait_s == usage.read_s == 0  # everything is resident
    assert 0 < usage.sample_s < usage.compute_s
    assert usage.ttft_s < usage.elapsed_s
    assert usage.predicted_decode_tps == model.plan.predicted_decode_tps > 0
    assert usage.backend == model.backend == "numpy"
    assert all(chunk.usage.other_s > 0 for chunk in chunks)
    assert chunks[0].usage.decode_tps == 0
    assert any("chosen" in note for note in model.notes)


def test_the_pass_that_ends_an_answer_is_in_its_times(model: Model) -> None:
    """The end token is computed and never yielded."""
    first = next(chunk.token_id for chunk in model.stream(PROMPT, max_tokens=1, ignore_eos=True))
    assert first is not None
    model.tokenizer.eos_ids = frozenset({first})  # type: ignore[misc]
    (last,) = model.stream(PROMPT)
    assert (last.finish_reason, last.usage.completion_tokens) == ("stop", 0)
    assert last.usage.other_s > 0


def test_a_recording_holds_the_tokens_of_a_stream(model: Model) -> None:
    with model.record() as timeline:
        list(model.stream(PROMPT, max_tokens=5, ignore_eos=True))
    model.generate(PROMPT, max_tokens=3)  # not in it any more
    kinds = [event.kind for event in timeline.events()]
    assert (kinds.count("token"), kinds.count("sample")) == (5, 5)
    assert kinds.index("compute") < kinds.index("token")


def test_max_tokens_is_exact_and_the_context_ends_a_stream(model: Model) -> None:
    assert len(tokens(list(model.stream(PROMPT, max_tokens=1, ignore_eos=True)))) == 1
    chunks = list(model.stream(PROMPT, ignore_eos=True))
    # the last token is sampled, not stored
    assert len(tokens(chunks)) == 128 - chunks[-1].usage.prompt_tokens + 1
    assert chunks[-1].finish_reason == "length"


def test_the_same_prompt_goes_on_from_the_cache_with_the_same_answer(model: Model) -> None:
    first = list(model.stream(PROMPT, max_tokens=8, ignore_eos=True))
    again = list(model.stream(PROMPT, max_tokens=8, ignore_eos=True))
    assert tokens(again) == tokens(first)
    assert again[-1].usage.cached_tokens == again[-1].usage.prompt_tokens - 1
    assert model.generate(PROMPT, max_tokens=8, ignore_eos=True) == text(first)


def test_stop_strings_end_the_text_before_them(model: Model) -> None:
    whole = model.generate(PROMPT, max_tokens=30, ignore_eos=True)
    stop = whole[10:13]
    chunks = list(model.stream(PROMPT, max_tokens=30, ignore_eos=True, stop=stop))
    assert text(chunks) == whole[: whole.index(stop)]
    assert chunks[-1].finish_reason == "stop"
    assert model.generate(PROMPT, max_tokens=30, ignore_eos=True, stop=["not there", stop]) == text(chunks)


def test_an_end_token_ends_the_answer_unless_ignored(model: Model) -> None:
    (eos, *_) = model.tokenizer.eos_ids
    bias = {eos: 1000.0}
    chunks = list(model.stream(PROMPT, max_tokens=5, logit_bias=bias))
    assert tokens(chunks) == []
    assert (chunks[-1].finish_reason, text(chunks)) == ("stop", "")
    chunks = list(model.stream(PROMPT, max_tokens=5, logit_bias=bias, ignore_eos=True))
    assert tokens(chunks) == [eos] * 5
    assert chunks[-1].finish_reason == "length"


def test_seeds_repeat_and_differ(model: Model) -> None:
    def drawn(seed: int) -> list[int]:
        return tokens(list(model.stream(PROMPT, max_tokens=20, ignore_eos=True, temperature=2.0, seed=seed)))

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_processors_see_the_history_and_change_the_logits(model: Model) -> None:
    seen: list[int] = []

    def only_seven(history: Any, logits: Any) -> Any:
        seen.append(len(history))
        logits = np.full_like(logits, -np.inf)
        logits[7] = 0
        return logits

    chunks = list(model.stream(PROMPT, max_tokens=4, ignore_eos=True, processors=[only_seven]))
    assert tokens(chunks) == [7] * 4
    n_prompt = chunks[-1].usage.prompt_tokens
    assert seen == [n_prompt, n_prompt + 1, n_prompt + 2, n_prompt + 3]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"timeout_s": 0}, "timeout_s"),
        ({"temprature": 1}, "known: "),
        ({"stop": ""}, "stop string"),
        ({"temperature": -1}, "temperature"),
    ],
)
def test_mistakes_are_told_at_the_call(model: Model, options: dict[str, Any], said: str) -> None:
    with pytest.raises(edgelm.ConfigError, match=said):
        model.stream(PROMPT, **options)
    assert model.generate(PROMPT, max_tokens=2) is not None


def test_an_empty_prompt_and_foreign_ids_are_refused(model: Model) -> None:
    with pytest.raises(edgelm.ConfigError, match="empty"):
        model.stream_ids([])
    with pytest.raises(edgelm.ConfigError, match="token ids"):
        list(model.stream_ids([5, 10**6]))


def test_a_prompt_longer_than_the_context_names_both_numbers(model: Model) -> None:
    with pytest.raises(edgelm.ContextOverflow) as caught:
        list(model.stream_ids([5] * 128))
    assert (caught.value.n_prompt_tokens, caught.value.n_context) == (128, 128)
    assert list(model.stream_ids([5] * 127, max_tokens=1))[-1].finish_reason in ("length", "stop")


# stopping


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


# chats


def test_a_chat_keeps_its_history_and_computes_only_what_is_new(model_file: Path) -> None:
    with load(model_file, context=256) as model:
        chat = model.chat("Be brief.")
        list(chat.stream("the cat", max_tokens=4))
        chunks = list(chat.stream("the dog", max_tokens=4))
        assert [message["role"] for message in chat.messages] == [
            "system", "user", "assistant", "user", "assistant",
        ]  # fmt: skip
        assert chat.messages[3]["content"] == "the dog"
        assert chat.messages[4]["content"] == text(chunks)
        assert chunks[-1].usage.cached_tokens > 5
        assert "the dog" in chat.render("more")
        chat.clear()
        assert chat.messages == [{"role": "system", "content": "Be brief."}]


def test_a_full_chat_is_an_error_that_changes_nothing(model: Model) -> None:
    chat = model.chat()
    chat.send("the cat", max_tokens=3)
    before = list(chat.messages)
    with pytest.raises(edgelm.ContextOverflow) as caught:
        chat.send("the dog " * 100)
    assert caught.value.n_context == 128 < caught.value.n_prompt_tokens
    assert chat.messages == before


def test_trimming_drops_the_oldest_turns_and_keeps_the_system(model: Model) -> None:
    chat = model.chat("Hm.", overflow="trim")
    for i in range(8):
        list(chat.stream(f"the cat {i}", max_tokens=8))
    contents = [message["content"] for message in chat.messages]
    assert contents[0] == "Hm."
    assert "the cat 7" in contents
    assert "the cat 0" not in contents
    assert [message["role"] for message in chat.messages[1:3]] == ["user", "assistant"]


def test_a_turn_that_fails_leaves_a_trimmed_chat_as_it_was(model: Model) -> None:
    chat = model.chat(overflow="trim")
    for i in range(8):
        chat.send(f"the cat {i}", max_tokens=8)
    before = list(chat.messages)
    with pytest.raises(edgelm.ContextOverflow):
        chat.send("the dog " * 100)
    assert chat.messages == before

    seen: list[int] = []

    def fail(history: Any, logits: Any) -> Any:
        seen.append(len(history))
        if len(seen) == 3:
            raise RuntimeError("in the middle of an answer")
        return logits

    with pytest.raises(RuntimeError):
        chat.send("the end of it", processors=[fail], max_tokens=20, ignore_eos=True)
    assert chat.messages == before


def test_a_cancelled_turn_keeps_the_text_so_far_if_there_is_any(model: Model) -> None:
    chat = model.chat()
    stream = chat.stream("the cat", max_tokens=20, ignore_eos=True)
    said = next(stream).text + next(stream).text
    model.cancel()
    rest = list(stream)
    assert rest[-1].finish_reason == "cancelled"
    assert chat.messages[-1] == {"role": "assistant", "content": said + text(rest)}
    chat.clear()
    stream = chat.stream("the cat")
    model.cancel()
    assert [chunk.finish_reason for chunk in stream] == ["cancelled"]
    assert chat.messages == []


def test_an_unknown_policy_is_refused(model: Model) -> None:
    with pytest.raises(edgelm.ConfigError, match="'trim'"):
        model.chat(overflow="drop")  # type: ignore[arg-type]


# loading and closing


def test_close_twice_and_use_after_close(model_file: Path) -> None:
    model = load(model_file)
    model.generate(PROMPT, max_tokens=2)
    model.close()
    model.close()
    model.cancel()
    with pytest.raises(edgelm.ConfigError, match="closed"):
        model.stream(PROMPT)
    with pytest.raises(edgelm.ConfigError, match="closed"):
        model.chat().send("hi")


def test_close_with_a_stream_left_halfway_in_this_thread(model_file: Path) -> None:
    """As when an exception leaves the `with` block while a stream is still referred to."""
    with load(model_file) as model:
        stream, waiting = long(model), long(model)
        next(stream)
    assert [chunk.finish_reason for chunk in stream] == ["cancelled"]
    assert [chunk.finish_reason for chunk in waiting] == ["cancelled"]


def test_close_stops_a_stream_of_another_thread(model_file: Path) -> None:
    model = load(model_file)
    chunks: list[Chunk] = []
    thread = in_thread(lambda: chunks.extend(model.stream("the", max_tokens=120, ignore_eos=True)))
    eventually(lambda: model.turns._current)
    model.close()
    join(thread)
    assert chunks[-1].finish_reason in ("cancelled", "length")


def test_closing_from_inside_a_generation_is_a_mistake(model_file: Path) -> None:
    with load(model_file) as model:

        def close(history: Any, logits: Any) -> Any:
            model.close()
            return logits

        with pytest.raises(edgelm.ConfigError, match="inside a generation"):
            model.generate(PROMPT, processors=[close])


def test_closing_gives_the_memory_back(tmp_path: Path) -> None:
    path = tiny_model(tmp_path / "wide.gguf", "llama", n_layers=6, n_embd=512, n_heads=8, head_dim=64, n_ff=2048)
    size = path.stat().st_size
    assert size > 60_000_000
    rss = current_platform().rss_bytes
    load(path).close()  # what libraries keep is kept once
    gc.collect()
    before = rss()
    model = load(path)
    model.generate("the", max_tokens=2)
    loaded = rss()
    model.close()
    gc.collect()
    assert loaded - before > 0.8 * size
    assert rss() - before < 0.2 * size


def test_a_backend_that_is_not_there_is_a_typed_error(model_file: Path) -> None:
    with pytest.raises(edgelm.UnknownBackend, match="numpy"):
        load(model_file, backend="onxx")


def test_wrong_options_of_load_are_typed_errors(model_file: Path, tmp_path: Path) -> None:
    with pytest.raises(edgelm.ConfigError, match="threads"):
        load(model_file, threads=0)
    with pytest.raises(edgelm.ConfigError, match="context"):
        load(model_file, context=3)
    with pytest.raises(edgelm.ConfigError, match="size"):
        load(model_file, memory="lots")
    with pytest.raises(edgelm.ModelNotFound):
        load(tmp_path / "nothing.gguf")
    with pytest.raises(edgelm.BudgetTooSmall) as caught:
        load(model_file, memory="1MB")
    assert len(caught.value.items) == 3


def test_a_budget_that_is_refused_leaves_no_file_open(model_file: Path) -> None:
    folder = Path("/proc/self/fd")
    if not folder.is_dir():
        pytest.skip("this system does not list open files")

    def opened() -> list[str]:
        return sorted(os.readlink(link) for link in folder.iterdir() if link.is_symlink())

    def refused() -> None:
        with pytest.raises(edgelm.BudgetTooSmall):
            load(model_file, memory="1MB")

    refused()
    assert str(model_file) not in opened()
