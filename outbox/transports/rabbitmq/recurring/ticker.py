"""The ticker of RabbitMQ: a connection, and a channel for each recurring task."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from outbox.errors import BrokerError, UsageError
from outbox.recurring.recurring_task import RecurringTask
from outbox.settings import Settings
from outbox.transports.rabbitmq import pika_connection
from outbox.transports.rabbitmq.amqp.encoder import Encoder
from outbox.transports.rabbitmq.link import Link
from outbox.transports.rabbitmq.parameters import connection_parameters
from outbox.transports.rabbitmq.recurring.tick_queue import LOOK_EVERY, TickQueue
from outbox.url import BrokerURL

__all__ = ["RabbitMQTicker"]

_HEARTBEAT = 4
"""Seconds. RabbitMQ gives up a client from which nothing has come for two to three times as long:
so another worker goes on within 15 s where a machine stands still or has vanished."""


class RabbitMQTicker:
    """Ticks for its tasks where it has the single active consumer.

    The connection is not a worker's: a worker's own has to live through pauses of its process that
    are longer than that.
    """

    def __init__(self, url: BrokerURL, settings: Settings, tasks: Sequence[RecurringTask]) -> None:
        """Create a ticker, without connecting yet.

        Raises:
            UsageError: a task has a name that is too long, or wants what needs a database.
        """
        for task in tasks:
            if task.skips:
                raise UsageError(
                    f"the recurring task {task.name} has overlap='skip', which needs a database as "
                    "the broker: RabbitMQ doesn't say whether a call has ended"
                )
        if not 0 < settings.heartbeat <= _HEARTBEAT:
            settings = dataclasses.replace(settings, heartbeat=_HEARTBEAT)
        self._link = Link(
            connection_parameters(url, settings, "ticks"),
            self,
            name="outbox-ticks",
            on_started=self._turn,
            credentials=settings.credentials,
        )
        self._encoder = Encoder(settings.app_id)
        self._queues = [TickQueue(task, settings, self._link, self._encoder) for task in tasks]

    def start(self) -> None:
        """Connect, and take part."""
        self._link.start_now()

    def stop(self) -> None:
        """Close the connection: the broker chooses another worker."""
        self._link.stop()

    def opened(self, connection: pika_connection.Connection) -> None:
        """Use a new connection. On the link's thread."""
        frame_max = connection.params.frame_max
        if isinstance(frame_max, int) and frame_max:
            self._encoder.limit_frames(frame_max)
        for queue in self._queues:
            queue.opened(connection)

    def closed(self, error: BrokerError) -> None:
        """Forget the connection. On the link's thread."""
        for queue in self._queues:
            queue.closed()

    def _turn(self) -> None:
        for queue in self._queues:
            queue.look()
        self._link.later(LOOK_EVERY, self._turn)
