"""Runs real consumers on recorded events, processing each message as a worker does."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from outbox import Event, Publisher
from outbox.consumers import Consumer
from outbox.consumers.message.copies import dead_letter, retry_copy
from outbox.consumers.message.inline_engine import InlineEngine
from outbox.consumers.message.message import Message
from outbox.consumers.outcome import Ack, Again, Dead, Hold, Outcome, Return
from outbox.event import make_event
from outbox.messages.dead_letters import restore_origin
from outbox.messages.delivery import Delivery, as_delivered, dead_letter_queue
from outbox.messages.topics import matches

__all__ = ["Delivered", "RecordedDelivery", "event_for", "instances_of", "is_bound", "processed"]

_ROUNDS = 100


@dataclass(frozen=True, slots=True)
class Delivered:
    """The result of processing one message.

    Attributes:
        event: the event, as it was published.
        consumer: the consumer that processed it.
        outcome: ``Ack``, ``Dead`` with its reason, ``Return`` or ``Hold``.
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
    def dead(self) -> bool:
        """Whether it was dead-lettered."""
        return isinstance(self.outcome, Dead)


class RecordedDelivery:
    """Delivers recorded events, each to a consumer's queue once. Not thread-safe."""

    def __init__(
        self, published: Callable[[], tuple[Event, ...]], publisher: Callable[[], Publisher]
    ) -> None:
        """Deliver the events that ``published()`` returns; follow-ons go to ``publisher()``."""
        self._published = published
        self._publisher = publisher
        self._done: set[tuple[int, str]] = set()
        self._tag = 0

    def deliver(
        self, consumers: Sequence[type[Consumer] | Consumer], *, raise_errors: bool
    ) -> list[Delivered]:
        """Deliver the events published so far; see ``CollectedEvents.deliver``."""
        __tracebackhide__ = True
        instances = instances_of(consumers)
        publisher = self._publisher()
        results = []
        for event in self._published():
            for consumer in instances:
                place = (id(event), consumer.queue)
                if place not in self._done and is_bound(consumer, event, publisher):
                    self._done.add(place)
                    results.append(
                        self._process(consumer, event, publisher, raise_errors=raise_errors)
                    )
        return results

    def deliver_all(
        self, consumers: Sequence[type[Consumer] | Consumer], *, raise_errors: bool
    ) -> list[Delivered]:
        """Deliver until no messages are left; see ``CollectedEvents.deliver_all``."""
        __tracebackhide__ = True
        results: list[Delivered] = []
        for _ in range(_ROUNDS):
            more = self.deliver(consumers, raise_errors=raise_errors)
            if not more:
                return results
            results += more
        raise AssertionError(
            f"events still follow from events after {_ROUNDS} rounds; the last was "
            f"{results[-1].event!r}, with follow-on events to "
            f"{[event.target for event in results[-1].follow_ons]}"
        )

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
        publisher = self._publisher()
        [instance] = instances_of([consumer])
        event = event_for(instance, payload, options, publisher)
        return self._process(instance, event, publisher, raise_errors=raise_errors)

    def _process(
        self, consumer: Consumer, event: Event, publisher: Publisher, *, raise_errors: bool
    ) -> Delivered:
        __tracebackhide__ = True
        self._tag += 1
        before = len(self._published())
        delivery = as_delivered(event, consumer.queue, self._tag)
        restore_origin(delivery)
        outcome = processed(consumer, delivery, publisher)
        follow_ons = self._published()[before:]
        error: BaseException | None = None
        match outcome:
            case Dead():
                publisher.submit([dead_letter(delivery, outcome)])
                error = outcome.error
            case Again():
                again = retry_copy(delivery, outcome)
                publisher.submit([] if again is None else [again])
                error = outcome.error
            case Hold():
                error = outcome.error
            case Return():
                self._done.discard((id(event), consumer.queue))
        if raise_errors and error is not None:
            raise error
        return Delivered(event, consumer, outcome, follow_ons)


def instances_of(consumers: Sequence[type[Consumer] | Consumer]) -> list[Consumer]:
    """Return ``consumers`` with each class replaced by an instance."""
    return [consumer() if isinstance(consumer, type) else consumer for consumer in consumers]


def event_for(
    consumer: Consumer, payload: Any, options: Mapping[str, Any], publisher: Publisher
) -> Event:
    """Return an event to the queue of ``consumer``, unless ``options`` say otherwise."""
    settings = publisher.settings
    named = {"target": consumer.queue, "exchange": settings.exchange, **options}
    return make_event(settings.serializer, settings.max_body_bytes, None, payload, **named)


def processed(consumer: Consumer, delivery: Delivery, publisher: Publisher) -> Outcome:
    """Process a message in a new context, and return its outcome.

    The handler runs as in a worker: a function without an event loop, a coroutine as a task.
    """
    engine = InlineEngine(publisher)
    message = Message(consumer, delivery, engine)

    def process() -> Outcome:
        if consumer.is_async:
            return asyncio.run(engine.conclude_async(message))
        return engine.conclude(message)

    context = contextvars.Context()
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return context.run(process)
    with ThreadPoolExecutor(1) as executor:  # the test itself is a coroutine
        return executor.submit(context.run, process).result()


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
