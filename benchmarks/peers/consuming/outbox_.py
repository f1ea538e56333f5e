"""outbox's worker, with threads or with tasks.

In all cases each message is decoded, gets a new context and collector, and is checked for
unpublished events; its follow-on events are confirmed before it is acked.
"""

from __future__ import annotations

from typing import Any

from benchmarks.peers.consuming import (
    CONCURRENCY,
    EXCHANGE,
    FOLLOW_ON,
    PREFETCH,
    QUEUE,
    THREADS,
    Countdown,
)
from outbox import Publisher, enqueue_event, publish, publish_async
from outbox.consumers import Consumer, ReceivedEvent, RetryPolicy, Worker, before


def make_worker(
    consumer: type[Consumer], publisher: Publisher, *, threads: int = THREADS
) -> Worker:
    return Worker(
        [consumer],
        publisher=publisher,
        threads=threads,
        concurrency=CONCURRENCY,
        prefetch=PREFETCH,
    )


def consume(url: str, messages: int) -> float:
    countdown = Countdown(messages)

    class Plain(Consumer):
        queue = QUEUE

        def process(self, event: ReceivedEvent) -> None:
            countdown.handle()

    return _run(url, Plain, countdown)


def consume_async(url: str, messages: int) -> float:
    countdown = Countdown(messages)

    class Asynchronous(Consumer):
        queue = QUEUE

        async def process(self, event: ReceivedEvent) -> None:
            countdown.handle()

    return _run(url, Asynchronous, countdown)


class _Guarded(Consumer):
    timeout = 30
    retry = RetryPolicy()

    @before
    def look(self, event: ReceivedEvent) -> None:
        """Let every message through."""


def consume_guarded(url: str, messages: int) -> float:
    countdown = Countdown(messages)

    class Plain(_Guarded):
        queue = QUEUE

        def process(self, event: ReceivedEvent) -> None:
            countdown.handle()

    return _run(url, Plain, countdown)


def consume_async_guarded(url: str, messages: int) -> float:
    countdown = Countdown(messages)

    class Asynchronous(_Guarded):
        queue = QUEUE

        async def process(self, event: ReceivedEvent) -> None:
            countdown.handle()

    return _run(url, Asynchronous, countdown)


def consume_and_publish(url: str, messages: int, *, threads: int = THREADS) -> float:
    countdown = Countdown(messages)

    class Plain(Consumer):
        queue = QUEUE

        def process(self, event: ReceivedEvent) -> None:
            enqueue_event(event.payload, FOLLOW_ON)
            publish()
            countdown.handle()

    return _run(url, Plain, countdown, threads=threads)


def consume_and_auto_publish(url: str, messages: int) -> float:
    countdown = Countdown(messages)

    class Plain(Consumer):
        queue = QUEUE
        auto_publish = True

        def process(self, event: ReceivedEvent) -> None:
            enqueue_event(event.payload, FOLLOW_ON)
            countdown.handle()

    return _run(url, Plain, countdown)


def consume_and_publish_async(url: str, messages: int) -> float:
    countdown = Countdown(messages)

    class Asynchronous(Consumer):
        queue = QUEUE

        async def process(self, event: ReceivedEvent) -> None:
            enqueue_event(event.payload, FOLLOW_ON)
            await publish_async()
            countdown.handle()

    return _run(url, Asynchronous, countdown)


def consume_and_auto_publish_async(url: str, messages: int) -> float:
    countdown = Countdown(messages)

    class Asynchronous(Consumer):
        queue = QUEUE
        auto_publish = True

        async def process(self, event: ReceivedEvent) -> None:
            enqueue_event(event.payload, FOLLOW_ON)
            countdown.handle()

    return _run(url, Asynchronous, countdown)


def _run(url: str, consumer: Any, countdown: Countdown, *, threads: int = THREADS) -> float:
    with Publisher(url, exchange=EXCHANGE) as publisher:
        worker = make_worker(consumer, publisher, threads=threads)
        worker.start()
        countdown.wait()
        worker.stop()
    return countdown.rate
