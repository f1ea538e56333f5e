"""Starlette: events, a failure, a stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from outbox import enqueue_event
from outbox.middleware.asgi import OutboxMiddleware


async def ok(request: Request) -> Response:
    enqueue_event(request.path_params["n"], "ok")
    return PlainTextResponse("ok")


async def boom(request: Request) -> Response:
    enqueue_event("boom", "boom")
    raise ValueError


async def stream(request: Request) -> Response:
    async def chunks() -> AsyncIterator[bytes]:
        for n in range(200):
            enqueue_event(n, "stream")
            yield b"x" * 10_000
            await asyncio.sleep(0.005)

    return StreamingResponse(chunks())


app = OutboxMiddleware(
    Starlette(routes=[Route("/ok/{n:int}", ok), Route("/boom", boom), Route("/stream", stream)])
)
