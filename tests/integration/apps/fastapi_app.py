"""FastAPI: events of synchronous endpoints, a failure, a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator

from fastapi import FastAPI
from fastapi.responses import StreamingResponse

from outbox import enqueue_event
from outbox.middleware.asgi import OutboxMiddleware

app = FastAPI()
app.add_middleware(OutboxMiddleware)


@app.get("/ok/{n}")
def ok(n: int) -> str:
    enqueue_event(n, "ok")
    return "ok"


@app.get("/boom")
def boom() -> str:
    enqueue_event("boom", "boom")
    raise ValueError


@app.get("/stream")
def stream() -> StreamingResponse:
    def chunks() -> Iterator[bytes]:
        for n in range(200):
            enqueue_event(n, "stream")
            yield b"x" * 10_000
            time.sleep(0.005)

    return StreamingResponse(chunks())
