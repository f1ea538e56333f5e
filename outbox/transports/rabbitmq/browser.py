"""Holds the messages of a parking or dead-letter queue, to look at, send on or delete.

The rules:

1.  A message is deleted by an ack alone. Whatever ends this process or its connection, the broker
    puts back what was held and not acked.
2.  What is looked at stays held until the end, so that no message is seen twice in one run. It is
    taken in windows; a channel that holds something from its window is left as it is, and the next
    window has a channel of its own.
3.  The acks of a window are one transaction (AMQP 0-9-1, class Tx). A quorum queue takes 32
    settlements at a time from a channel and has the others wait there; those are gone when the
    channel is closed. A transaction is one settlement, however many messages it is about.
4.  At the end what is held goes back in order: channel after channel is closed. RabbitMQ 4.3 counts
    that as a failed delivery, of which a quorum queue by default allows 20, and a nack it does not
    count: there it is a nack.
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
from outbox.transports.rabbitmq.acks import Acks
from outbox.transports.rabbitmq.amqp.content_header import ContentHeader, MalformedHeader
from outbox.transports.rabbitmq.replayed import HeldMessage, read

__all__ = ["Browser", "broker_errors", "next_window"]

_FIRST_WINDOW, _LARGEST_WINDOW = 100, 1000
_WINDOW_BYTES = 16 * 1024 * 1024
_IDLE = 0.2
"""Seconds without a message, after which the broker is asked whether there are any."""

_PATIENCE = 10.0
"""Seconds without a message, while the broker says that there are some, until that is an error."""

_GIVING_BACK = 1.0
_NACKS_DO_NOT_COUNT = (4, 3)
_NOT_FOUND = 404


def next_window(messages: int, size: int) -> int:
    """Return how many messages to take at a time, after so many of ``size`` bytes together.

    1 to 1,000; as many as 16 MiB would hold of that kind.
    """
    if not messages:
        return _FIRST_WINDOW
    return max(1, min(_LARGEST_WINDOW, _WINDOW_BYTES * messages // max(1, size)))


class Browser:
    """Holds messages of one queue, in order. For one thread."""

    def __init__(
        self, connection: pika_connection.BlockingConnection, address: str, queue: str, bound: int
    ) -> None:
        """Hold nothing yet.

        Args:
            connection: open; to be closed by the caller, after :meth:`give_back`.
            address: of the broker, for errors.
            queue: to take from.
            bound: how many messages to take at the most.
        """
        self._connection = connection
        self._address = address
        self._queue = queue
        self._bound = bound
        self._channel: BlockingChannel | None = None
        self._holding: list[BlockingChannel] = []
        self._acks = Acks()
        self._held = 0  # by the channel
        self._held_before = 0  # by those that are left as they are

    def windows(self) -> Iterator[Sequence[HeldMessage]]:
        """Take the messages window by window, each once, until the bound or the end of the queue.

        Raises:
            BrokerError: the connection is lost, or the broker has messages and delivers none.
            UsageError: the broker refuses to deliver from the queue.
        """
        left = self._bound
        size = _FIRST_WINDOW
        while left > 0:
            with self._broker_errors():
                window = self._take(min(size, left))
            if not window:
                return
            left -= len(window)
            size = next_window(len(window), sum(len(one.body) for one in window))
            yield window

    def remove(self, messages: Sequence[ParkedMessage]) -> None:
        """Delete ``messages``, which are of the window that was taken last.

        Raises:
            BrokerError: the connection is lost; some may come back.
        """
        if not messages or self._channel is None:
            return
        tags = [one.tag for one in messages if isinstance(one, HeldMessage)]
        with self._broker_errors():
            for tag, multiple in self._acks.done(tags, hold=False):
                self._channel.basic_ack(tag, multiple)
            self._channel.tx_commit()
        self._held -= len(tags)

    def give_back(self) -> None:
        """Give back all that is held, in order; a lost connection has done so by itself.

        A quorum queue does so a moment after it was told. Who looks next should see them: that
        moment is waited for, a second at the most, since others may take them at once.
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
        # A new consumer each time: the limit is a consumer's own, and fixed when it begins.
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
        heard = time.monotonic()
        while len(window) < count and empty < 2:
            before = len(window)
            self._connection.process_data_events(_IDLE)
            if len(window) > before:
                empty, heard = 0, time.monotonic()
            elif not self._waiting(channel):
                # Asked on the same channel, so that what was delivered before comes before the
                # answer; and once more, since the broker may have been just about to deliver.
                empty += 1
            elif time.monotonic() - heard > _PATIENCE:
                raise ConnectionLost(
                    f"the queue {self._queue!r} has messages and has delivered none for "
                    f"{_PATIENCE:.0f} s; another consumer may be its single active one"
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
    return read(queue, header, body, method.delivery_tag, readable=readable)


@contextlib.contextmanager
def broker_errors(address: str, queue: str = "") -> Iterator[None]:
    """Turn what pika raises, which is more than its own exceptions, into outbox's errors."""
    try:
        yield
    except OutboxError:
        raise
    except pika.exceptions.ChannelClosedByBroker as error:
        if error.reply_code == _NOT_FOUND and queue:
            raise UsageError(f"the broker at {address} has no queue {queue!r}") from error
        raise UsageError(
            f"the broker at {address} refuses: {error.reply_code} {error.reply_text!r}"
        ) from error
    except (pika.exceptions.AMQPError, OSError, AssertionError, IndexError) as error:
        raise pika_errors.connection_lost(error, address) from error
