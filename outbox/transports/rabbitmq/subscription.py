"""Consumes from RabbitMQ queues.

Delivery tags are valid only on the channel that delivered them, so each channel is a *generation*.
When a channel is lost, its deliveries are stale, and the broker redelivers them. Settling a stale
tag on a new channel would ack another message, or close the channel.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from outbox.errors import BrokerError, ConnectionLost
from outbox.messages.dead_letters import restore_origin
from outbox.messages.delivery import Delivery, QueueSpec, restore_delayed
from outbox.messages.headers import DELAY_EXCHANGE
from outbox.settings import Settings
from outbox.transports.rabbitmq import pika_connection, topology
from outbox.transports.rabbitmq.consuming.acks import Done
from outbox.transports.rabbitmq.consuming.queue_consumer import QueueConsumer
from outbox.transports.rabbitmq.link import Link
from outbox.transports.rabbitmq.parameters import CONSUMER, connection_parameters
from outbox.transports.rabbitmq.pika_errors import was_ended_for_an_error
from outbox.url import BrokerURL

__all__ = ["RabbitMQSubscription"]

logger = logging.getLogger("outbox.consumer")

_CANCEL_TIMEOUT = 2.0
_ACK_PAUSE = 0.002
"""Seconds between two writes of acks: waking the link for each message costs more than the rest of
its ack, and after the pause one ack covers many messages."""
_MANY_ACKS = 16
_SETTLING = 0.2
"""Seconds to wait after more acks than that before the channel is closed: the broker passes 32 at a
time to a quorum queue, and drops the others with the channel (rabbit_fifo_client of 3.10)."""
_DECLARING_AGAIN = 2.0
"""Seconds between two declarations of missing queues, however many messages miss them."""


class RabbitMQSubscription:
    """Consumes from all queues of a worker over one connection, with a channel for each.

    Handlers run elsewhere: the link's thread only hands out deliveries and writes acks, so that it
    answers heartbeats however long a handler takes. The methods below the line run on that thread.
    """

    limits_processing = True  # consumer_timeout, 30 minutes by default
    keeps_order = False  # several consumers share a queue, and a retry is a copy at its end

    def __init__(
        self, url: BrokerURL, settings: Settings, queues: Sequence[QueueSpec], prefetch: int
    ) -> None:
        self._link = Link(
            connection_parameters(url, settings, CONSUMER),
            self,
            name="outbox-consumer",
            credentials=settings.credentials,
        )
        self._deliver: Callable[[Delivery], None] = _not_started
        self._refused: Callable[[str], None] = _not_started
        self._connection: pika_connection.Connection | None = None
        generations = itertools.count(1)
        self._consumers = {
            spec.name: QueueConsumer(
                spec,
                settings.declare,
                prefetch,
                self._link,
                lambda: next(generations),
                self._hand_out,
                lambda reason: self._refused(reason),
            )
            for spec in queues
        }
        self._done = Done(prefetch)
        self._pausing = False
        self._settled_at = 0.0
        self._cancelled = threading.Event()
        self._declared_at = -_DECLARING_AGAIN

    def start(self, deliver: Callable[[Delivery], None], refused: Callable[[str], None]) -> None:
        """Connect, declare the queues and consume, until :meth:`cancel`."""
        self._deliver = deliver
        self._refused = refused
        self._link.start_now()

    @property
    def is_consuming(self) -> bool:
        """Whether the broker has a consumer for each queue that can be had at present, and one."""
        consumers = self._consumers.values()
        return any(consumer.is_consuming for consumer in consumers) and all(
            consumer.is_consuming or consumer.is_waiting for consumer in consumers
        )

    @property
    def owner(self) -> str:
        """Empty: the broker itself notices when a process dies."""
        return ""

    def ping(self, answer: Callable[[], None]) -> bool:
        """Have ``answer`` called soon on the link's thread; return False if it doesn't run."""
        return self._link.ping(answer)

    def release_of(self, owners: Sequence[str], was_begun: Callable[[str, str], bool]) -> None:
        """Do nothing: the broker has done it."""

    def ack(self, delivery: Delivery) -> None:
        """Ack ``delivery`` soon, together with others."""
        if self._done.add(delivery):
            self._link.call(self._on_done)

    def requeue(self, delivery: Delivery, delay: float) -> None:
        """Requeue ``delivery`` in ``delay`` seconds."""
        requeue = self._consumers[delivery.queue].requeue
        self._link.call(lambda: self._link.later(delay, lambda: requeue(delivery)))

    def back_off(self, delivery: Delivery, delay: float, headers: Mapping[str, Any]) -> None:
        """Raise NotImplementedError: a message can't be changed in its queue."""
        raise NotImplementedError

    def out(self, queue: str) -> int:
        """Return the number of unsettled deliveries from ``queue`` on its channel."""
        return self._consumers[queue].out

    def is_stale(self, delivery: Delivery) -> bool:
        """Return whether the channel of ``delivery`` is closed."""
        return delivery.generation != self._consumers[delivery.queue].generation

    def declare_again(self) -> None:
        """Declare all queues on the current connection, at most every two seconds."""
        self._link.call(self._declare_again)

    def cancel(self) -> None:
        """Cancel the consumers, and wait at most 2 seconds for the broker's answer."""
        self._link.call(self._cancel)
        self._cancelled.wait(_CANCEL_TIMEOUT)

    def close(self) -> None:
        """Write the waiting acks, give all other deliveries back, and close the connection."""
        written = threading.Event()
        self._link.call(lambda: self._finish(written))
        if self._connection is not None:
            written.wait(2 * _SETTLING)
        self._link.stop()

    # ------------------------------------------------------------------ on the link's thread

    def opened(self, connection: pika_connection.Connection) -> None:
        """Use a new connection: declare each queue, then consume from it."""
        self._connection = connection
        for consumer in self._consumers.values():
            consumer.opened(connection)

    def closed(self, error: BrokerError) -> None:
        """Forget the connection, whose deliveries can no longer be settled."""
        self._connection = None
        for consumer in self._consumers.values():
            consumer.closed(for_an_error=was_ended_for_an_error(error))

    def _hand_out(self, delivery: Delivery) -> None:
        """Deliver a message with the address to which it was first published."""
        if delivery.headers and DELAY_EXCHANGE in delivery.headers:
            restore_delayed(delivery)
        if not delivery.exchange:  # perhaps a dead letter that was replayed to this queue
            restore_origin(delivery)
        consumer = self._consumers[delivery.queue]
        consumer.out += 1
        if consumer.unknown_targets and delivery.target not in consumer.known_targets:
            consumer.check_target(delivery)
        self._deliver(delivery)

    def _declare_again(self) -> None:
        now = time.monotonic()
        connection = self._connection
        if connection is None or not connection.is_open:
            return
        if now - self._declared_at >= _DECLARING_AGAIN:
            self._declared_at = now
            for consumer in self._consumers.values():
                topology.declare(connection, consumer.steps(), lambda refused: None)

    def _on_done(self) -> None:
        """Write the waiting acks; those added during the pause wait for its end."""
        if not self._pausing:
            self._pausing = True
            self._link.later(_ACK_PAUSE, self._on_pause_over)
        self._write_acks()

    def _write_acks(self, *, hold: bool = True) -> None:
        consumers = self._consumers
        tags: dict[str, list[int]] = {
            name: [] for name, consumer in consumers.items() if consumer.acks.held
        }
        queue = None
        for delivery in self._done.take():
            if delivery.queue != queue:
                queue = delivery.queue
                consumer = consumers[queue]
                of_queue = tags.setdefault(queue, [])
            if delivery.generation == consumer.generation:
                of_queue.append(delivery.tag)
                consumer.out -= 1
            else:
                logger.warning(
                    "the ack of message %r of %r came too late: the broker has withdrawn its "
                    "delivery, or the connection was lost; it will be delivered again",
                    delivery.message_id,
                    delivery.queue,
                )
        for queue, done in tags.items():
            channel = consumers[queue].channel
            if channel is not None and channel.is_open:
                acks = consumers[queue].acks.done(done, hold=hold)
                for tag, multiple in acks:
                    channel.basic_ack(tag, multiple)
                if len(acks) > _MANY_ACKS:
                    self._settled_at = time.monotonic() + _SETTLING

    def _on_pause_over(self) -> None:
        self._pausing = False
        if self._done.end_pause() or any(
            consumer.acks.held for consumer in self._consumers.values()
        ):
            self._on_done()

    def _cancel(self) -> None:
        waiting = set(self._consumers)

        def on_cancelled(queue: str) -> None:
            waiting.discard(queue)
            if not waiting:
                self._cancelled.set()

        for queue, consumer in self._consumers.items():
            consumer.cancel(lambda queue=queue: on_cancelled(queue))  # type: ignore[misc]

    def _finish(self, written: threading.Event) -> None:
        self._write_acks(hold=False)
        for consumer in self._consumers.values():
            consumer.give_back()
        self._link.later(max(0.0, self._settled_at - time.monotonic()), written.set)


def _not_started(_: object) -> None:
    raise ConnectionLost("the subscription was not started")
