"""Runs a real worker on the messages of a live test until it has processed them all."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

from outbox import Event, Publisher
from outbox.configuration import publisher_if_any
from outbox.consumers import Consumer, Worker
from outbox.consumers.hooks import Hooks
from outbox.consumers.message.deduplication import Inbox, open_inbox
from outbox.consumers.message.message import Message
from outbox.consumers.message.services import Services
from outbox.consumers.message.steps import Steps
from outbox.consumers.outcome import Again, Dead, Outcome, Return
from outbox.consumers.worker.worker_context import MakeMessage
from outbox.messages.delivery import Delivery
from outbox.messages.headers import ORIGIN_EXCHANGE, ORIGIN_TARGET
from outbox.recurring.recurring_task import RecurringTask
from outbox.settings import Settings
from outbox.system.steady_clock import monotonic
from outbox.testing.called import Runnable
from outbox.testing.inline_worker import MemoryInbox
from outbox.testing.live_broker import LiveBroker, event_of
from outbox.testing.recorded_delivery import (
    Delivered,
    event_for,
    handlers_own,
    instances_of,
    is_bound,
    nothing_delivered,
)
from outbox.url import BrokerURL

__all__ = ["LiveDelivery"]

_STOP_TIMEOUT = 5.0


class LiveDelivery:
    """Counts the messages to process and the settled ones of each queue. Not thread-safe.

    Events published before a consumer's queue existed are put into that queue first.
    """

    def __init__(self, broker: LiveBroker) -> None:
        """Deliver the messages of ``broker``."""
        self._broker = broker
        self._queues: set[str] = set()
        self._put: Counter[str] = Counter()
        self._settled: Counter[str] = Counter()
        self._delivered: list[Delivered] = []
        self._memory = MemoryInbox()

    def deliver_all(
        self,
        consumers: Sequence[Runnable],
        *,
        raise_errors: bool,
        timeout: float,
        patience: float | None,
    ) -> list[Delivered]:
        """Deliver until no messages are left; see ``LiveEvents.deliver_all``.

        Args:
            consumers: classes or instances.
            raise_errors: whether to raise the first exception that made a dead letter.
            timeout: the seconds to wait at most.
            patience: the seconds to wait at most for the consumers' first event, without which it
                fails; None if there may be no event.
        """
        __tracebackhide__ = True
        instances = instances_of(consumers)
        publisher = _publisher()
        for consumer in instances:
            self._prepare_queue(consumer, publisher)
        if patience is not None and not any(self._settled[one.queue] for one in instances):
            self._await_first(instances, publisher, patience)
        return self._work(instances, publisher, raise_errors=raise_errors, timeout=timeout)

    def perform(
        self,
        consumer: type[Consumer] | Consumer,
        payload: Any,
        options: Mapping[str, Any],
        *,
        raise_errors: bool,
        timeout: float,
    ) -> Delivered:
        """Process one message; see ``LiveEvents.perform``."""
        __tracebackhide__ = True
        publisher = _publisher()
        [instance] = instances_of([consumer])
        event = event_for(instance, payload, options, publisher)
        self._prepare_queue(instance, publisher)
        self._put_into(instance.queue, [event])
        results = self._work([instance], publisher, raise_errors=raise_errors, timeout=timeout)
        return next(result for result in reversed(results) if result.event.id == event.id)

    def _await_first(
        self, consumers: Sequence[Consumer], publisher: Publisher, seconds: float
    ) -> None:
        __tracebackhide__ = True
        deadline = monotonic() + seconds
        while not self._unfinished(consumers, publisher):
            if monotonic() > deadline:
                raise AssertionError(nothing_delivered(consumers, publisher, self._broker))
            with self._broker.changed:
                self._broker.changed.wait(0.05)

    def _prepare_queue(self, consumer: Consumer, publisher: Publisher) -> None:
        if consumer.queue in self._queues:
            return
        spec = consumer.spec(publisher.settings.exchange)
        self._broker.read_back([spec.exchange])
        before = self._broker.present
        if not self._broker.declare(spec):
            missed = [
                event for event in before if event.exchange and is_bound(consumer, event, publisher)
            ]
            self._put_into(consumer.queue, missed, missed=True)
        self._queues.add(consumer.queue)

    def _put_into(self, queue: str, events: Iterable[Event], *, missed: bool = False) -> None:
        copies = [_copy(event, queue) for event in events]
        self._broker.put(copies)
        if not missed:  # missed events are counted where they were published
            self._put[queue] += len(copies)

    def _work(
        self,
        consumers: Sequence[Consumer],
        publisher: Publisher,
        *,
        raise_errors: bool,
        timeout: float,
    ) -> list[Delivered]:
        __tracebackhide__ = True
        begin = len(self._delivered)
        if not self._unfinished(consumers, publisher):
            return []
        deadline = monotonic() + timeout
        worker = _Worker(consumers, publisher, self._broker, self._note, self._inbox(consumers))
        worker.start()
        try:
            while unfinished := self._unfinished(consumers, publisher):
                error = _first_error(self._delivered[begin:])
                if raise_errors and error is not None:
                    raise handlers_own(error)
                if worker.wait(0) or monotonic() > deadline:
                    raise AssertionError(
                        f"messages are left after {timeout:g} s: {', '.join(unfinished)}"
                        + _last(self._delivered[begin:])
                    )
                with self._broker.changed:
                    self._broker.changed.wait(0.05)
        finally:
            worker.stop(_STOP_TIMEOUT)
        error = _first_error(self._delivered[begin:])
        if raise_errors and error is not None:
            raise handlers_own(error)
        return self._delivered[begin:]

    def _inbox(self, consumers: Sequence[Consumer]) -> Inbox | None:
        """Return the inbox that the worker can't find itself; None if it can, or needs none."""
        if os.environ.get("OUTBOX_DATABASE_URL"):
            return None
        settings = Settings(url=self._broker.url)
        if settings.url and BrokerURL.parse(settings.url).is_database:
            return open_inbox(settings, consumers)  # in the test's database, not the application's
        return self._memory

    def _unfinished(self, consumers: Sequence[Consumer], publisher: Publisher) -> list[str]:
        """Describe the queues with messages left to process."""
        # Before `present`: follow-ons are present once their message is settled, so none is missed.
        settled = Counter(self._settled)
        present = self._broker.present
        unfinished = []
        for consumer in consumers:
            queue = consumer.queue
            expected = self._put[queue] + sum(
                is_bound(consumer, event, publisher) for event in present
            )
            if settled[queue] < expected:
                unfinished.append(f"{queue!r} has settled {settled[queue]} of {expected}")
        return unfinished

    def _note(self, done: Delivered, queue: str) -> None:
        with self._broker.changed:
            self._delivered.append(done)
            if not isinstance(done.outcome, Return | Again):
                self._settled[queue] += 1
            self._broker.changed.notify_all()


