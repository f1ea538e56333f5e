"""pika's BlockingConnection: one round trip per event."""

from __future__ import annotations

import time

import pika

from benchmarks.peers import BODY, EXCHANGE, TARGET


class PikaBlocking:
    name = "pika BlockingConnection"
    chunks = (1,)
    queue = None

    def __init__(self, url: str) -> None:
        self._connection = pika.BlockingConnection(pika.URLParameters(f"{url}?heartbeat=600"))
        self._channel = self._connection.channel()
        self._channel.confirm_delivery()

    def publish(self, chunk: int, times: int) -> float:
        begin = time.perf_counter()
        for _ in range(chunk * times):
            self.publish_one()
        return time.perf_counter() - begin

    def publish_one(self) -> None:
        properties = pika.BasicProperties(
            content_type="application/json",
            delivery_mode=2,
            message_id="01900000-0000-7000-8000-000000000000",
            type=TARGET,
        )
        self._channel.basic_publish(EXCHANGE, TARGET, BODY, properties, mandatory=True)

    def close(self) -> None:
        self._connection.close()
