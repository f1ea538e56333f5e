"""The messages that an engine has begun, including those that no thread or task works on.

An ``Unconfirmed`` message waits here while its thread or task goes on with another message, and so
does one that pauses: see ``pen``.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import math
import queue
import threading
import time
from collections import OrderedDict, deque
from contextvars import Context
from functools import partial
from typing import Protocol, TypeAlias

from outbox import PublishReport
from outbox.backlog.chunk import Chunk
from outbox.consumers.current import set_current_message
from outbox.consumers.message.message import Message
from outbox.consumers.message.republishing import FIRST_PAUSE, LONGEST_PAUSE
from outbox.consumers.message.services import Services
from outbox.consumers.message.steps import Abandoned, Confirm, Parked, Pause, Step, call
from outbox.consumers.worker.life import Life
from outbox.consumers.worker.pen import Pen
from outbox.consumers.worker.worker_context import Quota, WorkerContext
from outbox.messages.delivery import Delivery

__all__ = ["InFlight", "Line"]

logger = logging.getLogger("outbox.consumer")

_LONGEST_WAIT = 300.0
"""Seconds between two looks at what waits to begin. What two looks have seen is given back: after
30 minutes RabbitMQ would take it back, and with it all that has the same channel."""
_REMEMBERED = 600.0  # seconds, for a message that is done, but whose delivery was stale by then
_MOST_REMEMBERED = 10_000
_LATEST = 100
"""Messages whose ack may still be on its way, and be lost with the channel."""
_FAULTS = 10
"""Times that outbox itself may fail to handle a message, before it becomes a dead letter."""
_ENDING = 2.0  # seconds for the thread to end


_Key: TypeAlias = tuple[str, str | None, str, int | None, int, int]


class Line(Protocol):
    """The line of an engine's deliveries that have not begun."""

    def put(self, delivery: Delivery) -> None:
        """Add a delivery at its end."""
        ...

    def put_ahead(self, delivery: Delivery) -> None:
        """Add a delivery ahead of others."""
        ...

    def waiting(self) -> list[Delivery]:
        """Return the deliveries in it."""
        ...


