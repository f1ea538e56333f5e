"""Litestar: an endpoint for each way in which a request ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import anyio.to_thread
from litestar import Litestar, Request, Response, WebSocket, asgi, get, websocket
from litestar.background_tasks import BackgroundTask
from litestar.config.compression import CompressionConfig
from litestar.config.cors import CORSConfig
from litestar.di import Provide
from litestar.exceptions import HTTPException, WebSocketDisconnect
from litestar.response import Stream
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

from outbox import auto_publishing, enqueue_event
from outbox.middleware.asgi import OutboxMiddleware
from tests.integration.apps import endings
from tests.integration.apps.endings import OutOfStock, either, session_of_request


class _Litestar:
    def respond(
        self, status: int, *, background: Callable[[], Awaitable[None]] | None = None
    ) -> Response[str]:
        task = None if background is None else BackgroundTask(background)
        return Response("ended", status_code=status, background=task)

    def stream(self, parts: AsyncIterator[bytes] | Iterator[bytes]) -> Stream:
        return Stream(parts)

    def http_error(self, status: int) -> Exception:
        return HTTPException(status_code=status)

    async def in_thread(self, function: Callable[[], object]) -> None:
        await anyio.to_thread.run_sync(function)


async def started() -> None:
    enqueue_event({}, "lifespan.startup")


async def stopped() -> None:
    enqueue_event({}, "lifespan.shutdown")


async def block() -> AsyncIterator[None]:
    async with auto_publishing(independent=True):
        yield


def out_of_stock(_: Request[Any, Any, Any], error: OutOfStock) -> Response[str]:
    return Response("out of stock", status_code=error.status)


def plain(name: str, endpoint: Callable[..., Awaitable[Any]]) -> Any:
    @get(f"/{name}")
    async def respond() -> Any:
        return await endpoint(_Litestar())

    return respond


def with_session(name: str, endpoint: Callable[..., Awaitable[Any]]) -> Any:
    @get(f"/{name}", dependencies={"session": Provide(session_of_request)})
    async def respond(session: AsyncSession) -> Any:
        return await endpoint(_Litestar(), session)

    return respond


@get("/sync_endpoint", sync_to_thread=True)
def sync_endpoint() -> str:
    endings.store_in_thread()
    return "ended"


@get("/block", dependencies={"block": Provide(block)}, status_code=409)
async def in_block(block: None) -> str:
    enqueue_event({}, "block")
    return "ended"


@websocket("/websocket")
async def connection(socket: WebSocket[Any, Any, Any]) -> None:
    await socket.accept()
    enqueue_event({}, "websocket.connection")
    try:
        while True:
            await socket.receive_text()
            async with auto_publishing():
                enqueue_event({}, "websocket.message")
            await socket.send_text("done")
    except WebSocketDisconnect:
        pass


def nested(target: str, **settings: Any) -> Any:
    """Return an application with an endpoint that succeeds and another that fails."""

    @get("/")
    async def endpoint() -> str:
        enqueue_event({}, target)
        return "ended"

    @get("/fails")
    async def fails() -> str:
        enqueue_event({}, f"{target}.fails")
        raise ValueError

    return Litestar([endpoint, fails], openapi_config=None, **settings)


def mounted(target: str) -> Any:
    """Return a handler that serves an application with its own middleware at ``/mounted``."""
    application = OutboxMiddleware(nested(target))

    @asgi("/mounted", is_mount=True, copy_scope=True)
    async def serve(scope: Any, receive: Any, send: Any) -> None:
        await application(scope, receive, send)

    return serve


async def pass_on(request: Any, call_next: RequestResponseEndpoint) -> Any:
    return await call_next(request)


shop = Litestar(
    [
        *(plain(name, each) for name, each in endings.PLAIN.items()),
        *(with_session(name, each) for name, each in endings.WITH_SESSION.items()),
        sync_endpoint,
        in_block,
        connection,
        mounted("mounted"),
    ],
    exception_handlers={OutOfStock: out_of_stock},
    on_startup=[started],
    on_shutdown=[stopped],
    compression_config=CompressionConfig("gzip", minimum_size=1),
    cors_config=CORSConfig(allow_origins=["*"]),
)
app = either(
    OutboxMiddleware(shop),
    {
        "/base_above": BaseHTTPMiddleware(OutboxMiddleware(nested("base_above")), pass_on),
        "/base_below": OutboxMiddleware(BaseHTTPMiddleware(nested("base_below"), pass_on)),
        "/as_middleware": nested("as_middleware", middleware=[OutboxMiddleware]),
        "/only_mounted": Litestar([mounted("only_mounted")], openapi_config=None),
    },
)
