"""The queue of one recurring task, and its consumer over one connection after the other.

The queue holds one message, the schedule, which says when the next tick is. Each worker that has
the task consumes from the queue; its single active consumer holds the message, and ticks. The
rules:

1.  All that belongs together is one transaction (AMQP 0-9-1, class Tx) on the channel over which
    the schedule was delivered: publish the tick's event, publish the schedule anew, ack the old
    one. So a worker that dies anywhere has done all of it or nothing, and one that has lost its
    channel, perhaps without knowing it, does nothing any more. Until the broker has committed one
    (tx.commit-ok), nothing else is sent: it ends a connection over that.
2.  A schedule that is delivered again is published anew at once, and one that is held is every ten
    minutes. Otherwise RabbitMQ 4 drops it after 20 returns, and every version closes a channel over
    a message that waits for its ack for half an hour.
3.  Who consumes sends a *hello* into the queue. A queue delivers in order: a worker that gets a
    hello back that it has sent over this channel, since it last published a schedule, and holds no
    schedule, knows that there is none, and writes the first one. Hellos are acked by the worker
    that has the schedule, so none is lost before.
4.  Of two schedules the later one counts. One whose text differs from that of the task counts from
    now: only now the last worker with the other text has left.
5.  A consumer is never cancelled; its channel is closed. The broker would choose the next one while
    the schedule was still held.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import logging
import math
import time
import uuid

import pika
import pika.channel
import pika.exceptions
import pika.spec

from outbox.event import Event
from outbox.messages import task_queues
from outbox.recurring.due import is_far_ahead, next_tick
from outbox.recurring.recurring_task import RecurringTask
from outbox.settings import Settings
from outbox.system.backoff import backoff
from outbox.transports.rabbitmq import pika_connection, topology
from outbox.transports.rabbitmq.amqp.encoder import Encoder, on_channel
from outbox.transports.rabbitmq.link import Link
from outbox.transports.rabbitmq.pika_errors import one_line
from outbox.transports.rabbitmq.recurring.schedule_messages import (
    HELLO,
    KNOWN_TASK,
    SCHEDULE,
    Hello,
    Planned,
    read_message,
    register_queue,
    tick_queue_name,
)

__all__ = ["LOOK_EVERY", "TickQueue"]

logger = logging.getLogger("outbox.ticks")

LOOK_EVERY = 1.0
"""Seconds between two looks at the clock, which may be set; timers run until what is due before."""

_RENEWED_EVERY = 600.0
"""Seconds after which a schedule that is held is published anew, and after which a worker that
holds none sends another hello."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Held:
    """The schedule that this worker holds unacked."""

    tag: int
    planned: Planned
    is_worn: bool
    """Whether it has to be published anew whether it is due or not."""
    since: float


