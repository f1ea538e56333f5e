"""Django: events, a failure, a stream; in one module."""

from __future__ import annotations

import time
from collections.abc import Iterator

import django
from django.conf import settings
from django.core.handlers.wsgi import WSGIHandler
from django.http import HttpRequest, HttpResponse, StreamingHttpResponse
from django.urls import path

from outbox import enqueue_event
from outbox.middleware.wsgi import OutboxMiddleware

settings.configure(
    ALLOWED_HOSTS=["*"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="test",
    MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
)
django.setup()


def ok(request: HttpRequest, n: int) -> HttpResponse:
    enqueue_event(n, "ok")
    return HttpResponse("ok")


def boom(request: HttpRequest) -> HttpResponse:
    enqueue_event("boom", "boom")
    raise ValueError


def stream(request: HttpRequest) -> StreamingHttpResponse:
    def chunks() -> Iterator[bytes]:
        for n in range(200):
            enqueue_event(n, "stream")
            yield b"x" * 10_000
            time.sleep(0.005)

    return StreamingHttpResponse(chunks())


urlpatterns = [path("ok/<int:n>", ok), path("boom", boom), path("stream", stream)]
app = OutboxMiddleware(WSGIHandler())
