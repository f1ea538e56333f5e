"""Consumes from RabbitMQ queues.

Delivery tags are valid only on the channel that delivered them, so each channel is a *generation*.
When a channel is lost, its deliveries are stale, and the broker redelivers them. Settling a stale
tag on a new channel would ack another message, or close the channel.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pika
import pika.channel
import pika.exceptions
import pika.spec

from outbox.errors import BrokerError, ConnectionLost
from outbox.messages.dead_letters import restore_origin
from outbox.messages.delivery import Delivery, QueueSpec
from outbox.messages.headers import DELAY_EXCHANGE
from outbox.settings import Settings
from outbox.system.backoff import backoff
from outbox.transports.rabbitmq import delay_ladder, pika_connection, topology
from outbox.transports.rabbitmq.acks import Acks, Done
from outbox.transports.rabbitmq.delay_ladder import restore_delayed
from outbox.transports.rabbitmq.link import Link
from outbox.transports.rabbitmq.parameters import connection_parameters
from outbox.transports.rabbitmq.pika_errors import reply_of
from outbox.url import BrokerURL

__all__ = ["RabbitMQSubscription"]

logger = logging.getLogger("outbox.consumer")

_GIVES_UP = (4, 0)
"""Since then a quorum queue without a limit has one of 20 (RabbitMQ 4.0 release notes)."""
_CANCEL_TIMEOUT = 2.0
_ACK_PAUSE = 0.002
"""Seconds between two writes of acks: waking the link for each message costs more than the rest of
its ack, and after the pause one ack covers many messages."""
_MANY_ACKS = 16
_SETTLING = 0.2
"""Seconds to wait after more acks than that before the channel is closed: the broker passes 32 at a
time to a quorum queue, and drops the others with the channel (rabbit_fifo_client of 3.10)."""


class RabbitMQSubscription:
    """Consumes from all queues of a worker over one channel.

    Handlers run elsewhere: the link's thread only hands out deliveries and writes acks, so that it
    answers heartbeats however long a handler takes. The methods below the line run on that thread.
    """

    limits_processing = True  # consumer_timeout, 30 minutes by default

    def __init__(
        self, url: BrokerURL, settings: Settings, queues: Sequence[QueueSpec], prefetch: int
    ) -> None:
        self._settings = settings
        self._queues = queues
        self._prefetch = prefetch
        self._link = Link(
            connection_parameters(url, settings, "consumer"), self, name="outbox-consumer"
        )
        self._deliver: Callable[[Delivery], None] = _not_started
        self._refused: Callable[[str], None] = _not_started
        self._connection: pika_connection.Connection | None = None
        self._channel: pika.channel.Channel | None = None
        self._generation = 0
        self._acks = Acks()
        self._out = dict.fromkeys((spec.name for spec in queues), 0)
        self._done = Done(prefetch)
        self._pausing = False
        self._settled_at = 0.0
        self._cancelled = threading.Event()
        self._cancelling = False
        self._has_consumed = False
        self._consumers = 0  # those that the broker has confirmed on the channel
        self._older: set[str] = set()  # those that were named for having no limit of ours
        self._failures = 0
        self._attempt = 0  # numbers the attempts to consume; callbacks of earlier ones are ignored

    def start(self, deliver: Callable[[Delivery], None], refused: Callable[[str], None]) -> None:
        """Connect, declare the queues and consume, until :meth:`cancel`."""
        self._deliver = deliver
        self._refused = refused
        self._link.start_now()

    @property
    def is_consuming(self) -> bool:
        """Whether the broker has a consumer for each queue."""
        return self._channel is not None and self._consumers == len(self._queues)

    def ack(self, delivery: Delivery) -> None:
        """Ack ``delivery`` soon, together with others."""
        if self._done.add(delivery):
            self._link.call(self._on_done)

    def requeue(self, delivery: Delivery, delay: float) -> None:
        """Requeue ``delivery`` in ``delay`` seconds."""
        self._link.call(lambda: self._link.later(delay, lambda: self._reject(delivery)))

    def out(self, queue: str) -> int:
        """Return the number of unsettled deliveries from ``queue`` on the channel."""
        return self._out[queue]

    def is_stale(self, delivery: Delivery) -> bool:
        """Return whether the channel of ``delivery`` is closed."""
        return self._channel is None or delivery.generation != self._generation

    def declare_again(self) -> None:
        """Declare all queues on the current connection."""
        self._link.call(self._declare_again)

    def cancel(self) -> None:
        """Cancel the consumers, and wait at most 2 seconds for the broker's answer."""
        self._link.call(self._cancel)
        self._cancelled.wait(_CANCEL_TIMEOUT)

    def close(self) -> None:
        """Write the waiting acks and close the connection, which requeues all other deliveries."""
        written = threading.Event()
        self._link.call(lambda: self._finish(written))
        if self._channel is not None:
            written.wait(2 * _SETTLING)
        self._link.stop()

    # ------------------------------------------------------------------ on the link's thread

    def opened(self, connection: pika_connection.Connection) -> None:
        """Use a new connection: declare the queues, then consume."""
        self._connection = connection
        self._begin()

    def closed(self, error: BrokerError) -> None:
        """Forget the channel, whose deliveries can no longer be settled."""
        self._connection = None
        self._forget_channel()
        if self._cancelling:
            self._cancelled.set()

    def _begin(self) -> None:
        self._attempt += 1
        if self._connection is not None and self._connection.is_open and not self._cancelling:
            for spec in self._queues:
                obstacle = topology.obstacle(spec, self._connection.version)
                if obstacle is not None:
                    self._cannot_consume(obstacle)
                    return
            declared = functools.partial(self._on_declared, self._attempt)
            topology.declare(self._connection, self._steps(), declared, older=self._on_older)

    def _steps(self) -> list[topology.Step]:
        mode = self._settings.declare
        steps = []
        for exchange in dict.fromkeys(spec.exchange for spec in self._queues):
            steps += topology.exchange(exchange, mode)
        for spec in self._queues:
            steps += topology.queue(spec, mode)
            steps += delay_ladder.way_to_queue(spec.name, mode)
        return steps

    def _on_older(self, queue: str) -> None:
        """Say once what it means that ``queue`` was declared without our limit."""
        if queue in self._older or self._connection is None:
            return
        self._older.add(queue)
        if self._connection.version >= _GIVES_UP:
            logger.info(
                "queue %r has no x-delivery-limit: unless a policy sets another delivery-limit, "
                "RabbitMQ %s gives up a message that came back to it 20 times; set a policy with "
                "the delivery-limit %d, or delete the queue so that it is declared with it",
                queue,
                ".".join(map(str, self._connection.version)),
                topology.DELIVERY_LIMIT,
            )

    def _declare_again(self) -> None:
        if self._connection is not None and self._connection.is_open:
            topology.declare(self._connection, self._steps(), lambda refused: None)

    def _on_declared(self, attempt: int, refused: str | None) -> None:
        if attempt != self._attempt:
            return
        if refused is not None:
            self._cannot_consume(refused)
        elif self._connection is not None and self._connection.is_open:
            opened = functools.partial(self._on_channel_open, attempt)
            self._connection.channel(on_open_callback=opened)

    def _cannot_consume(self, reason: str) -> None:
        if not self._has_consumed:
            self._refused(reason)
        logger.error("cannot consume: %s; retrying", reason)
        self._begin_later()

    def _begin_later(self) -> None:
        attempt = self._attempt

        def begin() -> None:
            if attempt == self._attempt:  # else a new connection has already begun another one
                self._begin()

        self._link.later(backoff(self._failures), begin)
        self._failures += 1

    def _on_channel_open(self, attempt: int, channel: pika.channel.Channel) -> None:
        if attempt != self._attempt:
            channel.close()
            return
        channel.add_on_close_callback(functools.partial(self._on_channel_closed, attempt))
        channel.add_on_cancel_callback(lambda _frame: self._on_cancelled_by_broker(channel))
        channel.basic_qos(
            prefetch_count=self._prefetch, callback=lambda _frame: self._consume(channel)
        )

    def _consume(self, channel: pika.channel.Channel) -> None:
        self._generation += 1
        self._acks = Acks()
        self._out = dict.fromkeys(self._out, 0)
        self._channel = channel
        self._consumers = 0
        queues: dict[bytes, str] = {}
        for spec in self._queues:
            tag = channel.basic_consume(
                spec.name, self._receiver(spec.name), callback=self._on_consuming
            )
            queues[tag.encode()] = spec.name
        if self._connection is not None:
            self._connection.read_deliveries(
                channel.channel_number, self._generation, queues, self._hand_out
            )

    def _on_consuming(self, _frame: object) -> None:
        self._has_consumed = True
        self._consumers += 1
        self._failures = 0
        self._link.ready()
        if self._cancelling:
            self._cancel()

    def _receiver(self, queue: str) -> Any:
        generation = self._generation

        def receive(
            _channel: object,
            method: pika.spec.Basic.Deliver,
            properties: pika.BasicProperties,
            body: bytes,
        ) -> None:
            headers: Mapping[str, Any] | None = properties.headers
            self._hand_out(
                Delivery(
                    queue,
                    method.delivery_tag,
                    generation,
                    method.redelivered,
                    _text(method.exchange),
                    _text(method.routing_key),
                    body,
                    _text(properties.content_type),
                    _text(properties.content_encoding),
                    headers,
                    _text(properties.message_id),
                    properties.priority,
                    properties.timestamp,
                )
            )

        return receive

    def _hand_out(self, delivery: Delivery) -> None:
        """Deliver a message with the address to which it was first published."""
        if delivery.headers and DELAY_EXCHANGE in delivery.headers:
            restore_delayed(delivery)
        if not delivery.exchange:  # perhaps a dead letter that was replayed to this queue
            restore_origin(delivery)
        self._out[delivery.queue] += 1
        self._deliver(delivery)

    def _on_cancelled_by_broker(self, channel: pika.channel.Channel) -> None:
        """Consume again on another channel: a queue was deleted or moved (basic.cancel)."""
        logger.warning("the broker cancelled a consumer; consuming again")
        if channel is self._channel:
            self._forget_channel()
            if channel.is_open:
                channel.close()
            self._begin_later()

    def _on_channel_closed(
        self, attempt: int, channel: pika.channel.Channel, reason: Exception
    ) -> None:
        if attempt != self._attempt or not isinstance(
            reason, pika.exceptions.ChannelClosedByBroker
        ):
            return
        logger.warning("the broker closed the consumers' channel: %s; retrying", reply_of(reason))
        if channel is self._channel:
            self._forget_channel()
        self._begin_later()

    def _forget_channel(self) -> None:
        self._channel = None
        self._generation += 1
        if self._connection is not None:
            self._connection.read_all_with_pika()

    def _finish(self, written: threading.Event) -> None:
        self._write_acks(hold=False)
        self._link.later(max(0.0, self._settled_at - time.monotonic()), written.set)

    def _on_done(self) -> None:
        """Write the waiting acks; those added during the pause wait for its end."""
        if not self._pausing:
            self._pausing = True
            self._link.later(_ACK_PAUSE, self._on_pause_over)
        self._write_acks()

    def _write_acks(self, *, hold: bool = True) -> None:
        tags = []
        for delivery in self._done.take():
            if not self.is_stale(delivery):
                tags.append(delivery.tag)
                self._out[delivery.queue] -= 1
        if self._channel is not None and self._channel.is_open:
            acks = self._acks.done(tags, hold=hold)
            for tag, multiple in acks:
                self._channel.basic_ack(tag, multiple)
            if len(acks) > _MANY_ACKS:
                self._settled_at = time.monotonic() + _SETTLING

    def _on_pause_over(self) -> None:
        self._pausing = False
        if self._done.end_pause() or self._acks.held:
            self._on_done()

    def _reject(self, delivery: Delivery) -> None:
        channel = self._channel
        if channel is None or not channel.is_open or self.is_stale(delivery):
            return
        if self._acks.settle(delivery.tag):
            self._out[delivery.queue] -= 1
            # Not a reject, which RabbitMQ 4.3 counts against a quorum queue's delivery limit.
            channel.basic_nack(delivery.tag, requeue=True)

    def _cancel(self) -> None:
        self._cancelling = True
        channel = self._channel
        if channel is None or not channel.is_open or not channel.consumer_tags:
            self._cancelled.set()
            return
        waiting = set(channel.consumer_tags)

        def cancelled(tag: str) -> None:
            waiting.discard(tag)
            if not waiting:
                self._cancelled.set()

        for tag in list(waiting):
            channel.basic_cancel(tag, callback=lambda _frame, tag=tag: cancelled(tag))  # type: ignore[misc]


def _text(value: Any) -> Any:
    """Return a short string as text: pika leaves it as bytes if it isn't UTF-8."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _not_started(_: Any) -> None:
    raise ConnectionLost("the subscription was not started")
