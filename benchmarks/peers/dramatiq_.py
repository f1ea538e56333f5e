"""Dramatiq with ``confirm_delivery``: its own messages, in its own classic queue."""

from __future__ import annotations

import threading
import time

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

QUEUE = "bench_dramatiq"
_PADDING = "x" * 40  # so that the whole message, with its envelope, has about 200 bytes


class Dramatiq:
    name = "Dramatiq confirm_delivery"
    chunks = (1,)
    queue = QUEUE

    def __init__(self, url: str, handle: threading.Event | None = None, count: int = 0) -> None:
        self.broker = RabbitmqBroker(url=f"{url}?heartbeat=600", confirm_delivery=True)
        self._handled = 0
        self._lock = threading.Lock()

        @dramatiq.actor(broker=self.broker, queue_name=QUEUE, actor_name="a", max_retries=0)
        def actor(padding: str) -> None:
            with self._lock:
                self._handled += 1
                if self._handled == count and handle is not None:
                    handle.set()

        self._actor = actor

    def publish(self, chunk: int, times: int) -> float:
        begin = time.perf_counter()
        for _ in range(chunk * times):
            self._actor.send(_PADDING)
        return time.perf_counter() - begin

    def close(self) -> None:
        self.broker.close()
