"""outbox: ``publish()`` of collected events, with and without ``enqueue_event``."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any, Self

from benchmarks.peers import BODY, EXCHANGE, TARGET
from outbox import Event, EventCollector, Publisher

_PAYLOAD: Any = json.loads(BODY)


class Outbox:
    """``publish()`` of collected events."""

    name = "outbox publish()"
    chunks = (1, 10, 100, 1000)
    queue = None

    def __init__(self, url: str) -> None:
        self._publisher = Publisher(url, exchange=EXCHANGE, declare="never")
        collector = EventCollector(publisher=self._publisher)
        self.events: tuple[Event, ...] = tuple(
            collector.enqueue_event(_PAYLOAD, TARGET) for _ in range(1000)
        )

    def publish(self, chunk: int, times: int) -> float:
        events = self.events[:chunk]
        begin = time.perf_counter()
        for _ in range(times):
            self._publisher.publish(events).raise_for_failure()
        return time.perf_counter() - begin

    def publish_in_threads(self, chunk: int, times: int, threads: int) -> float:
        """Publish ``times`` chunks in each of ``threads`` threads; return the seconds taken."""
        started = [
            threading.Thread(target=self.publish, args=(chunk, times)) for _ in range(threads)
        ]
        begin = time.perf_counter()
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
        return time.perf_counter() - begin

    def publish_in_tasks(self, chunk: int, times: int, tasks: int) -> float:
        """Publish ``times`` chunks in each of ``tasks`` tasks; return the seconds taken."""
        events = self.events[:chunk]

        async def task() -> None:
            for _ in range(times):
                (await self._publisher.publish_async(events)).raise_for_failure()

        async def main() -> float:
            begin = time.perf_counter()
            await asyncio.gather(*(task() for _ in range(tasks)))
            return time.perf_counter() - begin

        return asyncio.run(main())

    def close(self) -> None:
        self._publisher.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class OutboxEndToEnd(Outbox):
    """``enqueue_event`` and ``publish()``."""

    name = "outbox enqueue_event, publish()"

    def publish(self, chunk: int, times: int) -> float:
        collector = EventCollector(publisher=self._publisher)
        with EventCollector.use(collector):
            begin = time.perf_counter()
            for _ in range(times):
                for _ in range(chunk):
                    collector.enqueue_event(_PAYLOAD, TARGET)
                collector.publish().raise_for_failure()
            return time.perf_counter() - begin
