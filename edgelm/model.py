"""The public model: load a file inside a budget, stream text with statistics, hold a chat.

One model serves many threads: calls queue. Everything of ids is in `engine`, of text in `text`.
"""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypedDict, Unpack

from edgelm.chat import Chat, Overflow
from edgelm.engine.generate import Conversation, FinishReason, token_ids
from edgelm.engine.sampling import Processor, Sampling, make_sampler
from edgelm.errors import Cancelled, ConfigError
from edgelm.files.gguf import ModelFile
from edgelm.memory.meter import Meter
from edgelm.memory.plan import Plan
from edgelm.opening import Opened
from edgelm.text.stops import StopMatcher
from edgelm.text.template import ChatTemplate, chat_template_for
from edgelm.text.tokenizer import Tokenizer
from edgelm.usage import Chunk, Clock


class Options(TypedDict, total=False):
    """Options of a generation; those not listed here by name are fields of `Sampling`."""

    max_tokens: int | None
    stop: str | Iterable[str]
    ignore_eos: bool
    timeout_s: float | None
    processors: Sequence[Processor]
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    typical_p: float
    repeat_penalty: float
    presence_penalty: float
    frequency_penalty: float
    penalty_last_n: int
    logit_bias: dict[int, float]
    seed: int | None


class Model:
    """A loaded model. Use it as a context manager, or call `close`.

    `plan` says where the memory went, `backend` which backend computes, `template` how chats are rendered.
    """

    def __init__(self, opened: Opened) -> None:
        self._engine = opened.engine
        self._file = opened.file
        self.tokenizer: Tokenizer = opened.tokenizer
        self.backend: str = opened.backend
        self.notes: tuple[str, ...] = opened.notes
        self._conversation = Conversation(opened.engine)
        self._queue = threading.Lock()
        self._owner: int | None = None
        self._template: ChatTemplate | None = None
        self._why: FinishReason = "cancelled"
        self._meter = Meter()

    @property
    def plan(self) -> Plan:
        return self._engine.plan

    @property
    def file(self) -> ModelFile:
        """The opened file: metadata, tensors, architecture."""
        return self._file

    @property
    def template(self) -> ChatTemplate:
        """The chat template of the file, or the fallback for it (its `notice` says which)."""
        if self._template is None:
            self._template = chat_template_for(self._file, self.tokenizer)
        return self._template

    def stream(self, prompt: str, **options: Unpack[Options]) -> Generator[Chunk, None, None]:
        """Yield what follows `prompt`, without a chat template, piece by piece.

        The last chunk has a `finish_reason`: "stop" (end token or stop string), "length", "cancelled", "timeout".
        Raises `ContextOverflow` if the prompt leaves no room for an answer.
        """
        return self.stream_ids(self.tokenizer.encode(prompt), **options)

    def generate(self, prompt: str, **options: Unpack[Options]) -> str:
        """Return what follows `prompt`, without a chat template."""
        return "".join(chunk.text for chunk in self.stream(prompt, **options))

    def chat(self, system: str | None = None, *, overflow: Overflow = "error") -> Chat:
        """Return a new conversation. `overflow="trim"` drops the oldest turns when the context is full."""
        return Chat(self, system, overflow)

    def stream_ids(self, ids: Sequence[int], **options: Unpack[Options]) -> Generator[Chunk, None, None]:
        """Yield what follows a prompt given as ids; see `stream`."""
        max_tokens = options.pop("max_tokens", None)
        stop = options.pop("stop", ())
        ignore_eos, timeout_s = options.pop("ignore_eos", False), options.pop("timeout_s", None)
        processors = tuple(options.pop("processors", ()))
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"max_tokens must be at least 1, got {max_tokens}")
        if timeout_s is not None and timeout_s <= 0:
            raise ConfigError(f"timeout_s must be above 0 seconds, got {timeout_s}")
        if not ids:
            raise ConfigError("the prompt is empty; give it at least one token")
        sampler = make_sampler(_sampling(dict(options)), processors)
        matcher = StopMatcher([stop] if isinstance(stop, str) else stop)
        room = self.plan.context - len(ids) + 1  # the last token is sampled, not stored
        limit = min(max_tokens or room, room) if room > 0 else 1
        ends = frozenset[int]() if ignore_eos else self.tokenizer.eos_ids

        def run() -> Generator[Chunk, None, None]:
            clock = Clock(self._engine, self._meter, self.backend, len(ids))
            decoder = self.tokenizer.incremental()
            with self._turn(timeout_s):
                clock.started()
                try:
                    clock.prefilled(self._conversation.prefill(ids))
                    tokens = token_ids(self._conversation, ids, sampler, max_tokens=limit, ends=ends)
                    reason = None
                    while reason is None:
                        try:
                            token = next(tokens)
                        except StopIteration as end:
                            reason = end.value
                            continue
                        clock.token()
                        text = matcher.feed(decoder.feed(token))
                        if matcher.stopped is not None:
                            reason = "stop"
                        yield Chunk(text, token, None, clock.usage())
                except Cancelled:
                    reason = self._why
                rest = matcher.feed(decoder.flush()) + matcher.flush()
                yield Chunk(rest, None, reason, clock.usage())

        return run()

    async def astream(self, prompt: str, **options: Unpack[Options]) -> AsyncIterator[Chunk]:
        """Like `stream`, for asyncio: computes in a thread; leaving the loop or cancelling the task stops it."""
        from edgelm.aio import iterate

        async for chunk in iterate(lambda: self.stream(prompt, **options), self.cancel):
            yield chunk

    def cancel(self) -> None:
        """Stop the running generation, from any thread, also while it reads the prompt."""
        self._abort("cancelled")

    def close(self) -> None:
        """Give all memory back. A running generation is stopped first."""
        self.cancel()
        with self._queue:
            self._engine.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _abort(self, why: FinishReason) -> None:
        if self._owner is not None:
            self._why = why
            self._engine.cancel()

    @contextmanager
    def _turn(self, timeout_s: float | None) -> Iterator[None]:
        """Wait for the model to be free, then hold it; a timeout counts from here."""
        me = threading.get_ident()
        if self._owner == me:
            raise ConfigError("this thread is still reading another stream of the model; finish or close that first")
        with self._queue:
            self._engine.cancel(False)
            self._owner = me
            timer = threading.Timer(timeout_s, self._abort, ("timeout",)) if timeout_s else None
            if timer is not None:
                timer.daemon = True
                timer.start()
            try:
                yield
            finally:
                self._owner = None
                if timer is not None:
                    timer.cancel()


def _sampling(options: dict[str, Any]) -> Sampling:
    known = Sampling.__slots__
    unknown = [name for name in options if name not in known]
    if unknown:
        raise ConfigError(f"unknown option {unknown[0]!r} (known: {', '.join(sorted((*Options.__annotations__,)))})")
    return Sampling(**options)
