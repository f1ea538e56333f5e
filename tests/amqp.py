"""Inspects the broker with plain pika, independently of outbox."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pika
import pika.data
import pika.exceptions
import pytest

from outbox import Event
from outbox.event import headers_on_the_wire
from outbox.messages.dead_letters import PARKING_QUEUE


@dataclass(frozen=True)
class Message:
    body: bytes
    properties: Any
    target: str
    exchange: str
    redelivered: bool

    @property
    def id(self) -> str:
        return str(self.properties.message_id)

    @property
    def payload(self) -> Any:
        return json.loads(self.body)


def properties_of(**named: Any) -> Any:
    """Return the AMQP properties ``named``."""
    return pika.BasicProperties(**named)  # type: ignore[no-untyped-call]


def properties_of_event(event: Event, app_id: str = "") -> Any:
    """Return the properties expected in the frames of ``event``, for pika's encoder."""
    return properties_of(
        content_type=event.content_type,
        headers=headers_on_the_wire(event),
        delivery_mode=2,
        priority=event.priority,
        message_id=event.id,
        timestamp=int(event.occurred_at.timestamp()),
        type=event.target,
        app_id=app_id or None,
    )


class Inspector:
    """A separate blocking connection, reopened after an outage of the broker."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._queues: list[str] = []
        self._exchanges: list[str] = []
        self._connection: Any = None
        self._connect()

    def _connect(self) -> None:
        if self._connection is not None and self._connection.is_open:
            self._connection.close()
        parameters = pika.URLParameters(self._url)
        parameters.heartbeat = 600
        self._connection = pika.BlockingConnection(parameters)
        self.channel = self._connection.channel()

    def _retry(self, act: Any) -> Any:
        deadline = time.monotonic()
        try:
            self._connection.process_data_events(0)
            return act()
        except pika.exceptions.AMQPConnectionError:
            deadline += 5  # a broker that was just started doesn't serve every queue at once
        except pika.exceptions.AMQPError:
            pass
        while True:
            try:
                self._connect()
                return act()
            except pika.exceptions.AMQPError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def queue(
        self,
        name: str,
        exchange: str = "",
        topics: tuple[str, ...] = ("#",),
        arguments: dict[str, Any] | None = None,
    ) -> str:
        """Declare a durable queue, bound to a topic exchange if one is named; return its name."""

        def act() -> None:
            quorum: dict[str, Any] = {"x-queue-type": "quorum"}
            if name == PARKING_QUEUE:  # as a publisher declares it, which may do so at any time
                quorum["x-delivery-limit"] = 2**31 - 1
            self.channel.queue_declare(name, durable=True, arguments=arguments or quorum)
            if exchange:
                self.channel.exchange_declare(exchange, "topic", durable=True)
                for topic in topics:
                    self.channel.queue_bind(name, exchange, topic)

        self._retry(act)
        self.clean_up(queue=name, exchange=exchange)
        return name

    def clean_up(self, *, queue: str = "", exchange: str = "") -> None:
        """Delete this queue or exchange at the end."""
        self._queues += [queue] if queue else []
        self._exchanges += [exchange] if exchange else []

    def get(self, queue: str, timeout: float = 10.0) -> Message:
        """Take the next message, waiting for it."""
        messages = self.messages(queue, 1, timeout)
        assert messages, f"nothing arrived in {queue} within {timeout} s"
        return messages[0]

    def messages(self, queue: str, count: int, timeout: float = 10.0) -> list[Message]:
        """Take up to ``count`` messages, waiting for them; fewer if time runs out."""
        messages: list[Message] = []
        deadline = time.monotonic() + timeout
        while len(messages) < count:
            method, properties, body = self._retry(
                lambda: self.channel.basic_get(queue, auto_ack=True)
            )
            if method is not None:
                messages.append(
                    Message(
                        body, properties, method.routing_key, method.exchange, method.redelivered
                    )
                )
            elif time.monotonic() > deadline:
                break
            else:
                time.sleep(0.01)
        return messages

    def all(self, queue: str) -> list[Message]:
        """Take the messages that are in the queue now."""
        return self.messages(queue, 1 << 30, 0.2)

    def publish(self, queue: str, body: bytes, exchange: str = "", properties: Any = None) -> None:
        """Publish as a client other than outbox would."""
        self._retry(
            lambda: self.channel.basic_publish(
                exchange, queue, body, properties or properties_of(delivery_mode=2)
            )
        )

    def wait_for_queue(self, name: str, timeout: float = 10.0) -> None:
        """Wait until the queue has been declared."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                self.channel.queue_declare(name, passive=True)
                self.clean_up(queue=name)
                return
            except pika.exceptions.ChannelClosedByBroker:
                assert time.monotonic() < deadline, f"{name} was not declared"
                self.channel = self._connection.channel()
                time.sleep(0.02)

    def count(self, queue: str) -> int:
        """Return the number of messages that wait in the queue."""
        declared = self._retry(lambda: self.channel.queue_declare(queue, passive=True))
        return int(declared.method.message_count)

    def consumers(self, queue: str) -> int:
        """Return the number of consumers that the queue has."""
        declared = self._retry(lambda: self.channel.queue_declare(queue, passive=True))
        return int(declared.method.consumer_count)

    def close(self) -> None:
        for queue in dict.fromkeys(self._queues):
            self._retry(lambda queue=queue: self.channel.queue_delete(queue))
        for exchange in dict.fromkeys(self._exchanges):
            self._retry(lambda exchange=exchange: self.channel.exchange_delete(exchange))
        self._connection.close()


class Unwritten:
    """A header value as raw bytes, such as pika itself wouldn't write."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    @classmethod
    @contextlib.contextmanager
    def written(cls) -> Iterator[None]:
        """Make pika write such values in the block."""
        original: Any = pika.data.encode_value

        def encode_value(pieces: list[bytes], value: Any) -> int:
            if not isinstance(value, cls):
                return int(original(pieces, value))
            pieces.append(value._data)
            return len(value._data)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(pika.data, "encode_value", encode_value)
            yield
