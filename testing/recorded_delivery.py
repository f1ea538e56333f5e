"""Runs real consumers on recorded events, processing each message as a worker does."""

from __future__ import annotations

import asyncio
import contextvars
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

from outbox import Event, Publisher
from outbox.consumers import Consumer
from outbox.consumers.event_loop import lasting_loop
from outbox.consumers.message.inline_engine import InlineEngine
from outbox.consumers.message.message import Message
from outbox.consumers.outcome import Ack, Again, Dead, Hold, Outcome, Return
from outbox.consumers.worker.assignment import Assignment
from outbox.event import make_event
from outbox.messages.dead_letters import restore_origin
from outbox.messages.delivery import Delivery, as_delivered, dead_letter_queue
from outbox.messages.topics import matches
from outbox.testing.assertions import States
from outbox.testing.called import Runnable, with_tasks
from outbox.testing.inline_worker import (
    InlineMessage,
    InlineWorker,
    MemoryInbox,
    check_loop,
    process,
    process_async,
)
from outbox.testing.recorder import Recorder

__all__ = [
    "Delivered",
    "RecordedDelivery",
    "event_for",
    "handlers_own",
    "instances_of",
    "is_bound",
    "nothing_delivered",
    "processed",
]

_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class Delivered:
    """The result of processing one message.

    Attributes:
        event: the event, as it was published.
        consumer: the consumer that processed it.
        outcome: ``Ack``, ``Again``, ``Dead`` with its reason, ``Return`` or ``Hold``.
        follow_ons: the events that it published, in order.
    """

    event: Event
    consumer: Consumer
    outcome: Outcome
    follow_ons: tuple[Event, ...]

    @property
    def acked(self) -> bool:
        """Whether it was processed successfully."""
        return isinstance(self.outcome, Ack)

    @property
    def duplicate(self) -> bool:
        """Whether it was skipped, since its consumer has processed it before."""
        return isinstance(self.outcome, Ack) and self.outcome.duplicate

    @property
    def retried(self) -> bool:
        """Whether the attempt failed, and a copy of the message was published for the next one."""
        return isinstance(self.outcome, Again)

    @property
    def dead(self) -> bool:
        """Whether it was dead-lettered."""
        return isinstance(self.outcome, Dead)


