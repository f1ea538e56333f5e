"""The cost of collecting: ``enqueue_event`` against ``json.dumps``, and an idle middleware.

python -m benchmarks.collect
"""

from __future__ import annotations

import asyncio
import json
import time
import wsgiref.util
from collections.abc import Iterable
from typing import Any

from benchmarks.timing import side_by_side
from outbox import EventCollector, configure, enqueue_event
from outbox.middleware.asgi import OutboxMiddleware as ASGIMiddleware
from outbox.middleware.wsgi import OutboxMiddleware as WSGIMiddleware

PAYLOADS = {
    "200 bytes": {
        "order_id": 12345,
        "customer": "Ada Lovelace",
        "total": "129.90",
        "currency": "EUR",
        "items": [{"sku": "A-1", "n": 2}, {"sku": "B-7", "n": 1}],
        "note": "leave it at the door, please",
        "paid": True,
    },
    "2 KB": {f"field_{n}": f"value {n} of the payload" for n in range(50)},
    "20 bytes": {"order_id": 12345},
}


def enqueueing() -> None:
    configure("memory://")
    print("enqueue_event beside json.dumps of the same payload (at most 4x)")
    for name, payload in PAYLOADS.items():
        collector = EventCollector(max_events=1 << 30, max_bytes=1 << 40)

        def chunk_of_100(payload: Any = payload, collector: EventCollector = collector) -> None:
            for _ in range(100):
                enqueue_event(payload, "order.placed")
            collector.clear_events()

        def dumps_100(payload: Any = payload) -> None:
            for _ in range(100):
                json.dumps(payload)

        with EventCollector.use(collector):
            times = side_by_side({"dumps": dumps_100, "enqueue": chunk_of_100}, 100)
        dumps, enqueue = times["dumps"] / 100, times["enqueue"] / 100
        print(
            f"  {name:>9}: json.dumps {dumps:5.2f} us, enqueue_event {enqueue:5.2f} us: "
            f"{enqueue / dumps:.1f}x"
        )


def wsgi() -> None:
    environ: dict[str, Any] = {}
    wsgiref.util.setup_testing_defaults(environ)

    def app(environ: Any, start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", [("Content-Type", "text/plain"), ("Content-Length", "2")])
        return [b"ok"]

    def start_response(status: str, headers: Any, exc_info: Any = None) -> Any:
        return None

    wrapped = WSGIMiddleware(app)
    times = side_by_side(
        {
            "plain": lambda: app(dict(environ), start_response),
            "wrapped": lambda: wrapped(dict(environ), start_response),
        },
        20_000,
    )
    print("a WSGI request that collects nothing (at most 2 us more)")
    print(f"  {times['wrapped'] - times['plain']:.2f} us more")


def asgi() -> None:
    scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
    start = {"type": "http.response.start", "status": 200, "headers": []}
    body = {"type": "http.response.body", "body": b"ok"}

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send(start)
        await send(body)

    async def send(message: Any) -> None: ...

    async def receive() -> Any: ...

    wrapped = ASGIMiddleware(app)

    async def measure() -> dict[str, float]:
        found = {"plain": float("inf"), "wrapped": float("inf")}
        for _ in range(7):
            for name, one in (("plain", app), ("wrapped", wrapped)):
                begin = time.perf_counter()
                for _ in range(20_000):
                    await one(dict(scope), receive, send)  # type: ignore[operator]
                found[name] = min(found[name], (time.perf_counter() - begin) / 20_000 * 1e6)
        return found

    times = asyncio.run(measure())
    print("an ASGI request that collects nothing (at most 3 us more)")
    print(f"  {times['wrapped'] - times['plain']:.2f} us more")


if __name__ == "__main__":
    enqueueing()
    wsgi()
    asgi()
