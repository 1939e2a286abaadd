"""What the routes do: requests in, answers or streams of events out. What is computed is decided elsewhere."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import psutil
from sse_starlette import ServerSentEvent
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from edgelm.errors import BudgetTooSmall, UnsupportedModel
from edgelm.sizes import parse_size
from edgelm_apps.server import answers, jobs, replies, responses
from edgelm_apps.server.answers import Piece
from edgelm_apps.server.bodies import as_json, decoded, log_defect
from edgelm_apps.server.errors import Refused, body_of
from edgelm_apps.server.metrics import Metrics
from edgelm_apps.server.openapi import document
from edgelm_apps.server.pool import Pool, Served
from edgelm_apps.server.queue import Full, Place, Queue
from edgelm_apps.server.streams import SOON_S, alive, as_event, events_response, joined, watched
from edgelm_apps.server.wire import (
    BudgetRequest,
    ChatRequest,
    CompletionRequest,
    EmbeddingRequest,
    Request,
    ResponseRequest,
    StreamOptions,
)

if TYPE_CHECKING:
    from edgelm import Model, Usage

PAGE = Path(__file__).parent / "page"
Body = TypeVar("Body")
Asked = answers.ChatAsked | answers.CompletionAsked


@dataclass(frozen=True, slots=True)
class Settings:
    """How a server behaves; see `edgelm serve --help`."""

    key: str | None = None
    origins: tuple[str, ...] = ()
    names: tuple[str, ...] = ("localhost",)
    queue: int = 16
    keep_alive_s: float = 5.0
    most_bytes: int = 4_000_000
    sampling: dict[str, Any] = field(default_factory=dict)


class Server:
    """What the routes share."""

    def __init__(self, pool: Pool, settings: Settings) -> None:
        self.pool, self.settings = pool, settings
        self.queue = Queue(settings.queue)
        self.metrics = Metrics(pool, self.queue)
        self.usage: Usage | None = None

    # --- what requests mean

    async def chat(self, http: HttpRequest) -> Response:
        request = await self._read(http, ChatRequest)
        served = self.pool.find(request.model)
        asked = answers.of_chat(request, self.settings.sampling)
        if request.stream:
            shape = replies.ChatStream(served.name, asked.several_calls)
            told = partial(self._pieces_told, options=request.stream_options or StreamOptions(), shape=shape)
            return await self._events(http, request, served, self._making(asked), told)
        collected = await self._collected(http, request, served, self._making(asked))
        return as_json(replies.chat_completion(served.name, collected, asked.several_calls))

    async def respond(self, http: HttpRequest) -> Response:
        request = await self._read(http, ResponseRequest)
        served = self.pool.find(request.model)
        asked = responses.asked_of(request, self.settings.sampling)
        response = responses.Response(served.name, request)
        if request.stream:
            told = partial(self._response_told, response=response)
            return await self._events(http, request, served, self._making(asked), told)
        return as_json(response.whole(await self._collected(http, request, served, self._making(asked))))

    async def completion(self, http: HttpRequest) -> Response:
        request = await self._read(http, CompletionRequest)
        served = self.pool.find(request.model)
        asked = answers.of_completion(request, self.settings.sampling)
        if request.stream:
            if request.echo:
                raise Refused("echo is for answers that are not streamed", "echo")
            shape = replies.TextStream(served.name)
            told = partial(self._pieces_told, options=request.stream_options or StreamOptions(), shape=shape)
            return await self._events(http, request, served, self._making(asked), told)
        collected = await self._collected(http, request, served, self._making(asked))
        before = request.prompt if request.echo and isinstance(request.prompt, str) else ""
        return as_json(replies.text_completion(served.name, collected, before))

    async def embeddings(self, http: HttpRequest) -> Response:
        request = await self._read(http, EmbeddingRequest)
        served = self.pool.find(request.model)
        texts = [request.input] if isinstance(request.input, str) else request.input

        def vectors(model: Model) -> Generator[tuple[list[float], int], None, None]:
            if not model.embeds:
                raise UnsupportedModel(f"{served.name} writes texts; serve a model that embeds them, too")
            for text in texts:
                yield model.embed([text])[0].tolist(), len(model.tokenizer.encode(text))

        pieces = jobs.stream(self._enter(http, request), self.pool, served, vectors)
        found = [one async for one in watched(http, pieces)]
        encode = replies.as_base64 if request.encoding_format == "base64" else list
        data = [{"object": "embedding", "index": i, "embedding": encode(one)} for i, (one, _) in enumerate(found)]
        n_tokens = sum(n for _, n in found)
        usage = {"prompt_tokens": n_tokens, "total_tokens": n_tokens}
        return as_json({"object": "list", "data": data, "model": served.name, "usage": usage})

    async def models(self, http: HttpRequest) -> Response:
        return as_json({"object": "list", "data": [self._model(one) for one in self.pool.served.values()]})

    async def model(self, http: HttpRequest) -> Response:
        return as_json(self._model(self.pool.find(http.path_params["name"])))

    async def health(self, http: HttpRequest) -> Response:
        told = {
            "status": "ok",
            "model": self.pool.name,
            "busy": self.queue.busy,
            "waiting": len(self.queue),
        }
        return as_json(told)

    async def status(self, http: HttpRequest) -> Response:
        """What the page shows: the budget, where it goes, and what the newest answer took."""
        model = self.pool.loaded
        told: dict[str, Any] = {
            "models": list(self.pool.served),
            "model": self.pool.name,
            "waiting": len(self.queue),
            "busy": self.queue.busy,
            "rss_bytes": psutil.Process().memory_info().rss,
            "usage": replies.stats_of(self.usage) if self.usage else None,
        }
        if model is not None:
            plan = model.plan
            told |= {
                "backend": model.backend,
                "budget_bytes": plan.budget_bytes,
                "context": plan.context,
                "streamed_bytes": plan.streamed_bytes,
                "predicted_decode_tps": plan.predicted_decode_tps,
                "simulated": plan.simulated,
                "notes": list(model.notes),
            }
        return as_json(told)

    async def budget(self, http: HttpRequest) -> Response:
        request = await self._read(http, BudgetRequest)
        try:
            await self.pool.set_budget(parse_size(request.memory))
        except BudgetTooSmall as error:  # of what the client asks for, not of the server
            raise Refused(str(error), "memory") from error
        return await self.status(http)

    async def metrics_text(self, http: HttpRequest) -> Response:
        return Response(self.metrics.text(), media_type="text/plain; version=0.0.4")

    async def openapi(self, http: HttpRequest) -> Response:
        return as_json(document())

    async def page(self, http: HttpRequest) -> Response:
        return Response((PAGE / "index.html").read_bytes(), media_type="text/html")

    # --- how they are answered

    def _making(self, asked: Asked) -> Callable[[Model], Generator[Piece, None, None]]:
        """Return what makes the answers, from where the conversation was left if that is kept."""

        def make(model: Model) -> Generator[Piece, None, None]:
            if self.pool.shelf is not None:
                self.pool.shelf.provide(asked.prompt(model))
            yield from asked.answers(model)

        return make

    def _model(self, served: Served) -> dict[str, Any]:
        return {"id": served.name, "object": "model", "created": served.since, "owned_by": "edgelm"}

    async def _read(self, http: HttpRequest, kind: type[Body]) -> Body:
        return decoded(http.headers.get("content-type"), await http.body(), kind)

    def _enter(self, http: HttpRequest, request: Request) -> Place:
        address = http.client.host if http.client else ""
        try:
            return self.queue.enter(request.user or address)
        except Full:
            self.metrics.refused.inc()
            raise

    async def _collected(
        self,
        http: HttpRequest,
        request: Request,
        served: Served,
        make: Callable[[Model], Generator[Piece, None, None]],
    ) -> replies.Collected:
        collected = replies.Collected()
        pieces = jobs.stream(self._enter(http, request), self.pool, served, make)
        async for piece in watched(http, pieces):
            collected.add(piece, self._logprobs(piece))
            self._noted(piece)
        return collected

    async def _events(
        self,
        http: HttpRequest,
        request: Request,
        served: Served,
        make: Callable[[Model], Generator[Piece, None, None]],
        told: Callable[[AsyncGenerator[Piece, None]], AsyncIterator[dict[str, Any]]],
    ) -> Response:
        """Answer with the events that `told` makes of the pieces."""
        pieces = jobs.stream(self._enter(http, request), self.pool, served, make)
        # what is wrong is known soon, as a rule: then there is a status to tell it with
        first = asyncio.ensure_future(anext(pieces))
        await asyncio.wait({first}, timeout=min(SOON_S, self.settings.keep_alive_s / 2))
        if first.done() and (error := first.exception()) is not None:
            raise error

        async def events() -> AsyncIterator[ServerSentEvent]:
            ended = False
            try:
                if not first.done():
                    yield alive()
                async with aclosing(joined(first, pieces)) as found:
                    async for event in told(found):
                        yield as_event(event)
                ended = True
                if not isinstance(request, ResponseRequest):
                    yield ServerSentEvent("[DONE]", sep="\n")
            except Exception as error:
                ended = True
                log_defect(error)
                yield as_event(body_of(error))
            finally:
                if not ended:
                    self.metrics.cancelled.inc()

        return events_response(events(), self.settings.keep_alive_s)

    async def _pieces_told(
        self,
        pieces: AsyncGenerator[Piece, None],
        options: StreamOptions,
        shape: replies.ChatStream | replies.TextStream,
    ) -> AsyncIterator[dict[str, Any]]:
        last: dict[int, Usage] = {}
        async for piece in pieces:
            told = shape.piece(piece, self._logprobs(piece))
            if options.include_usage:
                told["usage"] = None
            if options.include_stats:
                told["edgelm"] = replies.stats_of(piece.chunk.usage)
            last[piece.number] = piece.chunk.usage
            self._noted(piece)
            yield told
        if options.include_usage:
            yield shape.end(list(last.values()))

    async def _response_told(
        self, pieces: AsyncGenerator[Piece, None], response: responses.Response
    ) -> AsyncIterator[dict[str, Any]]:
        for event in response.begun():
            yield event
        collected = replies.Collected()
        async for piece in pieces:
            collected.add(piece, None)
            self._noted(piece)
            if piece.chunk.text:
                yield response.piece(piece.chunk.text)
        for event in response.ended(collected):
            yield event

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        model = self.pool.loaded
        return replies.logprobs_of(model, piece.chunk) if model is not None else None

    def _noted(self, piece: Piece) -> None:
        self.usage = piece.chunk.usage
        if piece.chunk.finish_reason is not None:
            self.metrics.answered(piece.chunk.usage)