class RecordedDelivery:
    """Delivers recorded events, each to a consumer's queue once. Not thread-safe."""

    def __init__(self, recorder: Recorder, publisher: Callable[[], Publisher]) -> None:
        """Deliver what ``recorder`` has recorded; follow-on events go to ``publisher()``."""
        self._recorder = recorder
        self._publisher = publisher
        self._inbox = MemoryInbox()
        self._taken: set[tuple[int, str]] = set()
        self._times: Counter[tuple[int, str]] = Counter()
        self._reached: set[str] = set()

    def deliver(
        self,
        consumers: Sequence[Runnable],
        *,
        until_quiet: bool,
        raise_errors: bool,
        allow_none: bool,
    ) -> list[Delivered]:
        """Deliver the events published so far; see ``CollectedEvents.deliver``.

        Args:
            consumers: classes or instances.
            until_quiet: whether to deliver follow-on events and retries, too, until none are left.
            raise_errors: whether to raise the handlers' exceptions; those that the next attempt may
                make good only if this call won't run it.
            allow_none: whether there may be nothing to deliver.
        """
        __tracebackhide__ = True
        instances = instances_of(consumers, self._recorder.sent)
        check_loop(instances)
        results: list[Delivered] = []
        for message in self._messages(instances, results, until_quiet, allow_none):
            done = self._process(message, _raised(raise_errors, until_quiet))
            results.append(done)  # the iterator reads them meanwhile
        return results

    async def deliver_async(
        self,
        consumers: Sequence[Runnable],
        *,
        until_quiet: bool,
        raise_errors: bool,
        allow_none: bool,
    ) -> list[Delivered]:
        """Do the same as :meth:`deliver`, in the running event loop."""
        __tracebackhide__ = True
        results: list[Delivered] = []
        instances = instances_of(consumers, self._recorder.sent)
        for message in self._messages(instances, results, until_quiet, allow_none):
            done = await self._process_async(message, _raised(raise_errors, until_quiet))
            results.append(done)
        return results

    def perform(
        self,
        consumer: type[Consumer] | Consumer,
        payload: Any,
        options: Mapping[str, Any],
        *,
        raise_errors: bool,
    ) -> Delivered:
        """Process one message; see ``CollectedEvents.perform``."""
        __tracebackhide__ = True
        message = self._message_for(consumer, payload, options)
        check_loop([message.consumer])
        return self._process(message, _raised(raise_errors, False))

    async def perform_async(
        self,
        consumer: type[Consumer] | Consumer,
        payload: Any,
        options: Mapping[str, Any],
        *,
        raise_errors: bool,
    ) -> Delivered:
        """Do the same as :meth:`perform`, in the running event loop."""
        __tracebackhide__ = True
        message = self._message_for(consumer, payload, options)
        return await self._process_async(message, _raised(raise_errors, False))

    def _messages(
        self,
        consumers: Sequence[Consumer],
        results: Sequence[Delivered],
        until_quiet: bool,
        allow_none: bool,
    ) -> Iterator[InlineMessage]:
        """Yield the messages to process; ``results`` are those of the ones before."""
        __tracebackhide__ = True
        publisher = self._publisher()
        left: set[tuple[int, str]] = set()  # they would have to wait: until the next call
        for _ in range(_ROUNDS):
            before = len(results)
            for event in self._recorder.sent:
                for consumer in consumers:
                    place = (id(event), consumer.queue)
                    if place in self._taken | left or not is_bound(consumer, event, publisher):
                        continue
                    message = self._message(consumer, event, publisher)
                    yield message
                    if not message.is_settled:
                        left.add(place)
            if len(results) == before or not until_quiet:
                break
        else:
            raise AssertionError(
                f"events still follow from events after {_ROUNDS} rounds; the last was "
                f"{results[-1].event!r}, with follow-on events to "
                f"{[event.target for event in results[-1].follow_ons]}"
            )
        if not (results or allow_none or any(one.queue in self._reached for one in consumers)):
            raise AssertionError(nothing_delivered(consumers, publisher, self._recorder))

    def _message_for(
        self, consumer: type[Consumer] | Consumer, payload: Any, options: Mapping[str, Any]
    ) -> InlineMessage:
        publisher = self._publisher()
        [instance] = instances_of([consumer])
        event = event_for(instance, payload, options, publisher)
        return self._message(instance, event, publisher)

    def _message(self, consumer: Consumer, event: Event, publisher: Publisher) -> InlineMessage:
        place = (id(event), consumer.queue)
        self._taken.add(place)
        self._times[place] += 1
        self._reached.add(consumer.queue)
        delivery = as_delivered(event, consumer.queue, 1, redelivered=self._times[place] > 1)
        restore_origin(delivery)
        worker = InlineWorker(publisher, self._inbox, self._recorder.results)
        return InlineMessage(consumer, delivery, worker, event, self._recorder)

    def _process(self, message: InlineMessage, raised: tuple[type, ...]) -> Delivered:
        __tracebackhide__ = True
        try:
            check_loop([message.consumer])  # in a queue of tasks, each message has another
            process(message)
        finally:
            self._note(message)
        return _result(message, raised)

    async def _process_async(self, message: InlineMessage, raised: tuple[type, ...]) -> Delivered:
        __tracebackhide__ = True
        try:
            await process_async(message)
        finally:
            self._note(message)
        return _result(message, raised)

    def _note(self, message: InlineMessage) -> None:
        if not message.is_settled or isinstance(message.outcome, Return):
            self._taken.discard((id(message.sent), message.consumer.queue))


def _raised(raise_errors: bool, until_quiet: bool) -> tuple[type, ...]:
    """Return the kinds of outcomes whose errors are raised in the test."""
    if not raise_errors:
        return ()
    return (Dead, Hold) if until_quiet else (Dead, Hold, Again)


