"""Holds the messages of a parking or dead-letter queue while they are listed, replayed or deleted.

The rules:

1.  Only an ack deletes a message. However this process or its connection ends, the broker requeues
    the messages that were held and not acked.
2.  Messages stay held until the end, so that none is seen twice in one run. They are taken in
    windows; while a channel holds messages of its window, the next window uses another channel.
3.  The acks of a window are one transaction (AMQP 0-9-1, class Tx). A quorum queue accepts 32
    settlements at a time from a channel; the others wait in the channel, and are lost when it is
    closed. A transaction is one settlement, however many messages it covers.
4.  At the end the messages are returned in order, by closing one channel after the other. RabbitMQ
    4.3 counts that as a failed delivery, of which a quorum queue by default allows 20, but it
    doesn't count a nack: there the messages are nacked.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence

import pika.exceptions
import pika.spec
from pika.adapters.blocking_connection import BlockingChannel

from outbox.errors import ConnectionLost, OutboxError, UsageError
from outbox.messages.parked_message import ParkedMessage
from outbox.transports.rabbitmq import pika_connection, pika_errors
from outbox.transports.rabbitmq.amqp.content_header import ContentHeader, MalformedHeader
from outbox.transports.rabbitmq.consuming.acks import Acks
from outbox.transports.rabbitmq.consuming.queue_consumer import delivery_of
from outbox.transports.rabbitmq.replayed import HeldMessage, read

__all__ = ["Browser", "broker_errors", "next_window"]

_FIRST_WINDOW, _LARGEST_WINDOW = 100, 1000
_WINDOW_BYTES = 16 * 1024 * 1024
_IDLE = 0.2
"""Seconds without a message, after which to ask the broker whether there are any."""

_PATIENCE = 10.0
"""Seconds without a message from a queue that isn't empty, after which browsing fails."""

_GIVING_BACK = 1.0
_NACKS_DO_NOT_COUNT = (4, 3)
_NOT_FOUND = 404


