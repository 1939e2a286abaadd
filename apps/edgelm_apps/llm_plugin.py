"""A plug-in for the program `llm`: the models of this machine as `edgelm/NAME`, inside a memory budget.

    llm -m edgelm/smollm2-135m-instruct "What is a compiler?" -o memory 300MB

`llm` imports this module at every start, so it imports no engine; a model is loaded when it is first asked.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncGenerator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import llm
from llm.models import EmbeddingModel
from pydantic import Field

if TYPE_CHECKING:
    from edgelm import Chunk
    from edgelm_apps.holding import Question

PREFIX = "edgelm/"
OLDEST = "0.32"
"""The oldest `llm` that tells its models whole conversations, as this module wants them."""
EMBEDDING = ("bert", "nomic-bert", "gemma-embedding")
"""Architectures that turn texts into vectors."""


class EdgeLMOptions(llm.Options):
    """What `-o NAME VALUE` may say; edgelm checks the values."""

    memory: int | str | None = Field(default=None, description="Budget of the whole process, such as 300MB")
    backend: str | None = Field(default=None, description="What computes: one of `edgelm backends`")
    threads: int | None = Field(default=None, description="Computing threads")
    context: int | None = Field(default=None, description="Tokens that conversation and answer may have")
    kv: str | None = Field(default=None, description="Type of keys and values: f16, q8_0, q4_0, auto")
    draft: str | None = Field(default=None, description="A smaller model that guesses tokens, or auto")
    max_tokens: int | None = Field(default=None, description="Longest answer, in tokens")
    temperature: float | None = Field(default=None, description="0, the default, always takes the likeliest token")
    top_k: int | None = Field(default=None, description="Choose among the K likeliest tokens")
    top_p: float | None = Field(default=None, description="Choose among the likeliest tokens that add up to P")
    min_p: float | None = Field(default=None, description="Drop tokens less likely than P times the likeliest")
    repeat_penalty: float | None = Field(default=None, description="Divide the logits of recent tokens by this")
    presence_penalty: float | None = Field(default=None, description="Subtract this from the logit of tokens seen")
    frequency_penalty: float | None = Field(default=None, description="Subtract this for each time a token was seen")
    seed: int | None = Field(default=None, description="Makes sampling repeatable")
    stop: str | list[str] | None = Field(default=None, description="End the answer before this text")
    regex: str | None = Field(default=None, description="Answer with text that matches this pattern")


class _Shared:
    """What both kinds of model have in common."""

    can_stream = True
    supports_schema = True
    supports_tools = True

    def __init__(self, name: str, path: str) -> None:
        self.model_id, self._path = PREFIX + name, path

    def _asked(self, prompt: llm.Prompt, conversation: Any) -> tuple[str, dict[str, Any], Question]:
        from edgelm_apps.holding import ENGINE, Question, closed

        options = prompt.options.model_dump(exclude_none=True)
        engine = {name: options.pop(name) for name in ENGINE if name in options}
        if prompt.schema:
            options["json_schema"] = closed(prompt.schema)
        tools = [
            {"name": tool.name, "description": tool.description or "", "parameters": tool.input_schema or _NOTHING}
            for tool in prompt.tools
        ]
        return self._path, engine, Question(_messages(prompt), options, tools, kept=_kept(conversation))

    def _done(self, chunk: Chunk, response: Any) -> None:
        """Tell `llm` of the end of an answer: its calls of tools, its tokens, and edgelm's own statistics."""
        from edgelm_apps.engine import statistics

        for call in chunk.tool_calls:
            response.add_tool_call(llm.ToolCall(call.name, call.arguments, f"call_{secrets.token_hex(8)}"))
        usage = chunk.usage
        details = {"cached_tokens": usage.cached_tokens} if usage.cached_tokens else None
        response.set_usage(input=usage.prompt_tokens, output=usage.completion_tokens, details=details)
        response.response_json = {
            "finish_reason": chunk.finish_reason,
            "backend": usage.backend,
            "budget_bytes": usage.budget_bytes,
            "stats": statistics(usage),
        }


class EdgeLM(_Shared, llm.Model):
    """A model that answers, one answer at a time."""

    Options = EdgeLMOptions  # type: ignore[assignment]

    def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> Iterator[str]:
        from edgelm_apps.holding import answer

        for chunk in answer(*self._asked(prompt, conversation)):
            if chunk.text:
                yield chunk.text
            if chunk.finish_reason:
                self._done(chunk, response)


class AsyncEdgeLM(_Shared, llm.AsyncModel):
    """The same for asyncio."""

    Options = EdgeLMOptions  # type: ignore[assignment]

    async def execute(self, prompt: Any, stream: bool, response: Any, conversation: Any) -> AsyncGenerator[str, None]:
        from contextlib import aclosing

        from edgelm_apps.holding import aanswer

        async with aclosing(aanswer(*self._asked(prompt, conversation))) as chunks:
            async for chunk in chunks:
                if chunk.text:
                    yield chunk.text
                if chunk.finish_reason:
                    self._done(chunk, response)


