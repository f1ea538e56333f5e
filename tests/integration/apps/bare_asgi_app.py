"""ASGI with nothing around it: no framework, no lifespan."""

from __future__ import annotations

from starlette.types import Receive, Scope, Send

from outbox import enqueue_event
from outbox.middleware.asgi import OutboxMiddleware


async def respond(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        raise NotImplementedError(scope["type"])
    enqueue_event(int(scope["path"].rpartition("/")[2]), "ok")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


app = OutboxMiddleware(respond)
