"""Publishes when it is imported, which is in uWSGI's master, and in each request."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from outbox import auto_publishing, configure, enqueue_event
from outbox.middleware.wsgi import OutboxMiddleware

if TYPE_CHECKING:
    from wsgiref.types import StartResponse, WSGIEnvironment

configure()
with auto_publishing():
    enqueue_event({"import": os.getpid()}, "x")


def respond(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
    enqueue_event({"request": os.getpid()}, "x")
    time.sleep(0.2)  # the other workers' turn
    start_response("200 OK", [("Content-Length", "2")])
    return [b"ok"]


app = OutboxMiddleware(respond)
