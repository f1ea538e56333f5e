"""One queue of a subscription, consumed over a separate channel.

Each queue has its own way to being consumed: its declaration, its channel, its tries. So one that
can't be had holds up no other one, and the broker, which closes a channel over a message that waits
for its ack too long, takes back the messages of that queue alone. The rules:

1.  What the user must change ends the first try for good: other arguments (406), no permission
    (403), and without ``declare="create"`` a missing queue or exchange (404).
2.  All else is tried again with a growing pause: the node of a classic queue is down (which is a
    404, too), another connection has the queue for itself (405, or 403 "in exclusive use").
3.  If a queue's try ended the whole connection (541: a quorum queue without a majority), it is a
    *suspect*: it is tried over a connection apart, until it can be consumed from there.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from typing import Any

import pika
import pika.channel
import pika.exceptions
import pika.spec

from outbox.messages.delivery import Delivery, QueueSpec, dead_letter_queue
from outbox.messages.topics import matches
from outbox.settings import Declare
from outbox.system.backoff import backoff
from outbox.transports.rabbitmq import delay_ladder, pika_connection, topology
from outbox.transports.rabbitmq.consuming.acks import Acks
from outbox.transports.rabbitmq.link import ConnectionApart, Link
from outbox.transports.rabbitmq.pika_errors import one_line, reply_of

__all__ = ["QueueConsumer", "delivery_of"]

logger = logging.getLogger("outbox.consumer")

_GIVES_UP = (4, 0)
"""Since then a quorum queue without a limit has one of 20 (RabbitMQ 4.0 release notes)."""
_NACKS_DO_NOT_COUNT = (4, 3)
_CHECKED_TARGETS = 1000


class QueueConsumer:
    """The way to one queue's messages, over one connection after the other. For the link's thread.

    ``out``, ``generation`` and the flags may be read on any thread.

    Attributes:
        spec: the queue.
        generation: the number of its channel, unlike that of any other queue's; 0 without one.
        out: the number of unsettled deliveries on the channel.
        channel: its channel, or None.
        acks: the unsettled deliveries of the channel.
        is_consuming: whether the broker has a consumer for it.
        is_waiting: whether it can't be had for now, and is tried again after a pause.
        known_targets: the targets of messages that arrived and need no check.
        unknown_targets: how many others are still checked.
    """

    def __init__(
        self,
        spec: QueueSpec,
        mode: Declare,
        prefetch: int,
        link: Link,
        next_generation: Callable[[], int],
        hand_out: Callable[[Delivery], None],
        refused: Callable[[str], None],
    ) -> None:
        """Start without a connection.

        Args:
            spec: the queue.
            mode: whether queues may be declared.
            prefetch: the number of messages that the broker sends ahead.
            link: the link that runs this.
            next_generation: returns the number of the next channel, 1 or more.
            hand_out: the callback for a delivery.
            refused: the callback for why the first try can't succeed until something is changed.
        """
        self.spec = spec
        self.generation = 0
        self.out = 0
        self.channel: pika.channel.Channel | None = None
        self.acks = Acks()
        self.is_consuming = False
        self.is_waiting = False
        self.known_targets: set[str] = {spec.name}
        # Where others bind the queue, its topics say nothing about what may arrive.
        self.unknown_targets = _CHECKED_TARGETS if mode == "create" else 0
        self._mode = mode
        self._prefetch = prefetch
        self._link = link
        self._next_generation = next_generation
        self._hand_out = hand_out
        self._refused = refused
        self._connection: pika_connection.Connection | None = None
        self._apart: ConnectionApart | None = None
        self._try = 0  # numbers the tries; callbacks of earlier ones are ignored
        self._is_trying = False
        self._is_suspect = False
        self._failures = 0
        self._has_counted = False
        self._older: set[str] = set()  # those named for having no limit of ours
        self._on_cancelled: Callable[[], None] | None = None  # set from the first cancel() on

    # ------------------------------------------------------------------ the way there

    def opened(self, connection: pika_connection.Connection) -> None:
        """Use a new connection: declare the queue, then consume."""
        self._connection = connection
        if self._is_suspect:
            self._try_later()
        else:
            self._begin()

    def closed(self, *, for_an_error: bool) -> None:
        """Forget the connection, whose deliveries can no longer be settled.

        Args:
            for_an_error: whether the broker ended it over something that was sent to it, such as
                the declaration of a queue.
        """
        self._connection = None
        self._forget_channel()
        if self._is_trying and for_an_error:
            logger.warning(
                "the broker ended the connection while %r was to be consumed; it is tried over "
                "another one first",
                self.spec.name,
            )
            self._is_suspect = self.is_waiting = True
            self._failures += 1
        self._is_trying = False
        self._try += 1
        self._end_apart()
        if self._on_cancelled is not None:
            self._on_cancelled()

    def steps(self) -> list[topology.Step]:
        """Return the steps that declare the queue and all that it needs."""
        spec, mode = self.spec, self._mode
        return [
            *topology.exchange(spec.exchange, mode),
            *topology.queue(spec, mode),
            *delay_ladder.way_to_queue(spec.name, mode),
        ]

    def _begin(self) -> None:
        self._try += 1
        connection = self._connection
        if connection is None or not connection.is_open or self._on_cancelled is not None:
            return
        obstacle = topology.obstacle(self.spec, connection.version)
        if obstacle is not None:
            self._cannot_consume(obstacle, is_usage=True)
            return
        self._is_trying = True
        declared = functools.partial(self._on_declared, self._try)
        topology.declare(
            connection, self.steps(), declared, older=self._on_older, counted=self._on_counted
        )

    def _on_counted(self, queue: str, messages: int) -> None:
        """Say once how many dead letters wait: those that the broker made are logged nowhere."""
        if queue == dead_letter_queue(self.spec.name) and not self._has_counted:
            self._has_counted = True
            if messages:
                logger.info("%d dead letter(s) of %r wait in %r", messages, self.spec.name, queue)

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

    def _on_declared(self, number: int, refused: str | None) -> None:
        if number != self._try:
            return
        if refused is not None:
            usage = topology.is_wrong_usage(refused, self._mode)
            self._cannot_consume(refused, is_usage=usage)
        elif self._connection is not None and self._connection.is_open:
            opened = functools.partial(self._on_channel_open, number)
            self._connection.channel(on_open_callback=opened)

    def _on_channel_open(self, number: int, channel: pika.channel.Channel) -> None:
        if number != self._try:
            channel.close()
            return
        channel.add_on_close_callback(functools.partial(self._on_channel_closed, number))
        channel.add_on_cancel_callback(lambda _frame: self._on_cancelled_by_broker(channel))
        channel.basic_qos(
            prefetch_count=self._prefetch, callback=lambda _frame: self._consume(number, channel)
        )

    def _consume(self, number: int, channel: pika.channel.Channel) -> None:
        if number != self._try or self._connection is None:
            return
        queue = self.spec.name
        self.acks = Acks()
        self.out = 0
        self.channel = channel
        self.generation = generation = self._next_generation()
        consuming = functools.partial(self._on_consuming, number)
        tag = channel.basic_consume(queue, self.receiver(generation), callback=consuming)
        self._connection.read_deliveries(
            channel.channel_number, generation, {tag.encode(): queue}, self._hand_out
        )

    def _on_consuming(self, number: int, _frame: object) -> None:
        if number != self._try:
            return
        if self.is_waiting:
            logger.info("consuming from %r again", self.spec.name)
        self.is_consuming = True
        self.is_waiting = self._is_trying = False
        self._failures = 0
        self._link.ready()
        if self._on_cancelled is not None:
            self._cancel()

    def receiver(self, generation: int) -> Any:
        """Return pika's callback for a delivery that is not decoded without it."""

        def receive(
            _channel: object,
            method: pika.spec.Basic.Deliver,
            properties: pika.BasicProperties,
            body: bytes,
        ) -> None:
            self._hand_out(delivery_of(self.spec.name, generation, method, properties, body))

        return receive

    # ------------------------------------------------------------------ obstacles

    def _cannot_consume(self, reason: str, *, is_usage: bool) -> None:
        """Try again after a pause; a user's mistake that the first try shows is reported."""
        if is_usage and not self._failures:
            self._refused(reason)
        self._fail(f"cannot consume from {self.spec.name!r}: {reason}")

    def _fail(self, text: str) -> None:
        self._is_trying = False
        self.is_waiting = True
        pause = self._try_later()
        self._failures += 1
        logger.error("%s; retrying in %.1f s", text, pause)

    def _try_later(self) -> float:
        pause = backoff(self._failures)
        number = self._try

        def begin() -> None:
            if number != self._try or self._connection is None:
                return  # a new connection has begun another try, or will
            if self._is_suspect:
                self._try_apart()
            else:
                self._begin()

        self._link.later(pause, begin)
        return pause

    def _on_cancelled_by_broker(self, channel: pika.channel.Channel) -> None:
        """Consume again on another channel: the queue was deleted or moved (basic.cancel).

        RabbitMQ 4.3 cancels the consumer also when a message waits for its ack too long.
        """
        if channel is not self.channel:
            return
        logger.warning("the broker cancelled the consumer of %r; retrying", self.spec.name)
        self.give_back()
        self._forget_channel()
        if channel.is_open:
            channel.close()
        self._try += 1
        self._try_later()
        self._failures += 1

    def _on_channel_closed(
        self, number: int, channel: pika.channel.Channel, reason: Exception
    ) -> None:
        if number != self._try or not isinstance(reason, pika.exceptions.ChannelClosedByBroker):
            return
        was_consuming = self.is_consuming
        if channel is self.channel:
            self._forget_channel()
        self._try += 1
        if was_consuming:
            self._is_trying = False
            logger.warning(
                "the broker closed the channel of %r: %s; retrying",
                self.spec.name,
                reply_of(reason),
            )
            self._try_later()
            self._failures += 1
        else:
            refused = one_line(reason.reply_text)
            usage = topology.is_wrong_usage(refused, self._mode)
            self._cannot_consume(refused, is_usage=usage)

    def _forget_channel(self) -> None:
        channel, self.channel = self.channel, None
        self.generation = 0
        self.acks = Acks()
        self.is_consuming = False
        if self._connection is not None and channel is not None:
            self._connection.read_with_pika(channel.channel_number)

    # ------------------------------------------------------------------ suspects

    def _try_apart(self) -> None:
        """Try to consume over another connection, for a moment."""
        self._end_apart()
        self.is_waiting = True
        self._apart = self._link.connect_apart(self._on_apart_open, self._on_apart_ended)

    def _on_apart_open(self, connection: pika_connection.Connection) -> None:
        def on_declared(refused: str | None) -> None:
            if refused is None and connection.is_open:
                connection.channel(on_open_callback=on_channel)
            elif refused is not None:
                self._on_apart_works()  # it ends no connection; what it was refused comes again

        def on_channel(channel: pika.channel.Channel) -> None:
            channel.add_on_close_callback(on_closed)
            channel.basic_qos(prefetch_count=1)
            channel.basic_consume(
                self.spec.name,
                lambda *_delivery: None,  # it goes back with the connection
                callback=lambda _frame: self._on_apart_works(),
            )

        def on_closed(_channel: pika.channel.Channel, reason: Exception) -> None:
            if isinstance(reason, pika.exceptions.ChannelClosedByBroker):
                self._link.later(0, self._on_apart_works)

        topology.declare(connection, self.steps(), on_declared)

    def _on_apart_works(self) -> None:
        if self._apart is not None:
            self._end_apart()
            self._is_suspect = False
            self._begin()

    def _on_apart_ended(self, _code: int, reason: str) -> None:
        if self._apart is not None:
            self._apart = None
            self._fail(f"cannot consume from {self.spec.name!r}: {reason}")

    def _end_apart(self) -> None:
        apart, self._apart = self._apart, None
        if apart is not None:
            apart.close()

    # ------------------------------------------------------------------ bindings

    def check_target(self, delivery: Delivery) -> None:
        """Warn of a binding that none of the consumer's topics has made.

        A topic that is taken out of them stays bound, and no client can list a queue's bindings:
        only what arrives shows that. A limited number of targets is checked, as they may contain
        user data.
        """
        spec, target = self.spec, delivery.target
        if delivery.exchange != spec.exchange:
            return  # bound to it by others, or sent to the queue itself
        self.unknown_targets -= 1
        self.known_targets.add(target)
        if not any(matches(topic, target) for topic in spec.topics):
            logger.warning(
                "queue %r is bound to %r beside its consumer's topics, perhaps by earlier ones: a "
                "message for %r has arrived; delete the binding if it is not wanted",
                spec.name,
                spec.exchange,
                target,
            )

    # ------------------------------------------------------------------ settling

    def requeue(self, delivery: Delivery) -> None:
        """Return ``delivery`` to its queue; do nothing if it is stale."""
        channel = self.channel
        if channel is None or not channel.is_open or delivery.generation != self.generation:
            return
        if self.acks.settle(delivery.tag):
            self.out -= 1
            # Not a reject, which RabbitMQ 4.3 counts against a quorum queue's delivery limit.
            channel.basic_nack(delivery.tag, requeue=True)

    def give_back(self) -> None:
        """Return all unsettled deliveries to the queue, where a nack doesn't count as a loss.

        Earlier brokers count a nack like the end of the channel, which does the same.
        """
        channel, connection = self.channel, self._connection
        if channel is None or not channel.is_open or connection is None:
            return
        if self.out and connection.version >= _NACKS_DO_NOT_COUNT:
            channel.basic_nack(0, multiple=True, requeue=True)
        self.generation = 0  # a later ack would settle a delivery twice
        self.acks = Acks()

    def cancel(self, done: Callable[[], None]) -> None:
        """Cancel the consumer and begin no other; call ``done``, perhaps more than once."""
        self._on_cancelled = done
        self._cancel()

    def _cancel(self) -> None:
        done, channel = self._on_cancelled, self.channel
        if done is None:
            return
        if channel is None or not channel.is_open or not channel.consumer_tags:
            done()
            return
        for tag in list(channel.consumer_tags):
            channel.basic_cancel(tag, callback=lambda _frame: done())


def delivery_of(
    queue: str,
    generation: int,
    method: pika.spec.Basic.Deliver,
    properties: pika.BasicProperties,
    body: bytes,
) -> Delivery:
    """Return what pika has delivered from ``queue`` on a channel of this ``generation``."""
    headers: Mapping[str, Any] | None = properties.headers
    return Delivery(
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


def _text(value: Any) -> Any:
    """Return a short string as text: pika leaves it as bytes if it isn't UTF-8."""
    return value.decode(errors="replace") if isinstance(value, bytes) else value