class EmbeddingEdgeLM(EmbeddingModel):
    """A model that turns texts into vectors."""

    def __init__(self, name: str, path: str) -> None:
        self.model_id, self._path = PREFIX + name, path

    def embed_batch(self, items: Iterable[str | bytes], *, key: str | None = None) -> Iterator[list[float]]:
        from edgelm_apps.holding import give_back, take

        held = take(self._path, {})
        try:
            for item in items:
                assert isinstance(item, str), "llm lets no bytes through to a model of texts"
                yield held.model.embed([item])[0].tolist()
        finally:
            give_back(held)


_NOTHING = {"type": "object", "properties": {}}


def _messages(prompt: llm.Prompt) -> list[dict[str, Any]]:
    """Return a conversation in edgelm's words."""
    from llm.parts import TextPart, ToolCallPart, ToolResultPart

    told: list[dict[str, Any]] = []
    for message in prompt.messages:
        results = [part for part in message.parts if isinstance(part, ToolResultPart)]
        told += [{"role": "tool", "name": part.name, "content": part.output} for part in results]
        if message.role == "tool":
            continue
        text = "".join(part.text for part in message.parts if isinstance(part, TextPart))
        one: dict[str, Any] = {"role": message.role, "content": text}
        calls = [part for part in message.parts if isinstance(part, ToolCallPart)]
        if calls:
            functions = [{"name": call.name, "arguments": call.arguments} for call in calls]
            one["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        told.append(one)
    return told


def _kept(conversation: Any) -> Path | None:
    """Return where what is computed of a conversation is kept: of one that `llm` has in its log, and goes on with."""
    if conversation is None or not getattr(conversation, "loaded_messages", None):
        return None
    from edgelm_models.cache import cache_dir

    return cache_dir() / "llm" / f"{conversation.id}.json"


def _added_path() -> Path:
    return Path(llm.user_dir()) / "edgelm-models.json"  # type: ignore[no-untyped-call]


def _added() -> dict[str, dict[str, Any]]:
    """Return the files that were added by name: `{"path": ..., "embeds": ...}` each."""
    try:
        found: dict[str, dict[str, Any]] = json.loads(_added_path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        click.echo(f"edgelm: {_added_path()} cannot be read ({error}); its models are left out", err=True)
        return {}
    return found


@llm.hookimpl
def register_models(register: Any) -> None:
    """Tell `llm` of what is in the cache and the catalogue, and of added files."""
    try:
        import llm.parts  # noqa: F401
    except ImportError:
        click.echo(f"edgelm: its models need llm {OLDEST} or newer: pip install 'edgelm[llm]'", err=True)
        return
    from edgelm_models.listing import listing

    found = {model.name: model.name for model in listing()}
    found |= {name: one["path"] for name, one in _added().items() if not one["embeds"]}
    for name, path in found.items():
        register(EdgeLM(name, path), AsyncEdgeLM(name, path))


@llm.hookimpl
def register_embedding_models(register: Any) -> None:
    """Tell `llm` of the models that embed texts; what is in the cache has to be looked into."""
    from edgelm_models.cache import cached_models
    from edgelm_models.catalogue import CATALOGUE

    found = {model.name: model.file for model in cached_models() if model.name not in CATALOGUE and _embeds(model.file)}
    found |= {name: one["path"] for name, one in _added().items() if one["embeds"]}
    for name, path in found.items():
        register(EmbeddingEdgeLM(name, path))


def _embeds(path: str) -> bool:
    import edgelm

    try:
        return edgelm.inspect(path).architecture in EMBEDDING
    except edgelm.EdgeLMError:
        return False


@llm.hookimpl
def register_commands(cli: click.Group) -> None:
    """Add `llm edgelm`."""

    @cli.group(name="edgelm")
    def group() -> None:
        """Files that edgelm runs; pulled models are there without being added."""

    @group.command()
    @click.argument("path", type=click.Path(exists=True, resolve_path=True, path_type=Path))
    @click.argument("name", required=False)
    def add(path: Path, name: str | None) -> None:
        """Make the model file or folder PATH known as edgelm/NAME."""
        import edgelm

        try:
            architecture = edgelm.inspect(path).architecture
        except edgelm.EdgeLMError as error:
            raise click.ClickException(str(error)) from error
        name = name or path.stem
        _write({**_added(), name: {"path": str(path), "embeds": architecture in EMBEDDING}})
        click.echo(f"{PREFIX}{name}: {path}")

    @group.command()
    @click.argument("name")
    def remove(name: str) -> None:
        """Forget edgelm/NAME; its file stays."""
        added = _added()
        name = name.removeprefix(PREFIX)
        if name not in added:
            raise click.ClickException(f"nothing was added as {name!r} (added: {', '.join(added) or 'nothing'})")
        _write({other: one for other, one in added.items() if other != name})


def _write(added: dict[str, dict[str, Any]]) -> None:
    _added_path().write_text(json.dumps(added, indent=1) + "\n", encoding="utf-8")