def _result(message: InlineMessage, raised: tuple[type, ...]) -> Delivered:
    __tracebackhide__ = True
    outcome = message.outcome
    if outcome is None:
        raise AssertionError(f"{message.sent!r} was processed, but has no outcome")
    if isinstance(outcome, raised) and isinstance(outcome, Again | Dead | Hold) and outcome.error:
        raise handlers_own(outcome.error)
    return Delivered(message.sent, message.consumer, outcome, message.follow_ons)


def handlers_own(error: BaseException) -> BaseException:
    """Return ``error`` with its traceback beginning in the handler, without the engine's frames."""
    traceback: TracebackType | None = error.__traceback__
    while traceback is not None and _is_engines(traceback):
        traceback = traceback.tb_next
    return error.with_traceback(traceback)


def _is_engines(traceback: TracebackType) -> bool:
    name = traceback.tb_frame.f_globals.get("__name__", "")
    return str(name).partition(".")[0] in ("outbox", "asyncio", "contextlib")


def nothing_delivered(consumers: Sequence[Consumer], publisher: Publisher, states: States) -> str:
    """Return the message that says that no event was bound to the queues of ``consumers``."""
    lines = []
    for consumer in consumers:
        spec = consumer.spec(publisher.settings.exchange)
        topics = [spec.name, *spec.topics]
        lines.append(f"  {spec.name!r} takes {topics} from the exchange {spec.exchange!r}")
    published, stored = map(_addressed, (states.published, states.stored))
    advice = next(filter(None, map(states.advice, states.stored)), "")
    return "\n".join(
        (
            "nothing was delivered: no event has reached the consumers' queues; "
            "if that is right, pass allow_none=True",
            *lines,
            "published:" if published else "no event was published",
            *published[:10],
            *(("stored, not published:", *stored[:10]) if stored else ()),
            *((advice,) if advice else ()),
        )
    )


def _addressed(events: Sequence[Event]) -> list[str]:
    return [
        f"  {event.target!r} to the exchange {event.exchange!r}"
        + (f", due at {event.deliver_at:%Y-%m-%d %H:%M:%S %Z}" if event.deliver_at else "")
        for event in events
    ]


def instances_of(consumers: Sequence[Runnable], events: Sequence[Event] = ()) -> list[Consumer]:
    """Return ``consumers`` with each class replaced by an instance, as a worker checks them.

    Tasks and modules are replaced by the consumers of their queues; without any, those of all tasks
    that ``events`` call.

    Raises:
        UsageError: a worker would refuse them.
    """
    assignment = Assignment(
        with_tasks(consumers, events),
        threads=1,
        concurrency=1,
        prefetch=None,
        max_messages=None,
        ranks=None,
    )
    return list(assignment.consumers.values())


def event_for(
    consumer: Consumer, payload: Any, options: Mapping[str, Any], publisher: Publisher
) -> Event:
    """Return an event to the queue of ``consumer``, unless ``options`` say otherwise."""
    settings = publisher.settings
    named = {"target": consumer.queue, "exchange": settings.exchange, **options}
    return make_event(settings.serializer, settings.max_body_bytes, None, payload, **named)


def processed(consumer: Consumer, delivery: Delivery, publisher: Publisher) -> Outcome:
    """Process a message in a new context without settling it, and return its outcome."""
    engine = InlineEngine(publisher)
    message = Message(consumer, delivery, engine)
    context = contextvars.Context()
    if not consumer.is_async:
        return context.run(engine.conclude, message)
    conclusion = engine.conclude_async(message)
    return lasting_loop.run(conclusion, loop_factory=asyncio.new_event_loop, context=context)


def is_bound(consumer: Consumer, event: Event, publisher: Publisher) -> bool:
    """Return whether the broker would route ``event`` to the consumer's queue."""
    if event.target == dead_letter_queue(consumer.queue):
        return False
    if not event.exchange:
        return event.target == consumer.queue
    spec = consumer.spec(publisher.settings.exchange)
    return event.exchange == spec.exchange and any(
        matches(pattern, event.target) for pattern in (spec.name, *spec.topics)
    )
