"""The public model: load a file inside a budget, stream text with statistics, hold a chat.

One model serves many threads: calls queue. Everything of ids is in `engine`, of text in `text`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, aclosing
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Unpack

from edgelm.embeddings import as_matrix, embedded, must_write
from edgelm.engine.generate import Conversation, FinishReason, token_ids
from edgelm.engine.logprobs import Watched
from edgelm.engine.sampling import Sampler
from edgelm.engine.speculation.speculator import Speculator
from edgelm.errors import Cancelled, ConfigError
from edgelm.files.model import ModelFile
from edgelm.memory.meter import Meter
from edgelm.memory.plan import Plan
from edgelm.memory.platform.allocator import trim
from edgelm.memory.timeline import Timeline
from edgelm.opening import Opened
from edgelm.options import Asked, Options, asked_for
from edgelm.sizes import parse_size
from edgelm.text.tokenizer import Tokenizer
from edgelm.turns import Turn, Turns
from edgelm.usage import Chunk, Clock, Sample, Score

if TYPE_CHECKING:
    from edgelm.adaptive import Monitor
    from edgelm.chat import Chat, Overflow
    from edgelm.engine.embedding import Floats, Pooling
    from edgelm.guesses import Learned
    from edgelm.structured import Forms
    from edgelm.text.template import ChatTemplate


class Model:
    """A loaded model. Use it as a context manager, or call `close`.

    `plan` says where the memory went, `asked_bytes` the budget that was asked for, `backend` which backend computes,
    `template` how chats are rendered, `embeds` whether it turns texts into vectors.
    """

    def __init__(
        self, opened: Opened, adaptive: bool | Callable[[str], None] = False, keep_guesses: bool = False
    ) -> None:
        self._engine = opened.engine
        self._file, self._replan = opened.file, opened.replan
        self.tokenizer: Tokenizer = opened.tokenizer
        self.backend: str = opened.backend
        self.notes: tuple[str, ...] = opened.notes
        self._conversation = Conversation(opened.engine)
        self._draft = opened.draft
        self.embeds: bool = opened.embeds
        if opened.draft is not None:
            opened.draft.leave_core(bool(opened.engine.plan.streamed))
        draft = Conversation(opened.draft) if opened.draft is not None else None
        self._speculator = Speculator(opened.engine, draft) if opened.speculate else None
        self.turns = Turns(self._abort)
        self._forms: Forms | None = None
        self._more_bytes = 0  # what was loaded later than the model, and is not in its plan's process
        self._meter = Meter()
        self._learned: Learned | None = None
        if keep_guesses:
            from edgelm.guesses import Learned

            self._learned = Learned(self._speculator, self._file, self.identity)
            self.notes += self._learned.recall(opened.engine.n_vocab)
        self.asked_bytes = opened.engine.plan.budget_bytes
        self._monitor: Monitor | None = None
        if adaptive:
            from edgelm.adaptive import Monitor

            self._monitor = Monitor(self, adaptive if callable(adaptive) else None)
            self._monitor.start()

    @property
    def plan(self) -> Plan:
        return self._engine.plan

    @property
    def threads(self) -> int:
        """How many threads compute."""
        return self._engine.n_threads

    @property
    def file(self) -> ModelFile:
        """The opened file: metadata, tensors, architecture."""
        return self._file

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template of the file, or the fallback for it (its `notice` says which)."""
        from edgelm.text.template import chat_template_for

        return chat_template_for(self._file, self.tokenizer)

    def stream(self, prompt: str, **options: Unpack[Options]) -> Generator[Chunk, None, None]:
        """Yield what follows `prompt`, without a chat template, piece by piece.

        The last chunk has a `finish_reason`: "stop" (end token or stop string), "length", "cancelled", "timeout".
        An answer in a form is ended in time for `max_tokens`, which the last chunk then says with `closed`.
        Raises `ContextOverflow` if the prompt leaves no room for an answer.
        """
        return self.stream_turn(self.turns.ask(), lambda: self.tokenizer.encode(prompt), options)

    def generate(self, prompt: str, **options: Unpack[Options]) -> str:
        """Return what follows `prompt`, without a chat template."""
        return "".join(chunk.text for chunk in self.stream(prompt, **options))

    def chat(
        self,
        system: str | None = None,
        *,
        overflow: Overflow = "error",
        keep: bool = False,
        tools: Iterable[Mapping[str, Any]] = (),
    ) -> Chat:
        """Return a new conversation. `overflow="trim"` drops the oldest turns when the context is full.

        `keep`: the keys and values of the system message are kept in the cache folder, so that the first answer of the
        next process comes sooner. `tools`: what the model may call, as `{"name", "description", "parameters"}`, with
        parameters a JSON schema; the last chunk of an answer has its `tool_calls`, and `Chat.tool_results` goes on.
        Warns of `ToolsIgnored` if the model's template leaves them out.
        """
        from edgelm.chat import Chat

        must_write(self)
        return Chat(self, system, overflow, keep, tools)

    def embed(self, texts: Sequence[str], normalize: bool = True, *, pooling: Pooling | None = None) -> Floats:
        """Return a vector for each text, float32 [n, dim], each text in a pass of its own.

        Vectors have a length of 1 if `normalize`. The file says how the states of a text's tokens become one vector,
        unless `pooling` does: "mean", "cls" (the first), "last". Raises `UnsupportedModel` for a model that writes
        texts, `ContextOverflow` with both numbers for a text longer than the context.
        """
        return as_matrix(embedded(self, self._engine, texts, normalize, pooling), self._engine.n_vocab)

    def embed_tokens(self, text: str, normalize: bool = False) -> Floats:
        """Return a vector for each token of a text, float32 [n_tokens, dim]; see `embed`."""
        return embedded(self, self._engine, [text], normalize, "none")[0]

    def stream_ids(self, ids: Sequence[int], **options: Unpack[Options]) -> Generator[Chunk, None, None]:
        """Yield what follows a prompt given as ids; see `stream`."""
        return self.stream_turn(self.turns.ask(), lambda: ids, options)

    def stream_turn(
        self, turn: Turn, encode: Callable[[], Sequence[int]], options: Options, kept: Sequence[int] = ()
    ) -> Generator[Chunk, None, None]:
        """Yield what follows the ids of `encode()`, as the turn `turn` of `turns`; see `stream`.

        `kept`: a beginning of these ids that is to be kept on flash for other processes.
        """
        must_write(self)
        asked = asked_for(options, self.tokenizer)
        ids = encode()
        if not ids:
            raise ConfigError("the prompt is empty; give it at least one token")
        room = self.plan.context - len(ids) + 1  # the last token is sampled, not stored
        limit = min(asked.max_tokens or room, room)
        sampler, ends = self._sampler_of(asked, len(ids), limit), self._ends_of(asked)
        if asked.n_top is not None:
            sampler = Watched(sampler, asked.n_top)
        clock = Clock(self._engine, self._conversation.counts, self._meter, self.backend, len(ids))
        return self._run(turn, ids, asked._replace(sampler=sampler, max_tokens=limit), ends, clock, kept)

    def sampling(self, options: Options) -> tuple[Callable[[int, int], Sampler], frozenset[int]]:
        """Return what makes the sampler of an answer to a prompt of so many ids, of up to so many, and what ends it.

        Raises `ConfigError` for options that make no sense.
        """
        asked = asked_for(options, self.tokenizer)
        return partial(self._sampler_of, asked), self._ends_of(asked)

    def _sampler_of(self, asked: Asked, n_prompt: int, most: int) -> Sampler:
        """Return the sampler for an answer of up to `most` ids to a prompt of so many."""
        if asked.form is None:
            return asked.sampler
        return self._forms_here().constrain(asked.sampler, asked.form, n_prompt, most)

    def _ends_of(self, asked: Asked) -> frozenset[int]:
        return frozenset() if asked.ignores_ends and asked.form is None else self.tokenizer.eos_ids

    def _run(
        self, turn: Turn, ids: Sequence[int], asked: Asked, ends: frozenset[int], clock: Clock, kept: Sequence[int]
    ) -> Generator[Chunk, None, None]:
        decoder, sampler, matcher = self.tokenizer.incremental(), asked.sampler, asked.matcher
        speculator = self._speculator if asked.speculates else None
        reason: FinishReason | None = None
        assert asked.max_tokens is not None
        try:
            with self.turns.held(turn, asked.timeout_s):
                clock.started()
                breathe = partial(self._breathe, turn)
                computed = self._provide(kept, breathe) if kept else 0
                clock.prefilled(computed + self._conversation.prefill(ids, breathe))
                tokens = token_ids(
                    self._conversation, ids, sampler, max_tokens=asked.max_tokens, ends=ends, speculator=speculator
                )
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
                    noted = sampler.noted.popleft() if isinstance(sampler, Watched) else None
                    chunk = Chunk(text, token, None, clock.usage(), logprobs=noted)
                    with self.turns.pause(turn):
                        yield chunk
        except Cancelled:
            reason = turn.stopped or "cancelled"
        rest = matcher.feed(decoder.flush()) + matcher.flush()
        closed = reason == "stop" and getattr(sampler, "closed", False)
        yield Chunk(rest, None, reason, clock.usage(final=True), closed=closed)

    def samples(self, prompt: str, n: int, **options: Unpack[Options]) -> list[Sample]:
        """Return `n` answers to `prompt`, computed side by side, the likeliest by mean log-probability first.

        The prompt is computed once and every pass over the weights serves all of them. With a `seed`, answer i draws
        with `seed + i`, as a stream with that seed does. A verifier of your own chooses with
        `max(model.samples(prompt, 4), key=verifier)`. Without `max_tokens` answers share what the prompt leaves of the
        context. Raises `ConfigError` where there is no room for so many: `load` with `parallel=n`.
        """
        return self.samples_of(self.tokenizer.encode(prompt), n, **options)

    def samples_of(self, ids: Sequence[int], n: int, **options: Unpack[Options]) -> list[Sample]:
        """Return `n` answers to a prompt given as ids; see `samples`."""
        from edgelm.sampling_together import together

        must_write(self)
        return together(self, self._conversation, ids, n, options)

    def score(self, text: str, continuation: str = "") -> Score:
        """Return how likely the model finds `continuation` after `text`; without one, `text` after its beginning.

        Each token's log-probability is given all before it; the first token of a text has none, unless the file puts
        a beginning before it. Raises `ContextOverflow` with both numbers.
        """
        given = self.tokenizer.encode(text)
        ids = [*given, *self.tokenizer.encode(continuation, add_bos=False)]
        return self.score_ids(ids, len(given) if continuation else 1)

    def score_ids(self, ids: Sequence[int], n_given: int = 1) -> Score:
        """Return the log-probabilities of `ids[n_given:]`; see `score`."""
        from edgelm.scoring import score_of

        must_write(self)
        return score_of(self._conversation, self.turns, ids, n_given)

    async def astream(self, prompt: str, **options: Unpack[Options]) -> AsyncGenerator[Chunk, None]:
        """Like `stream`, for asyncio: computes in a thread; leaving the loop or cancelling the task stops it."""
        from edgelm.aio import iterate

        turn = self.turns.ask()
        stream = partial(self.stream_turn, turn, lambda: self.tokenizer.encode(prompt), options)
        async with aclosing(iterate(stream, partial(self.turns.cancel, turn))) as chunks:
            async for chunk in chunks:
                yield chunk

    def cancel(self) -> None:
        """Stop every stream that was asked for until now: the running one, and those that wait or have not begun.

        From any thread or signal handler. They end with a chunk whose `finish_reason` is "cancelled".
        """
        self.turns.cancel()

    def record(self) -> AbstractContextManager[Timeline]:
        """Record single reads, waits, program runs and tokens while inside: `with model.record() as timeline`.

        The timeline takes up to 1.9 MB of the budget's reserve. Raises `ConfigError` for a second one at a time.
        """
        return self._engine.times.recording()

    def set_budget(self, memory: str | int) -> Plan:
        """Go over to another budget ("200MB", or bytes) and return its plan; from any thread, also during a stream.

        A running stream goes on with its next token: the same tokens, the same cache, faster or slower. What the new
        plan does not keep is given back before anything is read. Raises `BudgetTooSmall` with the smallest budget
        that works with the cache as it is; nothing has changed then.
        """
        with self.turns.between():
            plan = self._go_over(parse_size(memory))
            self.asked_bytes = plan.budget_bytes
        return plan

    def adapt_budget(self, budget_bytes: int) -> Plan:
        """Go over to another budget for a while, within the one that was asked for; see `set_budget`."""
        with self.turns.between():
            return self._go_over(min(budget_bytes, self.asked_bytes))

    def _breathe(self, turn: Turn, _done: int) -> None:
        self.turns.breathe(turn)

    def _provide(self, prefix: Sequence[int], progress: Callable[[int], None]) -> int:
        from edgelm.prefixes import provide

        computed, told = provide(self._conversation, prefix, self._file, self.identity, progress)
        if told:
            self.notes = (*self.notes, told)
        return computed

    @cached_property
    def identity(self) -> str:
        """A key of this model's file: its header, and a sample of every tensor."""
        from edgelm.files.identity import identity_of

        return identity_of(self._file)

    def save_cache(self, path: str | PathLike[str]) -> int:
        """Write the keys and values that are stored now to a file, for `load_cache`; return its bytes.

        Raises `ConfigError` where they cannot be saved: ONNX graphs, and caches with a part on flash.
        """
        with self.turns.between():
            return self._conversation.save(Path(path), self.identity)

    def load_cache(self, path: str | PathLike[str]) -> int:
        """Store what `save_cache` wrote, with whatever backend; return the number of tokens.

        A prompt that begins with them is not computed again. Raises `ModelFileError` for a file that is damaged or of
        another model; nothing is stored then.
        """
        with self.turns.between():
            return len(self._conversation.restore(Path(path), self.identity))

    @property
    def stored(self) -> tuple[int, ...]:
        """The ids whose keys and values are in the cache."""
        return self._conversation.stored

    def _forms_here(self) -> Forms:
        """Return what keeps answers to a form. The first time room is made for it; raises `BudgetTooSmall`."""
        if self._forms is None:
            from edgelm.structured import Forms

            with self.turns.between():
                more_bytes = self._more_bytes + Forms.memory_bytes(self.tokenizer)
                self._carry_out(*self._replan(self.plan.budget_bytes, more_bytes))
                self._more_bytes = more_bytes
                self._forms = Forms(self.tokenizer, self._engine.n_vocab)
        return self._forms

    def _go_over(self, budget_bytes: int) -> Plan:
        plan, notes = self._replan(budget_bytes, self._more_bytes)
        self._carry_out(plan, notes)
        return plan

    def _carry_out(self, plan: Plan, notes: tuple[str, ...]) -> None:
        if self._draft is not None and not plan.demand.draft_bytes:
            self._drop_draft()
        self._engine.carry_out(plan)
        if self._draft is not None:
            self._draft.leave_core(bool(plan.streamed))
        trim()
        self.notes = notes

    def close(self) -> None:
        """Give all memory back. Streams are stopped first; one that was left half-way ends when it is read again."""
        self.turns.close(self._close)
        if self._monitor is not None:
            self._monitor.stop()

    def _close(self) -> None:
        if self._learned is not None:
            self._learned.keep()
        if self._draft is not None:
            self._draft.close()
        self._engine.close()

    def _abort(self, on: bool) -> None:
        self._engine.cancel(on)
        if self._draft is not None:
            self._draft.cancel(on)

    def _drop_draft(self) -> None:
        assert self._draft is not None
        if self._speculator is not None:
            self._speculator.drop_model()
        self._draft.close()
        self._draft = None

    def __enter__(self) -> Model:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
