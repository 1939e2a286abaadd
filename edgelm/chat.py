"""A conversation: messages, the template that renders them, and what happens when the context is full."""

from __future__ import annotations

from collections.abc import Generator
from typing import TYPE_CHECKING, Literal, Unpack

from edgelm.errors import ConfigError, ContextOverflow

if TYPE_CHECKING:
    from edgelm.model import Model, Options
    from edgelm.text.messages import Message
    from edgelm.text.prompt import Prompt
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
        asked: Message = {"role": "user", "content": text}
        ids = self._fitting(asked, options.get("max_tokens"))
        stops = options.get("stop", ())
        options["stop"] = [*([stops] if isinstance(stops, str) else stops), *self._model.template.stops]
        answer: list[str] = []
        chunks = self._model.stream_ids(ids, **options)
        done = False
        try:
            for chunk in chunks:
                answer.append(chunk.text)
                done = done or bool(answer)
                yield chunk
        finally:
            chunks.close()
            if done:
                self.messages += [asked, {"role": "assistant", "content": "".join(answer)}]

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

    def _fitting(self, asked: Message, max_tokens: int | None) -> list[int]:
        """Return the ids of the prompt; under the policy `trim`, of as many of the newest turns as leave room."""
        context, encode = self._model.plan.context, self._model.tokenizer.encode_prompt
        ids = encode(self._render(self.messages, asked))
        if self._overflow == "error":
            if len(ids) >= context:
                raise ContextOverflow(len(ids), context)
            return ids
        room = min(max_tokens or ANSWER_TOKENS, context // 2)
        kept = list(self.messages)
        while len(ids) + room > context and len(kept) > self._first_turn:
            del kept[self._first_turn : self._first_turn + 2]  # a question and its answer
            ids = encode(self._render(kept, asked))
        if len(ids) >= context:
            raise ContextOverflow(len(ids), context)
        self.messages = kept
        return ids
