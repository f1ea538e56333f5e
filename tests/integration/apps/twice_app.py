"""Flask wrapped twice, with views that never end by themselves."""

from __future__ import annotations

import os
import time

from flask import Flask

from outbox import enqueue_event, publish
from outbox.middleware.wsgi import OutboxMiddleware

app = Flask(__name__)
app.wsgi_app = OutboxMiddleware(OutboxMiddleware(app.wsgi_app))  # type: ignore[method-assign]


@app.get("/ok/<int:n>")
def ok(n: int) -> str:
    enqueue_event(n, "ok")
    return str(os.getpid())


@app.get("/published-and-hangs/<int:n>")
def published_and_hangs(n: int) -> str:
    enqueue_event(n, "published")
    publish()
    enqueue_event("never", "not.published")
    time.sleep(60)
    return "too late"
