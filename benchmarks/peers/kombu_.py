"""kombu over py-amqp, with its transport option ``confirm_publish``."""

from __future__ import annotations

import time

import kombu

from benchmarks.peers import BODY, EXCHANGE, TARGET


class Kombu:
    name = "kombu confirm_publish"
    chunks = (1,)
    queue = None

    def __init__(self, url: str) -> None:
        self._connection = kombu.Connection(url, transport_options={"confirm_publish": True})
        self._producer = self._connection.Producer(auto_declare=False)

    def publish(self, chunk: int, times: int) -> float:
        begin = time.perf_counter()
        for _ in range(chunk * times):
            self._producer.publish(
                BODY,
                exchange=EXCHANGE,
                routing_key=TARGET,
                content_type="application/json",
                content_encoding="utf-8",
                delivery_mode=2,
                mandatory=True,
                message_id="01900000-0000-7000-8000-000000000000",
                type=TARGET,
            )
        return time.perf_counter() - begin

    def close(self) -> None:
        self._connection.close()
