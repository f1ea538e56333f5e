"""outbox: a publisher, and a worker with its usual prefetch."""

from __future__ import annotations

import tempfile
import time
from typing import Any

from sqlalchemy import create_engine

from benchmarks.peers import BODY, EXCHANGE
from benchmarks.peers.consuming import CONCURRENCY, PREFETCH, QUEUE, THREADS, Countdown
from outbox import Event, Publisher
from outbox.consumers import Consumer, ReceivedEvent, Worker
from outbox.sql import Store


def make(url: str) -> None:
    engine = create_engine(url)
    Store(engine).create()
    engine.dispose()
    declare(url)


def declare(url: str) -> None:
    """Declare the queue, as a worker does when it starts."""

    class Nothing(Consumer):
        queue = QUEUE

        def process(self, event: ReceivedEvent) -> None: ...

    with Publisher(url, exchange=EXCHANGE) as publisher:
        worker = Worker([Nothing], publisher=publisher)
        worker.start()
        while not worker.is_consuming:
            time.sleep(0.01)
        worker.stop()


def publish(url: str, chunk: int, count: int) -> float:
    events = [Event(id="1", target=QUEUE, exchange=EXCHANGE, body=BODY)] * chunk
    with Publisher(url, exchange=EXCHANGE, unroutable="fail") as publisher:
        publisher.publish(events).raise_for_failure()
        begin = time.perf_counter()
        for _ in range(count // chunk):
            publisher.publish(events, timeout=60).raise_for_failure()
        return count / (time.perf_counter() - begin)


def consume(url: str, count: int) -> float:
    countdown = Countdown(count)

    class Plain(Consumer):
        queue = QUEUE

        def process(self, event: ReceivedEvent) -> None:
            countdown.handle()

    return _run(url, Plain, count, countdown)


def consume_async(url: str, count: int) -> float:
    countdown = Countdown(count)

    class Asynchronous(Consumer):
        queue = QUEUE

        async def process(self, event: ReceivedEvent) -> None:
            countdown.handle()

    return _run(url, Asynchronous, count, countdown)


def consume_sqlite(_: str, count: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        url = f"sqlite:///{folder}/bench.db?synchronous=normal"
        declare(url)
        return consume(url, count)


def _run(url: str, consumer: Any, count: int, countdown: Countdown) -> float:
    publish(url, 1000, count - 1000)  # and a chunk before it begins to count
    with Publisher(url, exchange=EXCHANGE) as publisher:
        worker = Worker(
            [consumer],
            publisher=publisher,
            threads=THREADS,
            concurrency=CONCURRENCY,
            prefetch=PREFETCH,
        )
        worker.start()
        countdown.wait()
        worker.stop()
    return countdown.rate