class InFlight:
    """The lives of an engine, including those that wait. Thread-safe.

    Those whose events are all confirmed end on this object's thread, where only an ack is left to
    do. The others may call the application: their deliveries are put into the engine once more.
    There are at most as many waiting lives as the broker sends messages ahead.

    A message may be redelivered while it is still being processed, because the broker has taken it
    back: it has waited too long for the ack, or the channel was lost. Such a delivery waits until
    the other one has ended. If that was a success, which could no longer be acked, only the ack is
    left to do.

    Attributes:
        any_begun: whether a message was started.
    """

    def __init__(self, work: WorkerContext, services: Services, line: Line, places: int) -> None:
        """Create the collection, without any life yet.

        Args:
            work: the context of the engine.
            services: the services of the engine.
            line: the line of the engine.
            places: the number of its threads or tasks.
        """
        self.any_begun = False
        self._work = work
        self._services = services
        self._line = line
        self._timeout = work.publisher.settings.timeout
        self._unconfirmed: dict[Life, tuple[float, Chunk]] = {}  # with the deadline, in its order
        self._unwritten: set[Life] = set()
        self._stopping = False
        self._all_confirmed = threading.Event()
        self._reported: queue.SimpleQueue[tuple[Life, PublishReport] | _Order] = queue.SimpleQueue()
        self._put_again: dict[Delivery, Life] = {}
        self._thread = threading.Thread(
            target=self._run, name="outbox-worker-confirms", daemon=True
        )
        self._pen = Pen(self._resume, work.resting, places=places)
        self._lock = threading.Lock()
        self._begun: set[Message] = set()
        self._waiting_for: dict[Message, list[Delivery]] = {}
        self._acked: deque[Delivery] = deque(maxlen=_LATEST)
        self._done: OrderedDict[_Key, float] = OrderedDict()
        self._given_back: set[Delivery] = set()
        self._seen_waiting: set[Delivery] = set()
        self._aside: deque[Delivery] = deque()
        self._faults: OrderedDict[_Key, int] = OrderedDict()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def of(self, delivery: Delivery, context: Context) -> Life | None:
        """Return the life to start or to go on with.

        None if there is nothing to do now: the message waits for another, or has been requeued, or
        will be when the subscription closes.

        Args:
            delivery: the delivery of the message.
            context: the context that a new life, and each of its attempts, gets a copy of.
        """
        life = self._put_again.pop(delivery, None)
        if life is not None:
            if not life.keeps_context:
                life.context = context.copy()
                if life.message.event is not None:
                    life.context.run(set_current_message, life.message.event)
            return life
        work, pen = self._work, self._pen
        if (
            work.subscription.is_stale(delivery)
            or (self._given_back and self._withdraw(delivery))
            or (delivery.redelivered and self._has_predecessor(delivery))
            or (pen.closed and pen.holds_back(delivery))
            or (work.quota is not None and self._is_beyond(work.quota, delivery))
        ):
            if pen.closed:
                pen.began(delivery, None)
            return None
        self.any_begun = True
        message = work.make_message(work.consumers[delivery.queue], delivery, self._services)
        self._begun.add(message)
        if pen.closed:
            pen.began(delivery, message)
        return Life(message, message.live(), context.copy())

    def set_aside(self, delivery: Delivery) -> None:
        """Keep a delivery that was taken from the line while the engine begins no more messages."""
        if delivery not in self._put_again:
            self._aside.append(delivery)

    def leave(self, life: Life, chunk: Chunk) -> None:
        """Hold ``life`` until ``chunk`` is reported, or its timeout is over.

        Call it outside the life's context, which another thread may enter at once.
        """
        if self._pen.closed:
            self._pen.passed(life.message)
        self._unconfirmed[life] = (time.monotonic() + self._timeout, chunk)
        chunk.on_reported(partial(self._on_reported, life))

    def park(self, life: Life, pause: Pause) -> None:
        """Hold ``life`` until ``pause`` is over, then put it into the engine again.

        Call it outside the life's context, which another thread may enter at once.
        """
        life.keeps_context = pause.is_in_attempt
        self._pen.park(life, pause)
        self._reported.put(_Order.LOOK)

    def wait_for(self, life: Life, parked: Parked) -> None:
        """Hold ``life`` until a row of its task is written, then go on with it.

        Call it outside the life's context, which another thread may enter at once.
        """
        life.keeps_context = True
        if self._pen.closed:
            self._pen.passed(life.message)
        if parked.is_last:
            self._unwritten.add(life)
            parked.write.when_over(partial(self._written, life))
        else:
            parked.write.when_over(partial(self._resume, life))

    def ends(self, message: Message) -> None:
        """Note that a message has ended; with the last one that is allowed, stop the worker."""
        if message.is_acked:
            delivery = message.delivery
            self._acked.append(delivery)
            if self._work.subscription.is_stale(delivery):
                self._remember(delivery)
        self._begun.discard(message)
        if self._waiting_for:
            self._release(message)
        if self._pen.closed:
            self._pen.passed(message)
        quota = self._work.quota
        if quota is not None and quota.end():
            self._work.on_used_up()

    def failed(self, life: Life) -> None:
        """Requeue or dead-letter a message after an error in outbox itself, and end it.

        Call it where the error is handled, which is logged.
        """
        message = life.message
        delivery = message.delivery
        key = _key(delivery)
        with self._lock:
            faults = self._faults[key] = self._faults.pop(key, 0) + 1
            if len(self._faults) > _MOST_REMEMBERED:
                self._faults.popitem(last=False)
        logger.exception("could not handle message %r of %r", delivery.message_id, delivery.queue)
        if faults == _FAULTS:
            life.steps = message.bury(f"outbox failed to handle it {faults} times; see the log")
            self._resume(life)
        else:
            pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(faults - 1, 10))
            self._work.subscription.requeue(delivery, pause)
            self.ends(message)

    def running(self) -> list[Delivery]:
        """Return the deliveries of the messages that have begun and not ended."""
        return [message.delivery for message in list(self._begun)]

    def give_back(self) -> None:
        """Requeue what waits to begin, after the engine was asked to stop.

        May be called again, for what arrives late.
        """
        for delivery in {*self._line.waiting(), *self._pen.waiting()} - self._given_back:
            self._return(delivery)
        while self._aside:
            self._work.subscription.requeue(self._aside.popleft(), 0.0)

    def stop(self, deadline: float) -> bool:
        """Wait for the unconfirmed lives, until ``deadline``; return whether all are reported.

        The messages of the others are redelivered, and so are those that wait, for whatever reason:
        they are left.
        """
        self._stopping = True
        remaining = max(0.0, deadline - time.monotonic())
        finished = self._is_quiet() or self._all_confirmed.wait(remaining)
        self._unwritten.clear()
        self._reported.put(_Order.END)
        if self._thread.is_alive():
            self._thread.join(_ENDING)  # else it could resume what is left here
        self._unconfirmed.clear()
        for life in (*self._pen.empty(), *self._put_again.values()):
            self._abandon(life)
        return finished

    def _withdraw(self, delivery: Delivery) -> bool:
        """Remove ``delivery`` from what is given back; return whether this call has done so."""
        try:
            self._given_back.remove(delivery)
        except KeyError:
            return False
        return True

    def _has_predecessor(self, delivery: Delivery) -> bool:
        """Return whether an earlier delivery of its message is processed, or was a success."""
        return self._is_done(delivery) or self._waits_for_other(delivery)

    def _is_done(self, delivery: Delivery) -> bool:
        """Ack ``delivery`` if its message is known to be done; return whether it is."""
        key = _key(delivery)
        with self._lock:
            at = self._done.pop(key, None)
            acked = [
                first
                for first in list(self._acked)
                if first.message_id == delivery.message_id
                and first.generation != delivery.generation
                and _key(first) == key
            ]
            for first in acked:
                with contextlib.suppress(ValueError):  # others have pushed it out meanwhile
                    self._acked.remove(first)
        if not acked and (at is None or time.monotonic() - at > _REMEMBERED):
            return False
        logger.info(
            "message %r of %r is done, but was redelivered, since its ack was lost; acked again",
            delivery.message_id,
            delivery.queue,
        )
        self._work.subscription.ack(delivery)
        return True

    def _waits_for_other(self, delivery: Delivery) -> bool:
        """Keep ``delivery`` while an earlier delivery of its message is processed."""
        key = _key(delivery)
        for message in list(self._begun):
            first = message.delivery
            if first.message_id == delivery.message_id and _key(first) == key:
                with self._lock:
                    self._waiting_for.setdefault(message, []).append(delivery)
                if self._work.subscription.is_stale(first):
                    self._pen.wake(message)
                if message not in self._begun:  # it has ended meanwhile
                    self._release(message)
                return True
        return False

    def _remember(self, delivery: Delivery) -> None:
        with self._lock:
            self._done[_key(delivery)] = time.monotonic()
            if len(self._done) > _MOST_REMEMBERED:
                self._done.popitem(last=False)

    def _release(self, message: Message) -> None:
        """Go on with the deliveries that have waited for the end of ``message``."""
        with self._lock:
            deliveries = self._waiting_for.pop(message, ())
        for delivery in deliveries:
            if not self._work.subscription.is_stale(delivery):
                self._line.put_ahead(delivery)

    def _resume(self, waiting: Life | Delivery) -> None:
        if isinstance(waiting, Life):
            self._put_again[waiting.message.delivery] = waiting
            self._line.put_ahead(waiting.message.delivery)
        else:
            self._line.put_ahead(waiting)

    def _abandon(self, life: Life) -> None:
        """Let a message notice that the worker stops, and end it."""
        life.message.tally = None  # that of another thread
        try:
            life.context.run(call, life.steps, self._take_at_stop)
        except Abandoned:
            pass
        except BaseException:
            logger.exception("could not leave message %r", life.message.delivery.message_id)
        life.context.run(life.steps.close)

    def _take_at_stop(self, step: Step) -> object:
        if isinstance(step, Confirm):
            return self._work.publisher.wait_for(step.chunk)
        raise Abandoned

    def _on_reported(self, life: Life, report: PublishReport) -> None:
        self._reported.put((life, report))

    def _run(self) -> None:
        longest = max(0.01, self._timeout / 4)
        now = time.monotonic()
        look_at, pen_at, old_at = now + longest, math.inf, now + _LONGEST_WAIT
        while True:
            with contextlib.suppress(queue.Empty):
                pause = min(look_at, pen_at) - time.monotonic()
                reported = self._reported.get(timeout=max(0.0, pause))
                if reported is _Order.END:
                    return
                if reported is _Order.LOOK:
                    pen_at = 0.0
                else:
                    self._go_on(*reported)
            now = time.monotonic()
            if now >= look_at:
                self._report_late()
                look_at = now + longest
            if now >= pen_at:
                pen_at = now + self._pen.look()
            if now >= old_at:
                self._give_old_back()
                old_at = now + _LONGEST_WAIT

    def _report_late(self) -> None:
        """Report the chunks whose timeout is over, as a waiting caller would have done."""
        now = time.monotonic()
        for deadline, chunk in list(self._unconfirmed.values()):
            if deadline > now:
                break
            self._work.publisher.wait_for(chunk, 0)

    def _go_on(self, life: Life, report: PublishReport) -> None:
        life.steps = life.message.confirmed(report)
        if report.ok:
            self._end(life)
            self._unconfirmed.pop(life, None)
        else:
            delivery = life.message.delivery
            self._put_again[delivery] = life
            self._unconfirmed.pop(life, None)  # before: the engine may leave it here again
            self._line.put_ahead(delivery)
        if self._stopping and self._is_quiet():
            self._all_confirmed.set()

    def _is_quiet(self) -> bool:
        """Return whether no message waits for its last confirm, or for its result to be written."""
        return not (self._unconfirmed or self._unwritten)

    def _written(self, life: Life) -> None:
        """End a message whose result has been written, on the thread that has done so."""
        if life in self._unwritten:
            self._end(life)
            self._unwritten.discard(life)
            if self._stopping and self._is_quiet():
                self._all_confirmed.set()

    def _end(self, life: Life) -> None:
        life.message.tally = None  # that of another thread
        try:
            ended = life.context.run(call, life.steps, _refuse)
        except BaseException:  # a bug in outbox must end neither the thread nor the message
            self.failed(life)
            return
        if isinstance(ended, Parked):
            self.wait_for(life, ended)
        else:
            self.ends(life.message)

    def _give_old_back(self) -> None:
        """Give back what has waited to begin since the last call."""
        if not self._work.subscription.limits_processing:
            return
        waiting = {*self._line.waiting(), *self._pen.waiting()}
        returned = sum(map(self._return, waiting & self._seen_waiting))
        self._seen_waiting = waiting
        if returned:
            logger.info(
                "requeued %d message(s), which have waited here for more than %.0f s to begin",
                returned,
                _LONGEST_WAIT,
            )

    def _return(self, delivery: Delivery) -> bool:
        """Requeue a delivery that waits to begin; return False if a thread has just taken it."""
        if not self._pen.give_up(delivery):
            self._given_back.add(delivery)
            if delivery not in self._line.waiting() and self._withdraw(delivery):
                return False
        self._work.subscription.requeue(delivery, 0.0)
        return True

    def _is_beyond(self, quota: Quota, delivery: Delivery) -> bool:
        if quota.begin():
            return False
        self.set_aside(delivery)
        return True


class _Order(enum.Enum):
    LOOK = enum.auto()
    END = enum.auto()


def _key(delivery: Delivery) -> _Key:
    """Return what identifies an attempt at a message, also to senders that repeat ids."""
    return (
        delivery.queue,
        delivery.message_id,
        delivery.target,
        delivery.timestamp,
        delivery.attempt,
        hash(delivery.body),
    )


def _refuse(step: Step) -> None:
    raise RuntimeError(f"a confirmed message must not ask for another step, but did: {step!r}")
