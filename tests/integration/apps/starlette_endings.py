"""Starlette: an endpoint for each way in which a request ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.applications import Starlette
from starlette.background import BackgroundTask
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.gzip import GZipMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route, WebSocketRoute
from starlette.websockets import WebSocket

from outbox import auto_publishing, enqueue_event
from outbox.middleware.asgi import OutboxMiddleware
from tests.integration.apps import endings
from tests.integration.apps.endings import OutOfStock, either, session_of_request


class _Starlette:
    def respond(
        self, status: int, *, background: Callable[[], Awaitable[None]] | None = None
    ) -> Response:
        task = None if background is None else BackgroundTask(background)
        return PlainTextResponse("ended", status, background=task)

    def stream(self, parts: AsyncIterator[bytes] | Iterator[bytes]) -> Response:
        return StreamingResponse(parts)

    def http_error(self, status: int) -> Exception:
        return HTTPException(status)

    async def in_thread(self, function: Callable[[], object]) -> None:
        await run_in_threadpool(function)


@asynccontextmanager
async def lifespan(_: Starlette) -> AsyncIterator[None]:
    enqueue_event({}, "lifespan.startup")
    yield
    enqueue_event({}, "lifespan.shutdown")


async def out_of_stock(_: Request, error: Exception) -> Response:
    assert isinstance(error, OutOfStock)
    return PlainTextResponse("out of stock", error.status)


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


def plain(endpoint: Callable[..., Awaitable[Any]]) -> Callable[[Request], Awaitable[Any]]:
    async def respond(_: Request) -> Any:
        return await endpoint(_Starlette())

    return respond


def with_session(endpoint: Callable[..., Awaitable[Any]]) -> Callable[[Request], Awaitable[Any]]:
    async def respond(_: Request) -> Any:
        async with asynccontextmanager(session_of_request)() as session:
            return await endpoint(_Starlette(), session)

    return respond


def sync_endpoint(_: Request) -> Response:
    endings.store_in_thread()
    return PlainTextResponse("ended")


async def in_block(_: Request) -> Response:
    async with auto_publishing(independent=True):
        enqueue_event({}, "block")
    return PlainTextResponse("ended", 409)


async def websocket(connection: WebSocket) -> None:
    await connection.accept()
    enqueue_event({}, "websocket.connection")
    async for _ in connection.iter_text():
        async with auto_publishing():
            enqueue_event({}, "websocket.message")
        await connection.send_text("done")


def nested(target: str, *middleware: Middleware) -> Starlette:
    """Return an application with only one endpoint."""

    async def endpoint(_: Request) -> Response:
        enqueue_event({}, target)
        return PlainTextResponse("ended")

    return Starlette(routes=[Route("/", endpoint)], middleware=middleware)


outbox, base = Middleware(OutboxMiddleware), Middleware(BaseHTTPMiddleware, dispatch=pass_on)
shop = Starlette(
    routes=[
        *(Route(f"/{name}", plain(each)) for name, each in endings.PLAIN.items()),
        *(Route(f"/{name}", with_session(each)) for name, each in endings.WITH_SESSION.items()),
        Route("/sync_endpoint", sync_endpoint),
        Route("/block", in_block),
        Mount("/mounted", nested("mounted", outbox)),
        WebSocketRoute("/websocket", websocket),
    ],
    middleware=[
        Middleware(CORSMiddleware, allow_origins=["*"]),
        outbox,
        Middleware(GZipMiddleware, minimum_size=1),
    ],
    exception_handlers={OutOfStock: out_of_stock},
    lifespan=lifespan,
)
app = either(
    shop,
    {
        "/base_above": nested("base_above", base, outbox),
        "/base_below": nested("base_below", outbox, base),
        "/only_mounted": Starlette(routes=[Mount("/mounted", nested("only_mounted", outbox))]),
    },
)
