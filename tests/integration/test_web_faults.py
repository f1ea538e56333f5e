"""The middleware when a flush is cut short, a broker is silent, or a worker is aborted."""

from __future__ import annotations

import asyncio
import contextlib
import time
import urllib.error
from http.client import RemoteDisconnected
from pathlib import Path
from typing import Any

import anyio
import pytest

from outbox import Publisher, enqueue_event
from outbox.middleware.asgi import OutboxMiddleware
from proving.proxy import FaultProxy, Way
from tests.amqp import Inspector
from tests.integration.test_servers import APPS, Served

HTTP = {"type": "http", "method": "GET", "path": "/", "headers": []}


async def receive() -> Any:
    return {"type": "http.request"}


async def send(message: Any) -> None: ...


async def respond(scope: Any, receive: Any, send: Any) -> None:
    enqueue_event(1, "t")
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


@pytest.mark.hazard("B6", "E6")
@pytest.mark.parametrize("how", ["task", "scope"])
def test_a_request_cancelled_during_its_flush_is_published_once(
    how: str, proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)

    async def main(publisher: Publisher) -> None:
        middleware = OutboxMiddleware(respond, publisher=publisher)
        if how == "scope":
            with anyio.move_on_after(0.2) as cancelled:
                await middleware(dict(HTTP), receive, send)
            assert cancelled.cancelled_caught
            return
        task = asyncio.create_task(middleware(dict(HTTP), receive, send))
        await asyncio.sleep(0.2)
        assert not task.done()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with Publisher(proxy.url, exchange=name) as publisher:
        publisher.publish([])
        enqueue = OutboxMiddleware(respond, publisher=publisher)
        asyncio.run(enqueue(dict(HTTP), receive, send))  # connected, and the first has arrived
        assert inspector.get(queue).payload == 1
        proxy.black_hole(Way.DOWN)
        asyncio.run(main(publisher))
        proxy.heal()
        assert inspector.get(queue).payload == 1
        assert publisher.drain()
    assert inspector.all(queue) == []


@pytest.mark.hazard("B5", "E13")
def test_the_event_loop_keeps_running_while_a_flush_waits_for_a_silent_broker(
    proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    longest = 0.0

    async def main(publisher: Publisher) -> None:
        nonlocal longest
        middleware = OutboxMiddleware(respond, publisher=publisher)
        await middleware(dict(HTTP), receive, send)
        proxy.black_hole()
        flush = asyncio.create_task(middleware(dict(HTTP), receive, send))
        begin = before = time.monotonic()
        while not flush.done():
            await asyncio.sleep(0.001)
            now = time.monotonic()
            longest, before = max(longest, now - before), now
        await flush
        assert before - begin > 0.8

    with Publisher(proxy.url, exchange=name, timeout=1.0) as publisher:
        asyncio.run(main(publisher))
        proxy.heal()
    assert longest < 0.25


@pytest.mark.hazard("D11")
@pytest.mark.slow
def test_an_aborted_worker_drops_its_unpublished_events(
    amqp_url: str, inspector: Inspector, name: str, tmp_path: Path
) -> None:
    queue = inspector.queue(name, name)
    command = ["gunicorn", "--timeout", "2", f"{APPS}.twice_app:app"]
    served = Served(command, amqp_url, name, tmp_path)
    try:
        before = served.get("/ok/1")[1]
        with contextlib.suppress(RemoteDisconnected, urllib.error.URLError, ConnectionError):
            served.get("/published-and-hangs/2")
        _, after = served.get("/ok/3")
        assert before != after  # another worker
        assert [inspector.get(queue).payload for _ in range(3)] == [1, 2, 3]
        assert inspector.all(queue) == []
        assert "WORKER TIMEOUT" in served.log
    finally:
        served.stop()


@pytest.mark.hazard("D10")
def test_an_application_wrapped_twice_on_a_server_publishes_each_event_once(
    amqp_url: str, inspector: Inspector, name: str, tmp_path: Path
) -> None:
    queue = inspector.queue(name, name)
    command = ["gunicorn", "--threads", "2", f"{APPS}.twice_app:app"]
    served = Served(command, amqp_url, name, tmp_path)
    try:
        for n in range(10):
            assert served.get(f"/ok/{n}")[0] == 200
        assert [inspector.get(queue).payload for _ in range(10)] == list(range(10))
        assert inspector.all(queue) == []
    finally:
        served.stop()
