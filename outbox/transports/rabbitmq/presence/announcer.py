"""Publishes what this process announces of itself, beside the events.

On a separate channel, since the broker closes a channel whose publishing or declaration it
refuses. Without confirms: an announcement that doesn't arrive is replaced by the next one.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import pika
import pika.channel
import pika.exceptions

from outbox.settings import Declare
from outbox.transports.rabbitmq import pika_connection
from outbox.transports.rabbitmq.pika_errors import reply_of

__all__ = ["PRESENCE_EXCHANGE", "Announcer"]

logger = logging.getLogger("outbox.presence")

PRESENCE_EXCHANGE = "outbox.presence"


class Announcer:
    """Announces over one connection after the other. Only for the link's thread.

    If the broker refuses, nothing more is announced until the next connection.
    """

    def __init__(self, declare: Declare, may_publish: Callable[[], bool]) -> None:
        """Create an announcer.

        Args:
            declare: the exchange is created if it is ``create``.
            may_publish: returns whether the connection is open, and not blocked by the broker.
        """
        self._creates = declare == "create"
        self._may_publish = may_publish
        self._channel: pika.channel.Channel | None = None
        self._logged = ""

    def announce(self, connection: pika_connection.Connection, body: bytes) -> None:
        """Publish ``body`` over the current connection, or drop it."""
        if not self._may_publish():
            return
        if self._channel is None:
            # It gets the first free number, and that of the publishing channel isn't free now.
            self._channel = connection.channel(
                on_open_callback=lambda channel: self._on_open(channel, body)
            )
        elif self._channel.is_open:
            self._publish(self._channel, body)

    def closed(self) -> None:
        """Forget the connection."""
        self._channel = None

    def _on_open(self, channel: pika.channel.Channel, body: bytes) -> None:
        channel.add_on_close_callback(self._on_closed)

        def publish(_frame: object = None) -> None:
            self._publish(channel, body)

        if self._creates:
            channel.exchange_declare(PRESENCE_EXCHANGE, "fanout", durable=True, callback=publish)
        else:
            publish()

    def _publish(self, channel: pika.channel.Channel, body: bytes) -> None:
        if self._may_publish():
            properties = pika.BasicProperties(  # type: ignore[no-untyped-call]
                content_type="application/json", delivery_mode=1, type=PRESENCE_EXCHANGE
            )
            # Not mandatory: without listeners, each would be returned.
            channel.basic_publish(PRESENCE_EXCHANGE, "", body, properties, mandatory=False)

    def _on_closed(self, _channel: pika.channel.Channel, reason: Exception) -> None:
        if isinstance(reason, pika.exceptions.ChannelClosedByBroker):
            why = reply_of(reason)
            level = logging.DEBUG if why == self._logged else logging.INFO
            self._logged = why
            logger.log(level, "this process isn't announced, as the broker refuses that: %s", why)