class TickQueue:
    """The way to one task's ticks. Only for the link's thread."""

    def __init__(
        self, task: RecurringTask, settings: Settings, link: Link, encoder: Encoder
    ) -> None:
        """Start without a connection.

        Raises:
            UsageError: the name of the queue would be too long.
        """
        self.name = tick_queue_name(task.queue, task.name)
        self._task = task
        self._settings = settings
        self._link = link
        self._encoder = encoder
        self._connection: pika_connection.Connection | None = None
        self._channel: pika.channel.Channel | None = None
        self._try = 0  # numbers the tries; callbacks of earlier ones are ignored
        self._failures = 0
        self._logged = ""
        self._forget_channel()

    def opened(self, connection: pika_connection.Connection) -> None:
        """Use a new connection: declare the queues, then consume."""
        self._connection = connection
        self._begin()

    def closed(self) -> None:
        """Forget the connection."""
        self._connection = None
        self._try += 1
        self._forget_channel()

    def look(self) -> None:
        """Do what is due by now."""
        channel = self._channel
        if channel is None or not channel.is_open or self._is_committing:
            return
        if self._held is not None:
            self._plan(self._held)
        elif self._is_alone:
            self._write_first()
        elif self._is_consuming and time.monotonic() - self._hello_at >= _RENEWED_EVERY:
            self._say_hello()

    # ------------------------------------------------------------------ the way there

    def _begin(self) -> None:
        self._try += 1
        connection = self._connection
        if connection is not None and connection.is_open:
            declared = functools.partial(self._on_declared, self._try)
            topology.declare(connection, self._steps(), declared)

    def _steps(self) -> list[topology.Step]:
        mode = self._settings.declare
        if mode == "never":
            return []
        passive = mode == "passive"
        # No limit of deliveries: RabbitMQ 3.10 takes -1 for one that is over at once, and with any
        # other the schedule would be lost some day. It is published anew instead.
        arguments = {"x-queue-type": "quorum", "x-single-active-consumer": True}
        return [
            *self._steps_of_calls(),
            topology.quorum_queue(register_queue(self._task.queue), passive=passive),
            topology.durable_queue(self.name, arguments, passive=passive),
        ]

    def _steps_of_calls(self) -> list[topology.Step]:
        spec = task_queues.spec_of(self._task.queue, self._settings)
        return [] if spec is None else topology.queue(spec, self._settings.declare)

    def _on_declared(self, number: int, refused: str | None) -> None:
        if number != self._try:
            return
        if refused is not None:
            self._fail(refused)
        elif self._connection is not None and self._connection.is_open:
            opened = functools.partial(self._on_channel_open, number)
            self._connection.channel(on_open_callback=opened)

    def _on_channel_open(self, number: int, channel: pika.channel.Channel) -> None:
        if number != self._try:
            channel.close()
            return
        channel.add_on_close_callback(functools.partial(self._on_channel_closed, number))
        channel.add_on_cancel_callback(lambda _frame: self._on_cancelled(channel))
        channel.add_on_return_callback(self._on_returned)
        channel.tx_select(lambda _frame: self._consume(number, channel))

    def _consume(self, number: int, channel: pika.channel.Channel) -> None:
        if number == self._try:
            self._channel = channel
            consuming = functools.partial(self._on_consuming, number)
            channel.basic_consume(self.name, self._on_message, callback=consuming)

    def _on_consuming(self, number: int, _frame: object) -> None:
        if number == self._try:
            if self._logged:
                logger.info("the recurring task %r is run again", self._task.name)
            self._failures = 0
            self._logged = ""
            self._link.ready()
            self._is_consuming = True
            self.look()

    def _fail(self, reason: str) -> None:
        """Try again after a pause; say why once for each reason."""
        pause = backoff(self._failures)
        level = logging.DEBUG if reason == self._logged else logging.ERROR
        self._logged = reason
        self._failures += 1
        logger.log(
            level,
            "cannot run the recurring task %r from the queue %r: %s; retrying in %.1f s",
            self._task.name,
            self.name,
            reason,
            pause,
        )
        number = self._try

        def begin() -> None:
            if number == self._try:  # else a new connection has begun another try, or will
                self._begin()

        self._link.later(pause, begin)

    def _on_cancelled(self, channel: pika.channel.Channel) -> None:
        """Declare the queue again: it was deleted (basic.cancel), or a message waited too long."""
        if channel is self._channel:
            self._forget_channel()
            self._try += 1
            if channel.is_open:
                channel.close()
            self._fail("the broker cancelled the consumer")

    def _on_channel_closed(
        self, number: int, channel: pika.channel.Channel, reason: Exception
    ) -> None:
        if number == self._try and isinstance(reason, pika.exceptions.ChannelClosedByBroker):
            self._forget_channel()
            self._try += 1
            text = one_line(reason.reply_text)
            # Not while pika is still closing it.
            self._link.later(0, functools.partial(self._fail_if, self._try, text))

    def _fail_if(self, number: int, reason: str) -> None:
        if number == self._try:
            self._fail(reason)

    def _forget_channel(self) -> None:
        self._channel = None
        self._is_consuming = False
        self._held: _Held | None = None
        self._done: list[int] = []  # tags to ack with the next transaction
        self._hello = ""
        self._hello_at = -math.inf
        self._is_alone = False
        self._is_committing = False
        self._is_returned = False  # the event of the transaction that is being committed

    # ------------------------------------------------------------------ its messages

    def _on_message(
        self,
        channel: pika.channel.Channel,
        method: pika.spec.Basic.Deliver,
        _properties: pika.BasicProperties,
        body: bytes,
    ) -> None:
        if channel is not self._channel:
            return
        match read_message(body):
            case Hello(id):
                self._done.append(method.delivery_tag)
                self._is_alone |= id == self._hello and self._held is None
            case Planned() as planned:
                self._take(method.delivery_tag, planned, is_worn=bool(method.redelivered))
            case None:
                self._done.append(method.delivery_tag)
                logger.warning("deleted a message that isn't outbox's from %r", self.name)
        self.look()

    def _take(self, tag: int, planned: Planned, *, is_worn: bool) -> None:
        self._is_alone = False
        if self._held is not None:
            self._done.append(self._held.tag)
            planned = planned.merged(self._held.planned)
            is_worn = True
        self._check_clocks(planned)
        self._held = _Held(tag, planned, is_worn, time.monotonic())

    def _check_clocks(self, planned: Planned) -> None:
        schedule, now = self._task.schedule, datetime.datetime.now(datetime.UTC)
        if planned.text == schedule.text and is_far_ahead(schedule, planned.next_at, now):
            logger.warning(
                "the recurring task %r runs next at %s, and not before: the clock of this machine, "
                "or of one that has run it, was wrong; if it was the other one, use `outbox tasks "
                "forget`",
                self._task.name,
                planned.next_at.isoformat(),
            )

    def _plan(self, held: _Held) -> None:
        """Tick if that is due; else keep the schedule, or publish it anew."""
        task, planned = self._task, held.planned
        now = datetime.datetime.now(datetime.UTC)
        if planned.text != task.schedule.text:
            next_at = task.schedule.next_after(now)
            logger.info(
                "the recurring task %r has another schedule now: %s in place of %s; its next time "
                "is %s",
                task.name,
                task.schedule.text,
                one_line(planned.text[:300]),
                next_at.isoformat(),
            )
            self._replace(held, Planned(task.schedule.text, next_at, planned.last_at))
            return
        tick = next_tick(task.schedule, planned.next_at, now, catch_up=task.catch_up)
        if tick != planned.next_at:
            logger.warning(
                "the recurring task %r goes on with the time %s: no worker ran at %s",
                task.name,
                tick.isoformat(),
                planned.next_at.isoformat(),
            )
        wait = (tick - now).total_seconds()
        if wait <= 0:
            event = task.event(tick)
            self._write(event)
            self._replace(held, planned.ticked(tick, task.schedule.next_after(tick)), event)
        elif (
            held.is_worn
            or tick != planned.next_at
            or time.monotonic() - held.since >= _RENEWED_EVERY
        ):
            self._replace(held, dataclasses.replace(planned, next_at=tick))
        else:
            if self._done:
                self._commit()
            if wait <= LOOK_EVERY:
                self._link.later(wait, functools.partial(self._look_for, held))

    def _look_for(self, held: _Held) -> None:
        if self._held is held:
            self.look()

    def _write_first(self) -> None:
        next_at = self._task.schedule.next_after(datetime.datetime.now(datetime.UTC))
        known = Hello(self._task.name).body()  # who lists the recurring tasks finds it there
        self._publish(register_queue(self._task.queue), KNOWN_TASK, known)
        self._publish_schedule(Planned(self._task.schedule.text, next_at))
        self._commit()

    def _replace(self, held: _Held, planned: Planned, event: Event | None = None) -> None:
        self._publish_schedule(planned)
        self._done.append(held.tag)
        self._commit(event)

    def _publish_schedule(self, planned: Planned) -> None:
        self._publish(self.name, SCHEDULE, planned.body())
        self._held = None
        # A hello that is on its way may be in front of what was just published.
        self._hello = ""
        self._is_alone = False

    def _say_hello(self) -> None:
        self._hello = uuid.uuid4().hex
        self._hello_at = time.monotonic()
        self._publish(self.name, HELLO, Hello(self._hello).body())
        self._commit()

    def _publish(self, queue: str, kind: str, body: bytes) -> None:
        if self._channel is not None:
            properties = pika.BasicProperties(  # type: ignore[no-untyped-call]
                content_type="application/json", delivery_mode=2, type=kind
            )
            self._channel.basic_publish("", queue, body, properties)

    def _commit(self, event: Event | None = None, *, is_again: bool = False) -> None:
        """Ack what is done, and commit what was published: ``event``, if that is a tick."""
        channel = self._channel
        if channel is not None:
            for tag in self._done:
                channel.basic_ack(tag)
            self._done = []
            self._is_committing, self._is_returned = True, False
            channel.tx_commit(lambda _frame: self._on_committed(channel, event, is_again=is_again))

    # ------------------------------------------------------------------ ticks

    def _write(self, event: Event) -> None:
        if self._channel is not None:
            frames = self._encoder.encode(event)
            pika_connection.write(self._channel, on_channel(self._channel.channel_number, frames))

    def _on_returned(
        self,
        channel: pika.channel.Channel,
        _method: object,
        _properties: pika.BasicProperties,
        _body: bytes,
    ) -> None:
        """Note that the queue of a call is missing. The broker says so before it has committed."""
        if channel is self._channel:
            self._is_returned = True

    def _on_committed(
        self, channel: pika.channel.Channel, event: Event | None, *, is_again: bool
    ) -> None:
        if channel is not self._channel:
            return
        if event is not None and self._is_returned:
            self._call_again(event, is_again=is_again)
            return
        if event is not None:
            logger.debug("called the recurring task %r, event %s", self._task.name, event.id)
        self._is_committing = False
        self.look()

    def _call_again(self, event: Event, *, is_again: bool) -> None:
        """Declare the queue of the calls, which was deleted, and publish the event there.

        Its consumers declare it, too, but perhaps later.
        """
        number = self._try

        def declared(refused: str | None) -> None:
            if number != self._try:
                return
            if refused is None:
                self._write(event)
                self._commit(event, is_again=True)
                return
            logger.error(
                "the recurring task %r was not called (event %s): its queue %r is missing: %s",
                self._task.name,
                event.id,
                self._task.queue,
                refused,
            )
            self._is_committing = False
            self.look()

        if is_again or self._settings.declare != "create" or self._connection is None:
            declared("it is not declared here")
        else:
            topology.declare(self._connection, self._steps_of_calls(), declared)
