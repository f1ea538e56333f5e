"""FastAPI: an endpoint for each way in which a request ends."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import BackgroundTasks, Depends, FastAPI, HTTPException, Request, Response, WebSocket
from fastapi.concurrency import run_in_threadpool
from fastapi.middleware.cors import CORSMiddleware
from fastapi.middleware.gzip import GZipMiddleware
from fastapi.responses import PlainTextResponse, StreamingResponse
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint

from outbox import auto_publishing, enqueue_event
from outbox.middleware.asgi import OutboxMiddleware
from tests.integration.apps import endings
from tests.integration.apps.endings import OutOfStock, either, session_of_request


class _FastAPI:
    def respond(
        self, status: int, *, background: Callable[[], Awaitable[None]] | None = None
    ) -> Response:
        tasks = BackgroundTasks()
        if background is not None:
            tasks.add_task(background)
        return PlainTextResponse("ended", status, background=tasks)

    def stream(self, parts: AsyncIterator[bytes] | Iterator[bytes]) -> Response:
        return StreamingResponse(parts)

    def http_error(self, status: int) -> Exception:
        return HTTPException(status)

    async def in_thread(self, function: Callable[[], object]) -> None:
        await run_in_threadpool(function)


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    enqueue_event({}, "lifespan.startup")
    yield
    enqueue_event({}, "lifespan.shutdown")


async def block() -> AsyncIterator[None]:
    async with auto_publishing(independent=True):
        yield


async def out_of_stock(_: Request, error: Exception) -> Response:
    assert isinstance(error, OutOfStock)
    return PlainTextResponse("out of stock", error.status)


async def pass_on(request: Request, call_next: RequestResponseEndpoint) -> Response:
    return await call_next(request)


def nested(target: str) -> FastAPI:
    """Return an application with only one endpoint."""
    only = FastAPI()

    @only.get("/")
    async def endpoint() -> None:
        enqueue_event({}, target)

    return only


shop = FastAPI(lifespan=lifespan, exception_handlers={OutOfStock: out_of_stock})
shop.add_middleware(GZipMiddleware, minimum_size=1)
shop.add_middleware(OutboxMiddleware)
shop.add_middleware(CORSMiddleware, allow_origins=["*"])
shop.mount("/mounted", OutboxMiddleware(nested("mounted")))


def _plain(endpoint: Callable[..., Awaitable[Any]]) -> Callable[[], Awaitable[Any]]:
    async def plain() -> Any:
        return await endpoint(_FastAPI())

    return plain


def _with_session(endpoint: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    async def with_session(
        session: Annotated[AsyncSession, Depends(session_of_request)],
    ) -> Any:
        return await endpoint(_FastAPI(), session)

    return with_session


for name, plain in endings.PLAIN.items():
    shop.add_api_route(f"/{name}", _plain(plain))
for name, with_session in endings.WITH_SESSION.items():
    shop.add_api_route(f"/{name}", _with_session(with_session))


@shop.get("/sync_endpoint")
def sync_endpoint() -> None:
    endings.store_in_thread()


@shop.get("/block", dependencies=[Depends(block)], status_code=409)
async def in_block() -> None:
    enqueue_event({}, "block")


SessionBeforeResponse = Annotated[AsyncSession, Depends(session_of_request, scope="function")]


@shop.get("/function_scope")
async def function_scope(session: SessionBeforeResponse) -> Any:
    return await endings.commit_fails(_FastAPI(), session, "function_scope")


@shop.get("/function_scope_then_background_fails")
async def function_scope_then_background_fails(session: SessionBeforeResponse) -> Any:
    return await endings.stored_then_background_fails(
        _FastAPI(), session, "function_scope_then_background_fails"
    )


@shop.websocket("/websocket")
async def websocket(connection: WebSocket) -> None:
    await connection.accept()
    enqueue_event({}, "websocket.connection")
    async for _ in connection.iter_text():
        async with auto_publishing():
            enqueue_event({}, "websocket.message")
        await connection.send_text("done")


above = nested("base_above")
above.add_middleware(OutboxMiddleware)
above.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
below = nested("base_below")
below.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
below.add_middleware(OutboxMiddleware)
around = FastAPI()
around.mount("/mounted", OutboxMiddleware(nested("only_mounted")))

app = either(shop, {"/base_above": above, "/base_below": below, "/only_mounted": around})