def next_window(messages: int, size: int) -> int:
    """Return the size of the next window, after one of ``messages`` with ``size`` bytes in total.

    1 to 1,000: the number of messages of the same average size that fit into 16 MiB.
    """
    if not messages:
        return _FIRST_WINDOW
    return max(1, min(_LARGEST_WINDOW, _WINDOW_BYTES * messages // max(1, size)))


class Browser:
    """Holds messages of one queue, in order. For one thread."""

    def __init__(
        self, connection: pika_connection.BlockingConnection, address: str, queue: str, bound: int
    ) -> None:
        """Make a browser that holds no messages yet.

        Args:
            connection: an open connection, which the caller closes after :meth:`give_back`.
            address: the broker's address, for errors.
            queue: the queue to take messages from.
            bound: the maximum of messages to take.
        """
        self._connection = connection
        self._address = address
        self._queue = queue
        self._bound = bound
        self._channel: BlockingChannel | None = None
        self._holding: list[BlockingChannel] = []
        self._acks = Acks()
        self._held = 0  # messages held by the current channel
        self._held_before = 0  # messages held by earlier channels

    def windows(self) -> Iterator[Sequence[HeldMessage]]:
        """Yield messages window by window, each once, until the limit or the end of the queue.

        Raises:
            BrokerError: the connection was lost, or the broker has messages but delivers none.
            UsageError: the broker refuses to deliver from the queue.
        """
        remaining = self._bound
        size = _FIRST_WINDOW
        while remaining > 0:
            with self._broker_errors():
                window = self._take(min(size, remaining))
            if not window:
                return
            remaining -= len(window)
            size = next_window(len(window), sum(len(message.body) for message in window))
            yield window

    def remove(self, messages: Sequence[ParkedMessage]) -> None:
        """Delete ``messages``, which are from the last window.

        Raises:
            BrokerError: the connection was lost; the messages may still be in the queue.
        """
        if not messages or self._channel is None:
            return
        tags = [message.tag for message in messages if isinstance(message, HeldMessage)]
        with self._broker_errors():
            for tag, multiple in self._acks.done(tags, hold=False):
                self._channel.basic_ack(tag, multiple)
            self._channel.tx_commit()
        self._held -= len(tags)

    def give_back(self) -> None:
        """Return the held messages to the queue, in order.

        A quorum queue requeues them with a delay. This waits until they are in the queue again, so
        that the next command sees them, but at most a second: another consumer may take them.
        """
        held, self._held_before = self._held_before + self._held, 0
        channels = [*self._holding, *([self._channel] if self._channel else [])]
        self._channel, self._holding, self._held = None, [], 0
        if not held:
            return
        with self._broker_errors():
            control = self._connection.channel()
            expected = self._waiting(control) + held
            for channel in channels:
                if channel.is_open and self._connection.version >= _NACKS_DO_NOT_COUNT:
                    channel.basic_nack(0, multiple=True, requeue=True)
                    channel.tx_commit()
                if channel.is_open:
                    channel.close()
            deadline = time.monotonic() + _GIVING_BACK
            while self._waiting(control) < expected and time.monotonic() < deadline:
                self._connection.process_data_events(0.01)

    def _broker_errors(self) -> contextlib.AbstractContextManager[None]:
        return broker_errors(self._address, self._queue)

    def _take(self, count: int) -> list[HeldMessage]:
        channel = self._next_channel()
        # A new consumer for each window, since its prefetch is fixed when it starts.
        channel.basic_qos(prefetch_count=count)
        window: list[HeldMessage] = []

        def receive(
            _channel: object,
            method: pika.spec.Basic.Deliver,
            properties: pika.BasicProperties,
            body: bytes,
        ) -> None:
            window.append(_read(self._queue, method, properties, body))

        consumer = channel.basic_consume(self._queue, receive)
        empty = 0
        last_message = time.monotonic()
        while len(window) < count and empty < 2:
            before = len(window)
            self._connection.process_data_events(_IDLE)
            if len(window) > before:
                empty, last_message = 0, time.monotonic()
            elif not self._waiting(channel):
                # Asked on the same channel, so that earlier deliveries arrive before the answer;
                # and asked twice, because the broker may have been about to deliver.
                empty += 1
            elif time.monotonic() - last_message > _PATIENCE:
                raise ConnectionLost(
                    f"the broker delivered none of the messages in queue {self._queue!r} for "
                    f"{_PATIENCE:.0f} s; another consumer may be its single active consumer"
                )
        channel.basic_cancel(consumer)
        self._held += len(window)
        return window

    def _next_channel(self) -> BlockingChannel:
        if self._channel is not None and self._held:
            self._holding.append(self._channel)
            self._held_before += self._held
            self._channel = None
        if self._channel is None:
            self._channel = self._connection.channel()
            self._channel.tx_select()
            self._acks = Acks()
            self._held = 0
        return self._channel

    def _waiting(self, channel: BlockingChannel) -> int:
        return int(channel.queue_declare(self._queue, passive=True).method.message_count)


def _read(
    queue: str, method: pika.spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes
) -> HeldMessage:
    try:
        header = ContentHeader.parse(pika_connection.content_header(properties))
    except MalformedHeader:
        header = None
    readable = properties.content_encoding != pika_connection.UNREADABLE
    delivery = delivery_of(queue, 0, method, properties, body)
    return read(queue, header, body, method.delivery_tag, readable=readable, delivery=delivery)


@contextlib.contextmanager
def broker_errors(address: str, queue: str = "") -> Iterator[None]:
    """Turn the exceptions that pika raises, not all of them its own, into outbox's errors."""
    try:
        yield
    except OutboxError:
        raise
    except pika.exceptions.ChannelClosedByBroker as error:
        if error.reply_code == _NOT_FOUND and queue:
            raise UsageError(f"the broker at {address} has no queue {queue!r}") from error
        raise UsageError(
            f"the broker at {address} refused: {error.reply_code} {error.reply_text!r}"
        ) from error
    except (pika.exceptions.AMQPError, OSError, AssertionError, IndexError) as error:
        raise pika_errors.connection_lost(error, address) from error
