"""The HTTP application: routes, limits on what comes in, answers whole or as server-sent events."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from memc.errors import MemcError
from memc.runtime import Session
from memc.serve import protocol
from memc.serve.engine import Engine, Finished, Job, Limits, Order, Piece, Started
from memc.serve.protocol import Answer, ChatRequest, CompletionRequest, RequestError

T = TypeVar("T")

_HOST = re.compile(r"(?:\[(?P<address>[0-9A-Fa-f:.]+)\]|(?P<name>[A-Za-z0-9._-]+))(?::[0-9]*)?")

BODY_SECONDS = 30.0
"""Time that a caller has to send a request."""


def make_app(
    session: Session, limits: Limits, name: str, *, hosts: frozenset[str] | None = None, key: str | None = None
) -> Starlette:
    """Build the application that serves ``session`` as the model ``name``.

    Its ``state.engine`` is the ``Engine``. With ``hosts`` a request must name one of them: a page in a browser can make
    its own host name lead to a loopback address (DNS rebinding), but not send another one. With ``key`` it must bring
    that one, but to ask for ``/health``. Raises ``MemcError`` E208 for an encoder.
    """
    service = _Service(session, limits, name, hosts, key)

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        yield
        await service.engine.close()

    app = Starlette(
        routes=[
            Route("/health", service.health),
            Route("/v1/models", service.models),
            Route("/v1/models/{model:path}", service.model),
            Route("/v1/completions", service.answering(CompletionRequest), methods=["POST"]),
            Route("/v1/chat/completions", service.answering(ChatRequest), methods=["POST"]),
        ],
        exception_handlers={
            RequestError: _refused,
            MemcError: _failed,
            HTTPException: _http_error,
            Exception: _broken,
        },
        lifespan=lifespan,
    )
    app.state.engine = service.engine
    return app


class _Service:
    """The handlers of one application."""

    def __init__(
        self, session: Session, limits: Limits, name: str, hosts: frozenset[str] | None, key: str | None
    ) -> None:
        self.engine = Engine(session, limits)
        self.name = name
        self.hosts = hosts
        self.key = None if key is None else key.encode()
        text = json.dumps(session.manifest.model_dump(by_alias=True), sort_keys=True)
        self.fingerprint = f"memc-{hashlib.sha256(text.encode()).hexdigest()[:12]}"

    async def health(self, request: Request) -> Response:
        """Answer 200 while requests are taken, with how many are here."""
        state = {"status": "closing" if self.engine.closed else "ok", "requests": len(self.engine.jobs)}
        return JSONResponse(state, 503 if self.engine.closed else 200)

    async def models(self, request: Request) -> Response:
        """List the one model."""
        self._admit(request)
        return JSONResponse({"object": "list", "data": [self._model()]})

    async def model(self, request: Request) -> Response:
        """Describe the model, if it is that one."""
        self._admit(request)
        self._known(request.path_params["model"])
        return JSONResponse(self._model())

    def answering(self, kind: type[protocol.Request]) -> Callable[[Request], Awaitable[Response]]:
        """Return the handler of one kind of request."""

        async def handler(request: Request) -> Response:
            self._admit(request)
            asked = protocol.parse(await self._body(request), kind)
            self._known(asked.model)
            job = self.engine.submit(self._order(asked))
            answer = Answer(asked, self.fingerprint)
            try:
                if not asked.stream:
                    return JSONResponse(await _unless_gone(request, _whole(job, answer)))
                started = await _unless_gone(request, job.next())
                assert isinstance(started, Started)
            except BaseException:
                job.cancel()
                raise
            return _Events(job, answer)

        return handler

    def _admit(self, request: Request) -> None:
        """Refuse a request without the key, before any of it is read; any wrong key takes as long to tell."""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        if self.key is not None and not (kind.lower() == "bearer" and hmac.compare_digest(given.encode(), self.key)):
            headers = {"WWW-Authenticate": "Bearer", "Connection": "close"}
            raise RequestError(401, "this server asks for its API key", code="invalid_api_key", headers=headers)

    def _model(self) -> dict[str, Any]:
        return {
            "id": self.name,
            "object": "model",
            "created": 0,
            "owned_by": "memc",
            "max_model_len": self.engine.tokens,
        }

    def _known(self, name: str) -> None:
        if name != self.name:
            raise RequestError(404, f"there is no model {name!r} here, but {self.name!r}", "model", "model_not_found")

    def _order(self, asked: protocol.Request) -> Order:
        most = self.engine.limits.answer
        if asked.limit is not None and asked.limit > most:
            raise RequestError(400, f"max_tokens is {asked.limit}: at most {most} are drawn here", "max_tokens")
        return Order(
            prompt=asked.input,
            max_new_tokens=asked.limit,
            temperature=asked.temperature,
            top_k=asked.top_k,
            top_p=asked.top_p,
            seed=asked.seed,
            stop=tuple(asked.stops),
        )

    async def _body(self, request: Request) -> bytes:
        """Read the body of a request that is meant for this server."""
        if self.hosts is not None and (host := _host(request)) not in self.hosts:
            raise RequestError(403, f"this server is not {host!r}")
        # A page in a browser may send any other type to any address without asking first.
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise RequestError(415, "the content type must be application/json")
        most, body = self.engine.limits.body_bytes, bytearray()
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise RequestError(
                            413, f"the request is larger than {most} bytes", headers={"Connection": "close"}
                        )
        except TimeoutError:
            raise RequestError(408, "the request took too long to arrive", headers={"Connection": "close"}) from None
        return bytes(body)


def _host(request: Request) -> str:
    """Return the name in the ``Host`` header, without its port; what is no name of a host as it stands.

    ``request.url`` says the address of the socket in place of one that it cannot read.
    """
    given = request.headers.get("host", "")
    read = _HOST.fullmatch(given)
    return (read["address"] or read["name"]).lower() if read else given


class _Events(StreamingResponse):
    """A stream of server-sent events; the work ends with it, however it ends."""

    def __init__(self, job: Job, answer: Answer) -> None:
        super().__init__(_events(job, answer), media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self.job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.cancel()


async def _events(job: Job, answer: Answer) -> AsyncIterator[str]:
    for document in answer.opening():
        yield _event(document)
    try:
        while not isinstance(event := await job.next(), Finished):
            if isinstance(event, Piece):
                yield _event(answer.piece(event.text))
    except (RequestError, MemcError) as error:  # the status has gone out already
        yield _event((error if isinstance(error, RequestError) else RequestError.of(error)).body())
        return
    for document in answer.closing(event.reason, protocol.usage(event.prompt, event.new, event.cached)):
        yield _event(document)
    yield "data: [DONE]\n\n"


def _event(document: dict[str, Any]) -> str:
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n"


async def _whole(job: Job, answer: Answer) -> dict[str, Any]:
    text = ""
    while not isinstance(event := await job.next(), Finished):
        text += event.text if isinstance(event, Piece) else ""
    return answer.whole(text, event.reason, protocol.usage(event.prompt, event.new, event.cached))


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Await ``work``, or raise ``ClientDisconnect`` as soon as whoever asked for it is gone."""

    async def leaving() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    gone, done = asyncio.ensure_future(leaving()), asyncio.ensure_future(work)
    try:
        await asyncio.wait({gone, done}, return_when=asyncio.FIRST_COMPLETED)
        if not done.done():
            raise ClientDisconnect
        return done.result()
    finally:
        gone.cancel()
        done.cancel()


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return JSONResponse(error.body(), error.status, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    assert isinstance(error, MemcError)
    return await _refused(request, RequestError.of(error))


async def _broken(request: Request, error: Exception) -> Response:
    return await _refused(request, RequestError(500, "internal error"))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    what = RequestError(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(what.body(), what.status, error.headers)
