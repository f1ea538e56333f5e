"""The events of a recorded test; the test decides what happens to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from outbox import BrokerError, Event, Publisher
from outbox.configuration import publisher_if_any
from outbox.consumers import Consumer
from outbox.testing.assertions import EventAssertions
from outbox.testing.recorded_delivery import Delivered, RecordedDelivery
from outbox.testing.recorder import Recorder

__all__ = ["CollectedEvents"]


class CollectedEvents(EventAssertions):
    """Everything the code under test enqueued, and what became of it.

    For one test it replaces every publisher: nothing reaches a broker. Payloads have been through
    the real serializer. Thread-safe.

    Attributes:
        strict: whether the test fails in the end if an event was published that no assertion has
            matched.
    """

    def __init__(self, recorder: Recorder, *, strict: bool = False) -> None:
        """Answer from what ``recorder`` has recorded; the fixture does this."""
        super().__init__(recorder, strict=strict)
        self._recorder = recorder
        self._delivery = RecordedDelivery(lambda: recorder.published, self._publisher)

    # --------------------------------------------------------------- transactions pretended

    def commit(self) -> tuple[Event, ...]:
        """Publish everything that is pending or stored, as if its unit of work had succeeded.

        For code whose transaction a test never commits.

        Returns:
            The events that this published.
        """
        events = (*self.pending, *self.stored)
        self._recorder.pretend(events, success=True)
        return events

    def rollback(self) -> tuple[Event, ...]:
        """Drop everything that is pending or stored, as if its unit of work had failed.

        Returns:
            The events that this dropped.
        """
        events = (*self.pending, *self.stored)
        self._recorder.pretend(events, success=False)
        return events

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """Drop what was enqueued in the block and is pending or stored, if the block raises."""
        before = {id(event) for event in (*self.pending, *self.stored)}
        try:
            yield
        except BaseException:
            events = (*self.pending, *self.stored)
            dropped = [event for event in events if id(event) not in before]
            self._recorder.pretend(dropped, success=False)
            raise

    # ------------------------------------------------------------------------- failures

    def fail_publish(
        self, after: int = 0, error: BrokerError | None = None
    ) -> AbstractContextManager[None]:
        """Return a block in which only ``after`` events are confirmed; the rest is kept.

        When the block ends, the broker is back, and what was kept is published. In a consumer,
        where nothing is kept, ``publish()`` raises.

        Args:
            after: how many events the broker still confirms.
            error: what the reports say; by default that the connection was lost.
        """
        return self._recorder.failing(after, error)

    def broker_down(self) -> AbstractContextManager[None]:
        """Return a block in which the broker is away: everything is kept until its end."""
        return self._recorder.failing(0, None)

    def unroutable(self, target: str) -> AbstractContextManager[None]:
        """Return a block in which no queue is bound for ``target``, a key or a pattern."""
        return self._recorder.unroutable(target)

    def crash_after_confirm(self) -> AbstractContextManager[None]:
        """Return a block in which the process dies right after the broker has confirmed a chunk.

        ``outbox.testing.SimulatedCrash`` is raised where the code publishes: no ``Exception``.
        """
        return self._recorder.crashing()

    # ------------------------------------------------------------------------- consumers

    def deliver(
        self, *consumers: type[Consumer] | Consumer, raise_errors: bool = True
    ) -> list[Delivered]:
        """Have ``consumers`` process what was published for them and not delivered to them yet.

        Each message is handled as in a worker: decoded from its bytes, in a new context, its
        follow-on events published, a failure among the dead letters.

        Args:
            *consumers: classes or instances; an event goes to each whose queue or topics match.
            raise_errors: raise what a handler raises, once its outcome is settled.

        Returns:
            The messages delivered, in order, each with its outcome and follow-on events.
        """
        __tracebackhide__ = True
        return self._delivery.deliver(consumers, raise_errors=raise_errors)

    def deliver_all(
        self, *consumers: type[Consumer] | Consumer, raise_errors: bool = True
    ) -> list[Delivered]:
        """Deliver until nothing is left to deliver, follow-on events too.

        Raises:
            AssertionError: after 100 rounds there is still something to deliver.
        """
        __tracebackhide__ = True
        return self._delivery.deliver_all(consumers, raise_errors=raise_errors)

    def perform(
        self,
        consumer: type[Consumer] | Consumer,
        payload: Any = None,
        *,
        raise_errors: bool = True,
        **options: Any,
    ) -> Delivered:
        """Have one consumer process one message, and return the result.

        Args:
            consumer: a class or an instance.
            payload: of the message; it goes through the real serializer.
            raise_errors: raise what the handler raises.
            **options: ``target`` (by default the consumer's queue), and those of
                ``enqueue_event()``.
        """
        __tracebackhide__ = True
        return self._delivery.perform(consumer, payload, options, raise_errors=raise_errors)

    def _publisher(self) -> Publisher:
        return publisher_if_any() or Publisher("memory://")
