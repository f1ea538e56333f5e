"""Flask: events, a failure, a stream."""

from __future__ import annotations

import time
from collections.abc import Iterator

from flask import Flask, Response

from outbox import enqueue_event
from outbox.middleware.wsgi import OutboxMiddleware

app = Flask(__name__)
app.wsgi_app = OutboxMiddleware(app.wsgi_app)  # type: ignore[method-assign]


@app.get("/ok/<int:n>")
def ok(n: int) -> str:
    enqueue_event(n, "ok")
    return "ok"


@app.get("/boom")
def boom() -> str:
    enqueue_event("boom", "boom")
    raise ValueError


@app.get("/stream")
def stream() -> Response:
    def chunks() -> Iterator[bytes]:
        for n in range(200):
            enqueue_event(n, "stream")
            yield b"x" * 10_000
            time.sleep(0.005)

    return Response(chunks())
