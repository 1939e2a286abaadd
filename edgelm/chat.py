"""A conversation: messages, the template that renders them, and what happens when the context is full."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Literal, Unpack

from edgelm.errors import ConfigError, ContextOverflow

if TYPE_CHECKING:
    from edgelm.model import Model, Options
    from edgelm.text.messages import Message
    from edgelm.text.prompt import Prompt
    from edgelm.turns import Turn
    from edgelm.usage import Chunk

Overflow = Literal["error", "trim"]
ANSWER_TOKENS = 256
"""Room that `trim` makes for an answer whose length is not limited."""


class Chat:
    """A chat with one model. Turns already in the KV cache are not computed again.

    `messages` are dicts of `role` and `content`, the system message first if there is one. A turn that fails leaves
    them as they were; one that is cancelled keeps the text so far.
    """

    def __init__(self, model: Model, system: str | None, overflow: Overflow) -> None:
        if overflow not in ("error", "trim"):
            raise ConfigError(f"overflow must be 'error' or 'trim', got {overflow!r}")
        self._model, self._overflow = model, overflow
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []

    def send(self, text: str, **options: Unpack[Options]) -> str:
        """Return the answer to `text`."""
        return "".join(chunk.text for chunk in self.stream(text, **options))

    def stream(self, text: str, **options: Unpack[Options]) -> Generator[Chunk, None, None]:
        """Yield the answer to `text` piece by piece; see `Model.stream`."""
        return self._answer(self._model.turns.ask(), text, options)

    def _answer(self, turn: Turn, text: str, options: Options) -> Generator[Chunk, None, None]:
        asked: Message = {"role": "user", "content": text}
        messages, ids = self._fitting(asked, options.get("max_tokens"))
        stops = options.get("stop", ())
        options["stop"] = [*([stops] if isinstance(stops, str) else stops), *self._model.template.stops]
        answer: list[str] = []
        chunks = self._model.stream_turn(turn, lambda: ids, options)
        answered = False
        try:
            for chunk in chunks:
                answer.append(chunk.text)
                # an answer may be empty, but one that was stopped before its first token is none
                answered = answered or chunk.token_id is not None or chunk.finish_reason in ("stop", "length")
                yield chunk
        except Exception:
            answered = False
            raise
        finally:
            chunks.close()
            if answered:
                self.messages[:] = [*messages, asked, {"role": "assistant", "content": "".join(answer)}]

    def render(self, text: str) -> str:
        """Return the prompt that `text` would lead to, as the model reads it."""
        return self._render(self.messages, {"role": "user", "content": text}).text

    def clear(self) -> None:
        """Forget everything but the system message."""
        del self.messages[self._first_turn :]

    @property
    def _first_turn(self) -> int:
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def _render(self, messages: list[Message], asked: Message) -> Prompt:
        return self._model.template.render([*messages, asked])

    def _fitting(self, asked: Message, max_tokens: int | None) -> tuple[list[Message], list[int]]:
        """Return what is kept of the messages, and the ids of the prompt.

        Under the policy `trim`, as many of the newest turns are kept as leave room for an answer.
        """
        context, encode = self._model.plan.context, self._model.tokenizer.encode_prompt
        kept = list(self.messages)
        ids = encode(self._render(kept, asked))
        if self._overflow == "trim":
            room = min(max_tokens or ANSWER_TOKENS, context // 2)
            while len(ids) + room > context and len(kept) > self._first_turn:
                del kept[self._first_turn : self._first_turn + 2]  # a question and its answer
                ids = encode(self._render(kept, asked))
        if len(ids) >= context:
            raise ContextOverflow(len(ids), context)
        return kept, ids