class _Worker(Worker):
    """A worker that notes the outcome of each message; its single thread keeps them in order."""

    def __init__(
        self,
        consumers: Sequence[Consumer],
        publisher: Publisher,
        broker: LiveBroker,
        note: Callable[[Delivered, str], None],
        inbox: Inbox | None,
    ) -> None:
        self._broker = broker  # before: the worker asks for its message maker
        self._note = note
        super().__init__(consumers, publisher=publisher, threads=1, concurrency=1, inbox=inbox)

    def _declared_hooks(self) -> Hooks:
        return Hooks()  # a test sets in worker_state what its handlers need

    def _recurring(self) -> list[RecurringTask]:
        return []  # a test runs what it has called

    def _message_maker(self) -> MakeMessage:
        return partial(_Message, broker=self._broker, note=self._note)


class _Message(Message):
    """A message that notes its outcome."""

    def __init__(
        self,
        consumer: Consumer,
        delivery: Delivery,
        services: Services,
        broker: LiveBroker,
        note: Callable[[Delivered, str], None],
    ) -> None:
        super().__init__(consumer, delivery, services)
        self._broker = broker
        self._note = note

    def settle(self, outcome: Outcome) -> Steps[Outcome | None]:
        follow_ons = self._broker.take_published_here()
        settled = yield from super().settle(outcome)
        self._broker.take_published_here()  # a dead letter isn't a follow-on event
        done = Delivered(event_of(self.delivery), self.consumer, outcome, follow_ons)
        self._note(done, self.delivery.queue)
        return settled


def _publisher() -> Publisher:
    return publisher_if_any() or Publisher("memory://")


def _first_error(delivered: Sequence[Delivered]) -> BaseException | None:
    outcomes = [result.outcome for result in delivered]
    errors = [outcome.error for outcome in outcomes if isinstance(outcome, Dead)]
    return next((error for error in errors if error is not None), None)


def _last(delivered: Sequence[Delivered]) -> str:
    if not delivered:
        return ""
    last = delivered[-1]
    if isinstance(last.outcome, Again):
        error, delay = last.outcome.error, last.outcome.delay
        return f"; {last.event!r} failed with {error!r} and is retried {delay:g} s later"
    targets = [event.target for event in last.follow_ons]
    return f"; the last one processed was {last.event!r}, with follow-on events to {targets}"


def _copy(event: Event, queue: str) -> Event:
    """Return a copy of ``event`` that goes straight to ``queue``."""
    return Event(
        id=event.id,
        target=queue,
        exchange="",
        body=event.body,
        content_type=event.content_type,
        headers={
            **event.headers,
            ORIGIN_EXCHANGE: event.exchange,
            ORIGIN_TARGET: event.target,
        },
        priority=event.priority,
        key=event.key,
        occurred_at=event.occurred_at,
        unroutable="fail",
    )
