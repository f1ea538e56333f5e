"""A consumer with plain pika, which writes down what is delivered."""

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

    It connects to the broker directly, not through the proxy, and reconnects as often as needed.
    """

    def __init__(self, url: str, queues: Mapping[str, str], history: Journal) -> None:
        """Prepare to consume ``queues``, a mapping of queue names to places in the history."""
        self._parameters = pika.URLParameters(url)
        self._queues = queues
        self._history = history
        self._stopping = threading.Event()
        self._consuming = threading.Event()
        self._consuming.set()
        self._thread = threading.Thread(target=self._run, name="witness")
        self.last = time.monotonic()
        """The time of the last delivery, on the monotonic clock."""

    def start(self) -> None:
        """Start consuming."""
        self._thread.start()

    def pause(self) -> None:
        """Stop consuming, so that queues fill up."""
        self._consuming.clear()

    def resume(self) -> None:
        """Resume consuming."""
        self._consuming.set()

    def stop(self) -> None:
        """Stop when all received messages are written down."""
        self._stopping.set()
        self._consuming.set()
        self._thread.join(30)

    def _run(self) -> None:
        while not self._stopping.is_set():
            with contextlib.suppress(Exception):  # pika also raises exceptions outside its tree
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
            payload = json.loads(body)
            # Of a task it is the first argument.
            key = payload["args"][0] if "args" in payload else payload["key"]
            facts: dict[str, Any] = {"key": key, "id": properties.message_id}
            if where == "dead":
                facts["attempts"] = (properties.headers or {}).get("outbox-attempt")
            self._history.write("delivery", where=where, **facts)
            channel.basic_ack(method.delivery_tag)

        return note
