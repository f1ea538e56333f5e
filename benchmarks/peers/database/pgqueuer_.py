"""PgQueuer with psycopg and with asyncpg: a chunk is one call of ``enqueue``."""

from __future__ import annotations

import asyncio
import datetime
import time
from typing import Any

import asyncpg
import psycopg
from pgqueuer import Queries, QueueManager
from pgqueuer.db import AsyncpgDriver, PsycopgDriver, SyncPsycopgDriver
from pgqueuer.models import Job
from pgqueuer.queries import SyncQueries
from pgqueuer.types import QueueExecutionMode
from sqlalchemy import make_url

from benchmarks.peers import BODY
from benchmarks.peers.consuming import QUEUE, Countdown


def make(url: str) -> None:
    async def install() -> None:
        connection = await asyncpg.connect(_address(url))
        await Queries(AsyncpgDriver(connection)).install()
        await connection.close()

    asyncio.run(install())


def publish(url: str, chunk: int, count: int) -> float:
    with psycopg.connect(_address(url), autocommit=True) as connection:
        queries = SyncQueries(SyncPsycopgDriver(connection))
        arguments = _arguments(chunk)
        queries.enqueue(*arguments)
        begin = time.perf_counter()
        for _ in range(count // chunk):
            queries.enqueue(*arguments)
        return count / (time.perf_counter() - begin)


def publish_asyncpg(url: str, chunk: int, count: int) -> float:
    async def run() -> float:
        connection = await asyncpg.connect(_address(url))
        queries = Queries(AsyncpgDriver(connection))
        arguments = _arguments(chunk)
        await queries.enqueue(*arguments)
        begin = time.perf_counter()
        for _ in range(count // chunk):
            await queries.enqueue(*arguments)
        rate = count / (time.perf_counter() - begin)
        await connection.close()
        return rate

    return asyncio.run(run())


def consume(url: str, count: int, batch: int) -> float:
    async def connect() -> Any:
        connection = await psycopg.AsyncConnection.connect(_address(url), autocommit=True)
        return PsycopgDriver(connection)

    return _consume(url, count, batch, connect)


def consume_asyncpg(url: str, count: int, batch: int) -> float:
    async def connect() -> Any:
        return AsyncpgDriver(await asyncpg.connect(_address(url)))

    return _consume(url, count, batch, connect)


def _consume(url: str, count: int, batch: int, connect: Any) -> float:
    publish(url, 1000, count - 1000)
    countdown = Countdown(count)

    async def work() -> None:
        manager = QueueManager(Queries(await connect()))

        @manager.entrypoint(QUEUE)
        async def handle(job: Job) -> None:
            countdown.handle()

        await manager.run(
            dequeue_timeout=datetime.timedelta(seconds=1),
            batch_size=batch,
            mode=QueueExecutionMode.drain,
        )

    asyncio.run(work())
    countdown.wait()
    return countdown.rate


def _arguments(chunk: int) -> tuple[Any, ...]:
    return (QUEUE, BODY) if chunk == 1 else ([QUEUE] * chunk, [BODY] * chunk, [0] * chunk)


def _address(url: str) -> str:
    return make_url(url).set(drivername="postgresql").render_as_string()
