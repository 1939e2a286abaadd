"""A conversation: messages, the template that renders them, and what happens when the context is full."""

from __future__ import annotations

import json
import warnings
from collections.abc import AsyncGenerator, Generator, Iterable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Unpack

from edgelm.errors import ConfigError, ContextOverflow, ModelFileError, ToolsIgnored
from edgelm.files.writing import whole_or_nothing
from edgelm.sequences import n_common
from edgelm.text.respelling import respelled
from edgelm.text.tools import ToolCall, ToolCallMatcher, checked_tools, hidden_marks

if TYPE_CHECKING:
    from edgelm.model import Model
    from edgelm.options import Options
    from edgelm.text.messages import Message
    from edgelm.text.prompt import Prompt
    from edgelm.turns import Turn
    from edgelm.usage import Chunk, Sample

Overflow = Literal["error", "trim"]
ANSWER_TOKENS = 256
"""Room that `trim` makes for an answer whose length is not limited."""


class Chat:
    """A chat with one model. Turns already in the KV cache are not computed again.

    `messages` are dicts of `role` and `content`, the system message first if there is one. A turn that fails leaves
    them as they were; one that is cancelled keeps the text so far.
    """

    def __init__(
        self,
        model: Model,
        system: str | None,
        overflow: Overflow,
        keep: bool = False,
        tools: Iterable[Mapping[str, Any]] = (),
    ) -> None:
        if overflow not in ("error", "trim"):
            raise ConfigError(f"overflow must be 'error' or 'trim', got {overflow!r}")
        self._model, self._overflow, self._keep = model, overflow, keep
        self._tools = checked_tools(tools)
        self._marks = hidden_marks(model.tokenizer) if self._tools else {}
        self._said: list[int] = []  # the last prompt and its answer: what a model spelled is not spelled anew
        self.messages: list[Message] = [{"role": "system", "content": system}] if system else []
        if self._tools and self.render("x") == model.template.render([*self.messages, _said_by_user("x")]).text:
            warnings.warn(
                "the chat template of this model leaves tools out, so it never hears of them; describe them in the "
                "system message, or force a call with json_schema (docs/structured.md)",
                ToolsIgnored,
                stacklevel=3,
            )

    def send(self, text: str, **options: Unpack[Options]) -> str:
        """Return the answer to `text`."""
        return "".join(chunk.text for chunk in self.stream(text, **options))

    def stream(self, text: str, **options: Unpack[Options]) -> Generator[Chunk, None, None]:
        """Yield the answer to `text` piece by piece; see `Model.stream`."""
        return self.answer([_said_by_user(text)], **options)

    def astream(self, text: str, **options: Unpack[Options]) -> AsyncGenerator[Chunk, None]:
        """Like `stream`, for asyncio; see `aanswer`."""
        return self.aanswer([_said_by_user(text)], **options)

    def answer(self, messages: Sequence[Message], **options: Unpack[Options]) -> Generator[Chunk, None, None]:
        """Yield the answer to messages that are new, of whatever roles; see `stream`."""
        return self._answer(self._model.turns.ask(), list(messages), options)

    async def aanswer(self, messages: Sequence[Message], **options: Unpack[Options]) -> AsyncGenerator[Chunk, None]:
        """Like `answer`, for asyncio; see `Model.astream`. Other streams go on if this one is stopped."""
        from edgelm.aio import iterate

        turn = self._model.turns.ask()
        stream = partial(self._answer, turn, list(messages), options)
        async with aclosing(iterate(stream, partial(self._model.turns.cancel, turn))) as chunks:
            async for chunk in chunks:
                yield chunk

    def tool_results(
        self, results: Sequence[tuple[ToolCall, str]], **options: Unpack[Options]
    ) -> Generator[Chunk, None, None]:
        """Yield the answer to what the called tools returned, a text each; see `stream`."""
        asked: list[Message] = [{"role": "tool", "name": call.name, "content": result} for call, result in results]
        if not asked:
            raise ConfigError("there is no result of a tool to answer; give one for each call")
        return self.answer(asked, **options)

    def _answer(self, turn: Turn, asked: list[Message], options: Options) -> Generator[Chunk, None, None]:
        messages, ids = self._fitting(asked, options.get("max_tokens"))
        matcher = ToolCallMatcher(tool["function"]["name"] for tool in self._tools) if self._tools else None
        stops = options.get("stop", ())
        options["stop"] = [*([stops] if isinstance(stops, str) else stops), *self._model.template.stops]
        answer: list[str] = []
        said = list(ids)
        chunks = self._model.stream_turn(turn, lambda: ids, options, self._kept_ids())
        answered = False
        calls: tuple[ToolCall, ...] = ()
        try:
            for chunk in chunks:
                mark = ""
                if chunk.token_id is not None:
                    said.append(chunk.token_id)
                    mark = self._marks.get(chunk.token_id, "")
                if matcher is not None:
                    shown = matcher.feed(mark + chunk.text)
                    if chunk.token_id is None:
                        rest, calls = matcher.flush()
                        shown += rest
                    chunk = replace(chunk, text=shown, tool_calls=calls)
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
                self.messages[:] = [*messages, *asked, _answered("".join(answer), calls)]
                self._said = said

    def samples(self, text: str, n: int, **options: Unpack[Options]) -> list[Sample]:
        """Return `n` answers to `text`, see `Model.samples`; the conversation stays as it was."""
        most = options.get("max_tokens")
        _, ids = self._fitting([_said_by_user(text)], most and n * most)
        stops = options.get("stop", ())
        options["stop"] = [*([stops] if isinstance(stops, str) else stops), *self._model.template.stops]
        return self._model.samples_of(ids, n, **options)

    def render(self, text: str) -> str:
        """Return the prompt that `text` would lead to, as the model reads it."""
        return self._render(self.messages, [_said_by_user(text)]).text

    def save(self, path: str | PathLike[str]) -> str:
        """Write the conversation to `path` as JSON, and what the model has computed of it beside it, in `path` + ".kv".

        The second file only spares time: without it `load` computes the conversation again. Returns a sentence on why
        there is none, or nothing. Raises `ConfigError` if `path` cannot be written.
        """
        target = Path(path)
        content = {"edgelm": 1, "model": self._model.file.name, "messages": self.messages}
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with whole_or_nothing(target, private=True) as file:
                file.write(json.dumps(content, indent=1, ensure_ascii=False).encode())
        except OSError as error:
            raise ConfigError(f"{target} cannot be written ({error.strerror}); name another file") from error
        try:
            self._model.save_cache(_computed(target))
        except (OSError, ConfigError) as error:
            _computed(target).unlink(missing_ok=True)  # of an earlier conversation
            return f"only the messages are saved, and computed again when they are loaded: {error}"
        return ""

    def load(self, path: str | PathLike[str]) -> str:
        """Go on with a conversation that was saved; return a sentence on what has to be computed again, or nothing.

        Raises `ConfigError` for a file that is no conversation; nothing has changed then.
        """
        source = Path(path)
        try:
            content = json.loads(source.read_bytes())
            if content["edgelm"] != 1:
                raise ConfigError(f"{source} was saved by a newer edgelm; update edgelm to read it")
            messages = [
                {**one, "role": str(one["role"]), "content": str(one["content"])} for one in content["messages"]
            ]
        except OSError as error:
            raise ConfigError(f"{source} cannot be read ({error.strerror}); check the name") from error
        except (KeyError, TypeError, ValueError) as error:
            raise ConfigError(f"{source} is no saved conversation; save one with /save or `Chat.save`") from error
        self.messages[:], self._said = messages, []
        try:
            self._model.load_cache(_computed(source))
            self._said = list(self._model.stored)
        except (OSError, ConfigError, ModelFileError) as error:
            why = "nothing of that was saved" if isinstance(error, FileNotFoundError) else str(error)
            return f"the conversation is computed again with its next turn: {why}"
        return ""

    def _kept_ids(self) -> list[int]:
        """Return the ids that every prompt of this conversation begins with, if they are to be kept."""
        if not self._keep or not self._first_turn:
            return []
        encode, system = self._model.tokenizer.encode_prompt, self.messages[:1]
        one, other = (encode(self._render(system, [_said_by_user(text)])) for text in ("a", "1"))
        return one[: n_common(one, other)]

    def clear(self) -> None:
        """Forget everything but the system message."""
        del self.messages[self._first_turn :]
        self._said = []

    @property
    def _first_turn(self) -> int:
        return int(bool(self.messages) and self.messages[0]["role"] == "system")

    def _render(self, messages: list[Message], asked: list[Message]) -> Prompt:
        return self._model.template.render([*messages, *asked], tools=self._tools or None)

    def _ids(self, messages: list[Message], asked: list[Message]) -> list[int]:
        tokenizer = self._model.tokenizer
        return respelled(tokenizer, tokenizer.encode_prompt(self._render(messages, asked)), self._said)

    def _fitting(self, asked: list[Message], max_tokens: int | None) -> tuple[list[Message], list[int]]:
        """Return what is kept of the messages, and the ids of the prompt.

        Under the policy `trim`, as many of the newest turns are kept as leave room for an answer.
        """
        context, kept = self._model.plan.context, list(self.messages)
        ids = self._ids(kept, asked)
        if self._overflow == "trim":
            room = min(max_tokens or ANSWER_TOKENS, context // 2)
            while len(ids) + room > context and len(kept) > self._first_turn:
                del kept[self._first_turn : self._first_turn + 2]  # a question and its answer
                ids = self._ids(kept, asked)
        if len(ids) >= context:
            raise ContextOverflow(len(ids), context)
        return kept, ids


def _computed(path: Path) -> Path:
    """Return where the keys and values of a saved conversation are."""
    return path.with_name(f"{path.name}.kv")


def _said_by_user(text: str) -> Message:
    return {"role": "user", "content": text}


def _answered(text: str, calls: tuple[ToolCall, ...]) -> Message:
    """Return the message of an answer."""
    if not calls:
        return {"role": "assistant", "content": text}
    functions = [{"type": "function", "function": {"name": one.name, "arguments": one.arguments}} for one in calls]
    return {"role": "assistant", "content": text, "tool_calls": functions}
