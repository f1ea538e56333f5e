"""Procrastinate with psycopg: one job a statement with ``defer``, a chunk with ``batch_defer``."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import procrastinate
from sqlalchemy import make_url

from benchmarks.peers import BODY
from benchmarks.peers.consuming import Countdown

_PADDING = BODY.decode()[29:-2]
_CONCURRENCY = 10


def make(url: str) -> None:
    with _app(url).open() as app:
        app.schema_manager.apply_schema()


def publish(url: str, chunk: int, count: int) -> float:
    app = _app(url)

    @app.task(name="bench")
    def task(padding: str) -> None:
        """Do nothing here; another process runs it."""

    jobs = [{"padding": _PADDING}] * chunk
    with app.open():
        task.defer(padding=_PADDING) if chunk == 1 else task.batch_defer(*jobs)
        begin = time.perf_counter()
        for _ in range(count // chunk):
            if chunk == 1:
                task.defer(padding=_PADDING)
            else:
                task.batch_defer(*jobs)
        return count / (time.perf_counter() - begin)


def consume(url: str, count: int) -> float:
    publish(url, 1000, count - 1000)
    connector = procrastinate.PsycopgConnector(conninfo=_address(url))
    app = procrastinate.App(connector=connector)
    countdown = Countdown(count)

    @app.task(name="bench")
    async def task(padding: str) -> None:
        countdown.handle()

    async def work() -> None:
        async with app.open_async():
            await app.run_worker_async(
                concurrency=_CONCURRENCY,
                delete_jobs="always",
                wait=False,
                install_signal_handlers=False,
            )

    asyncio.run(work())
    countdown.wait()
    return countdown.rate


def _app(url: str) -> Any:
    return procrastinate.App(connector=procrastinate.SyncPsycopgConnector(conninfo=_address(url)))


def _address(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string()
