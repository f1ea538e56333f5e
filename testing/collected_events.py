"""The events of a recorded test; the test decides what happens to them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from outbox import BrokerError, Event, Publisher
from outbox.configuration import publisher_if_any
from outbox.consumers import Consumer
from outbox.testing.assertions import EventAssertions
from outbox.testing.called import Runnable
from outbox.testing.recorded_delivery import Delivered, RecordedDelivery
from outbox.testing.recorder import Recorder

__all__ = ["CollectedEvents"]


class CollectedEvents(EventAssertions):
    """The events that the code under test enqueued, by state.

    For one test it replaces every publisher: nothing reaches a broker. Payloads have gone through
    the real serializer. Thread-safe.

    Attributes:
        strict: whether the test fails at its end if a published event was matched by no assertion.
    """

    def __init__(self, recorder: Recorder, *, strict: bool = False) -> None:
        """Make assertions about what ``recorder`` has recorded; the fixture calls this."""
        super().__init__(recorder, strict=strict)
        self._recorder = recorder
        self._delivery = RecordedDelivery(recorder, self._publisher)

    # --------------------------------------------------------------- simulated transactions

    def commit(self) -> tuple[Event, ...]:
        """Publish everything that is pending or stored, as if its unit of work had succeeded.

        Use it for code whose transaction is never committed in a test.

        Returns:
            The events that it published.
        """
        events = (*self.pending, *self.stored)
        self._recorder.pretend(events, success=True)
        return events

    def rollback(self) -> tuple[Event, ...]:
        """Drop everything that is pending or stored, as if its unit of work had failed.

        Returns:
            The events that it dropped.
        """
        events = (*self.pending, *self.stored)
        self._recorder.pretend(events, success=False)
        return events

    @contextmanager
    def savepoint(self) -> Iterator[None]:
        """If the block raises, drop the events enqueued in it that are pending or stored."""
        before = {id(event) for event in (*self.pending, *self.stored)}
        try:
            yield
        except BaseException:
            events = (*self.pending, *self.stored)
            dropped = [event for event in events if id(event) not in before]
            self._recorder.pretend(dropped, success=False)
            raise

    # --------------------------------------------------------------- simulated failures

    def fail_publish(
        self, after: int = 0, error: BrokerError | None = None
    ) -> AbstractContextManager[None]:
        """Return a context manager in which only ``after`` events are confirmed; others are kept.

        When its block ends, the broker is available again, and the kept events are published. In a
        consumer, where nothing is kept, ``publish()`` raises.

        Args:
            after: the number of events that the broker still confirms.
            error: the error in the reports; by default a lost connection.
        """
        return self._recorder.failing(after, error)

    def broker_down(self) -> AbstractContextManager[None]:
        """Return a context manager with the broker unavailable: events are kept until its end."""
        return self._recorder.failing(0, None)

    def unroutable(self, target: str) -> AbstractContextManager[None]:
        """Return a context manager that makes events to ``target``, or a pattern, unroutable."""
        return self._recorder.unroutable(target)

    def crash_after_confirm(self) -> AbstractContextManager[None]:
        """Return a context manager in which the process "crashes" once a chunk is confirmed.

        ``outbox.testing.SimulatedCrash``, which isn't an ``Exception``, is raised where the code
        publishes.
        """
        return self._recorder.crashing()

    # ------------------------------------------------------------------------- consumers

    def deliver(
        self,
        *consumers: Runnable,
        raise_errors: bool = True,
        allow_none: bool = False,
    ) -> list[Delivered]:
        """Have ``consumers`` process the messages published for them and not delivered yet.

        Each message has the life that it has in a worker: decoded from its bytes, in a new context,
        with its consumer's ``timeout`` and ``deduplicate``, its follow-on events published, retried
        or dead-lettered on failure. What it would have to wait for, a delay or the broker, doesn't
        make the test wait: a delayed event is delivered at once, and a message that a worker would
        hold is delivered again by the next call.

        A plain handler runs in the test's thread, or in another if the test is a coroutine. A
        session that the test has opened there in the scoped session given to
        ``outbox.sql.bind()`` is left as it is. What was processed is remembered for the test alone.

        Args:
            *consumers: classes or instances; an event goes to each whose queue or topics match.
                A task or a module runs all tasks of the module; without arguments, all
                tasks that were called are run.
            raise_errors: whether to raise a handler's exception, once its message is settled.
            allow_none: whether it may find no message for these consumers; otherwise that is an
                error, unless they have received one earlier in the test.

        Returns:
            The delivered messages, in order, each with its outcome and follow-on events.

        Raises:
            AssertionError: there was nothing to deliver.
            UsageError: a worker would refuse these consumers; or one of them is asynchronous, and
                so is the test: await ``deliver_async()`` there.
        """
        __tracebackhide__ = True
        return self._delivery.deliver(
            consumers, until_quiet=False, raise_errors=raise_errors, allow_none=allow_none
        )

    def deliver_all(
        self,
        *consumers: Runnable,
        raise_errors: bool = True,
        allow_none: bool = False,
    ) -> list[Delivered]:
        """Deliver until no messages are left, including follow-on events and retries.

        An exception is raised only if its message is not retried. Otherwise see :meth:`deliver`.

        Raises:
            AssertionError: messages are left after 100 rounds, or there was nothing to deliver.
            UsageError: see :meth:`deliver`.
        """
        __tracebackhide__ = True
        return self._delivery.deliver(
            consumers, until_quiet=True, raise_errors=raise_errors, allow_none=allow_none
        )

    def perform(
        self,
        consumer: type[Consumer] | Consumer,
        payload: Any = None,
        *,
        raise_errors: bool = True,
        **options: Any,
    ) -> Delivered:
        """Have one consumer process one message, once, and return the result.

        Args:
            consumer: a class or an instance.
            payload: the message's payload; it goes through the real serializer.
            raise_errors: whether to raise the handler's exception.
            **options: ``target`` (by default the consumer's queue), and the options of
                ``enqueue_event()``.

        Raises:
            UsageError: see :meth:`deliver`.
        """
        __tracebackhide__ = True
        return self._delivery.perform(consumer, payload, options, raise_errors=raise_errors)

    async def deliver_async(
        self,
        *consumers: Runnable,
        raise_errors: bool = True,
        allow_none: bool = False,
    ) -> list[Delivered]:
        """Do the same as :meth:`deliver`, with coroutines as tasks of the running event loop."""
        __tracebackhide__ = True
        return await self._delivery.deliver_async(
            consumers, until_quiet=False, raise_errors=raise_errors, allow_none=allow_none
        )

    async def deliver_all_async(
        self,
        *consumers: Runnable,
        raise_errors: bool = True,
        allow_none: bool = False,
    ) -> list[Delivered]:
        """Do the same as :meth:`deliver_all`, with coroutines as tasks of the running loop."""
        __tracebackhide__ = True
        return await self._delivery.deliver_async(
            consumers, until_quiet=True, raise_errors=raise_errors, allow_none=allow_none
        )

    async def perform_async(
        self,
        consumer: type[Consumer] | Consumer,
        payload: Any = None,
        *,
        raise_errors: bool = True,
        **options: Any,
    ) -> Delivered:
        """Do the same as :meth:`perform`, with a coroutine as a task of the running event loop."""
        __tracebackhide__ = True
        return await self._delivery.perform_async(
            consumer, payload, options, raise_errors=raise_errors
        )

    def _publisher(self) -> Publisher:
        return publisher_if_any() or Publisher("memory://")
