"""Late events: none that was accepted is lost.

python -m benchmarks.late [requests]

Each request (of WSGI, of ASGI, and blocks in threads and in tasks, in turn) starts work that
outlives it and enqueues one event, at about the time when the request's own events are published.
The event is either accepted, and then published, or its ``enqueue_event()`` raises.
"""

from __future__ import annotations

import asyncio
import contextvars
import random
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from outbox import CollectorClosed, Publisher, auto_publishing, enqueue_event
from outbox.backlog.chunk import Chunk
from outbox.middleware.asgi import OutboxMiddleware as ASGIMiddleware
from outbox.middleware.wsgi import OutboxMiddleware as WSGIMiddleware
from outbox.observer import Observer

__all__ = ["Outcome", "run"]

_SLOWEST = 0.002
"""Seconds a confirm and late work take at most: the event arrives before, during and after."""


@dataclass(frozen=True)
class Outcome:
    """What became of the late events.

    Attributes:
        accepted: the number that ``enqueue_event()`` accepted.
        refused: the number for which it raised ``CollectorClosed``.
        lost: the number that was accepted and not published.
        doubled: the number that was published twice.
    """

    accepted: int
    refused: int
    lost: int
    doubled: int


class SlowPublisher(Publisher):
    """A publisher whose broker takes a moment to confirm, and which remembers everything."""

    def __init__(self) -> None:
        super().__init__("memory://")
        self.published: Counter[str] = Counter()

    def hand_in(self, chunk: Chunk, observer: Observer | None = None) -> None:
        self.published.update(entry.event.id for entry in chunk.entries)
        super().hand_in(chunk, observer)

    def wait_for(self, chunk: Chunk, timeout: float | None = None) -> Any:
        time.sleep(random.uniform(0, _SLOWEST))
        return super().wait_for(chunk, timeout)

    async def wait_for_async(self, chunk: Chunk, timeout: float | None = None) -> Any:  # noqa: ASYNC109
        await asyncio.sleep(random.uniform(0, _SLOWEST))
        return await super().wait_for_async(chunk, timeout)


class _Late:
    """Work that outlives its request."""

    def __init__(self) -> None:
        self.accepted: list[str] = []
        self.refused: list[None] = []
        self.threads: list[threading.Thread] = []
        self.tasks: list[asyncio.Task[None]] = []

    def start_thread(self) -> None:
        context = contextvars.copy_context()
        thread = threading.Thread(target=context.run, args=(self._in_thread,))
        thread.start()
        self.threads.append(thread)

    def start_task(self) -> None:
        self.tasks.append(asyncio.create_task(self._in_task()))

    def _in_thread(self) -> None:
        time.sleep(random.uniform(0, _SLOWEST))
        self._enqueue()

    async def _in_task(self) -> None:
        await asyncio.sleep(random.uniform(0, _SLOWEST))
        self._enqueue()

    def _enqueue(self) -> None:
        try:
            event = enqueue_event({}, "late")
        except CollectorClosed:
            self.refused.append(None)
        else:
            self.accepted.append(event.id)


def run(requests: int) -> Outcome:
    """Serve ``requests``, and return what became of their late events."""
    publisher = SlowPublisher()
    late = _Late()

    def wsgi_app(environ: Any, start_response: Any) -> Any:
        enqueue_event({}, "first")
        late.start_thread()
        start_response("200 OK", [])
        return [b"ok"] if environ["complete"] else iter([b"ok"])

    async def asgi_app(scope: Any, receive: Any, send: Any) -> None:
        enqueue_event({}, "first")
        late.start_task()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"ok"})

    async def send(message: Any) -> None: ...

    async def receive() -> Any: ...

    wsgi = WSGIMiddleware(wsgi_app, publisher=publisher)
    asgi = ASGIMiddleware(asgi_app, publisher=publisher)

    def in_threads(number: int) -> None:
        for n in range(number):
            if n % 3 == 0:
                with auto_publishing(publisher=publisher):
                    enqueue_event({}, "first")
                    late.start_thread()
                continue
            body: Any = wsgi({"complete": n % 3 == 1}, lambda *_: lambda _: None)
            list(body)
            if hasattr(body, "close"):
                body.close()

    scope: Any = {"type": "http"}

    async def in_task(number: int) -> None:
        for n in range(number):
            if n % 2:
                async with auto_publishing(publisher=publisher):
                    enqueue_event({}, "first")
                    late.start_task()
            else:
                await asgi(scope, receive, send)

    async def in_tasks(number: int) -> None:
        shares = [number // 10 + (n < number % 10) for n in range(10)]
        await asyncio.gather(*map(in_task, shares))
        await asyncio.gather(*late.tasks)

    half = requests // 2
    workers = [
        threading.Thread(target=in_threads, args=(half // 4 + (n < half % 4),)) for n in range(4)
    ]
    for worker in workers:
        worker.start()
    asyncio.run(in_tasks(requests - half))
    for worker in workers:
        worker.join()
    for thread in late.threads:
        thread.join()
    published = publisher.published
    return Outcome(
        accepted=len(late.accepted),
        refused=len(late.refused),
        lost=sum(not published[name] for name in late.accepted),
        doubled=sum(number > 1 for number in published.values()),
    )


def main() -> None:
    """Serve the requests, and print what became of their late events."""
    requests = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    began = time.monotonic()
    outcome = run(requests)
    print(
        f"{requests} requests, {time.monotonic() - began:.1f} s: of their late events "
        f"{outcome.accepted} were accepted, {outcome.refused} refused; "
        f"{outcome.lost} lost, {outcome.doubled} published twice"
    )
    sys.exit(1 if outcome.lost or outcome.doubled else 0)


if __name__ == "__main__":
    main()
