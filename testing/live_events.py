"""The events of a live test: published to a real broker, processed by real workers."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from typing import Any

from outbox.consumers import Consumer
from outbox.system.steady_clock import monotonic
from outbox.testing.assertions import EventAssertions
from outbox.testing.called import Runnable
from outbox.testing.live_broker import LiveBroker
from outbox.testing.live_delivery import LiveDelivery
from outbox.testing.recorded_delivery import Delivered

__all__ = ["LiveEvents"]


class LiveEvents(EventAssertions):
    """The events that the code under test published to a broker, as they arrived there.

    For one test, every publisher and every worker of the process uses that broker, whatever its
    URL says. Assertions that expect an event wait up to ``patience`` seconds for it, since threads
    and other processes may publish it. Thread-safe, except for ``deliver_all`` and ``perform``.

    Attributes:
        strict: whether the test fails at its end if a published event was matched by no assertion.
        patience: the seconds that an assertion waits for its events, at most; 2.0 by default.
    """

    patience: float = 2.0

    def __init__(self, broker: LiveBroker, *, strict: bool = False) -> None:
        """Make assertions about the events on ``broker``; the fixture calls this."""
        super().__init__(broker, strict=strict)
        self._broker = broker
        self._delivery = LiveDelivery(broker)

    @property
    def url(self) -> str:
        """The URL of the test's broker, for other processes."""
        return self._broker.url

    @property
    def environ(self) -> dict[str, str]:
        """The environment for another process that should publish to the test's broker."""
        return {**os.environ, "OUTBOX_URL": self.url}

    def deliver_all(
        self,
        *consumers: Runnable,
        raise_errors: bool = True,
        allow_none: bool = False,
        timeout: float = 30.0,
    ) -> list[Delivered]:
        """Run a worker with ``consumers`` until all events are processed, follow-on ones too.

        It is a ``Worker`` with one thread and an event loop for itself, stopped at the end. Events
        published before a consumer's queue existed are put into that queue first. Consumers that
        ``deduplicate`` do so in ``OUTBOX_DATABASE_URL``, or else in the test's SQLite file or, with
        RabbitMQ, in memory.

        Args:
            *consumers: classes or instances; an event goes to each whose queue or topics match.
                A task or a module runs all tasks of the module.
            raise_errors: whether to raise the first exception whose message is not retried.
            allow_none: whether there may be no message for these consumers; otherwise that is an
                error after ``patience`` seconds, unless they have received one earlier in the test.
            timeout: the seconds to wait at most, for retries too.

        Returns:
            The delivered messages, in order, each with its outcome and follow-on events.

        Raises:
            AssertionError: messages are left after ``timeout`` seconds, or there were none.
            UsageError: a worker would refuse these consumers.
        """
        __tracebackhide__ = True
        return self._delivery.deliver_all(
            consumers,
            raise_errors=raise_errors,
            timeout=timeout,
            patience=None if allow_none else self.patience,
        )

    def deliver(
        self,
        *consumers: Runnable,
        raise_errors: bool = True,
        allow_none: bool = False,
        timeout: float = 30.0,
    ) -> list[Delivered]:
        """Do the same as ``deliver_all``: a worker processes follow-on events too."""
        __tracebackhide__ = True
        return self.deliver_all(
            *consumers, raise_errors=raise_errors, allow_none=allow_none, timeout=timeout
        )

    def perform(
        self,
        consumer: type[Consumer] | Consumer,
        payload: Any = None,
        *,
        raise_errors: bool = True,
        timeout: float = 30.0,
        **options: Any,
    ) -> Delivered:
        """Have a worker process one message of a consumer's queue, and return the last result.

        Args:
            consumer: a class or an instance.
            payload: the message's payload; it goes through the real serializer.
            raise_errors: whether to raise the exception of the handler's last attempt.
            timeout: the seconds to wait at most.
            **options: ``target`` (by default the consumer's queue), and the options of
                ``enqueue_event()``.
        """
        __tracebackhide__ = True
        return self._delivery.perform(
            consumer, payload, options, raise_errors=raise_errors, timeout=timeout
        )

    async def deliver_all_async(self, *consumers: Runnable, **options: Any) -> list[Delivered]:
        """Do the same as :meth:`deliver_all`, without blocking the running event loop."""
        __tracebackhide__ = True
        return await asyncio.to_thread(self.deliver_all, *consumers, **options)

    async def deliver_async(self, *consumers: Runnable, **options: Any) -> list[Delivered]:
        """Do the same as :meth:`deliver`, without blocking the running event loop."""
        __tracebackhide__ = True
        return await asyncio.to_thread(self.deliver, *consumers, **options)

    async def perform_async(
        self, consumer: type[Consumer] | Consumer, payload: Any = None, **options: Any
    ) -> Delivered:
        """Do the same as :meth:`perform`, without blocking the running event loop."""
        __tracebackhide__ = True
        return await asyncio.to_thread(self.perform, consumer, payload, **options)

    def _looks(self) -> Iterator[None]:
        deadline = monotonic() + self.patience
        yield
        while (remaining := deadline - monotonic()) > 0:
            with self._broker.changed:
                self._broker.changed.wait(min(remaining, 0.05))
            yield
