"""Consumes with plain pika what has come out, and writes it down."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Mapping
from typing import Any

import pika

from proving.history import Journal

__all__ = ["Witness"]

_RETRY = 0.2


class Witness:
    """Writes a ``delivery`` for each message of some queues, then acks it.

    It connects to the broker itself, not by way of the proxy, as often as needed.
    """

    def __init__(self, url: str, queues: Mapping[str, str], history: Journal) -> None:
        """Prepare to consume ``queues``: the place that each stands for."""
        self._parameters = pika.URLParameters(url)
        self._queues = queues
        self._history = history
        self._stopping = threading.Event()
        self._consuming = threading.Event()
        self._consuming.set()
        self._thread = threading.Thread(target=self._run, name="witness")
        self.last = time.monotonic()
        """When something came out for the last time, on the monotonic clock."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def pause(self) -> None:
        """Consume no more, so that queues fill up."""
        self._consuming.clear()

    def resume(self) -> None:
        """Consume again."""
        self._consuming.set()

    def stop(self) -> None:
        """End, once what was received is written down."""
        self._stopping.set()
        self._consuming.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(Exception):  # pika raises more than its own tree of them
                self._consume()
            self._stopping.wait(_RETRY)

    def _consume(self) -> None:
        if not self._consuming.wait(1):
            return
        connection = pika.BlockingConnection(self._parameters)
        channel = connection.channel()
        channel.basic_qos(prefetch_count=200)
        for queue, where in self._queues.items():
            channel.basic_consume(queue, self._note(where))
        while not self._stopping.is_set() and self._consuming.is_set():
            connection.process_data_events(0.1)
        connection.close()

    def _note(self, where: str) -> Any:
        def note(channel: Any, method: Any, properties: Any, body: bytes) -> None:
            self.last = time.monotonic()
            facts: dict[str, Any] = {"key": json.loads(body)["key"], "id": properties.message_id}
            if where == "dead":
                facts["attempts"] = (properties.headers or {}).get("outbox-attempt")
            self._history.write("delivery", where=where, **facts)
            channel.basic_ack(method.delivery_tag)

        return note
