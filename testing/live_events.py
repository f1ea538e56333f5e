"""The events of a live test: published to a real broker, processed by real workers."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

from outbox.consumers import Consumer
from outbox.testing.assertions import EventAssertions
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
        *consumers: type[Consumer] | Consumer,
        raise_errors: bool = True,
        timeout: float = 30.0,
    ) -> list[Delivered]:
        """Run a worker with ``consumers`` until all events are processed, follow-on ones too.

        It is a ``Worker`` with one thread, stopped at the end. Events published before a consumer's
        queue existed are put into that queue first.

        Args:
            *consumers: classes or instances; an event goes to each whose queue or topics match.
            raise_errors: whether to raise a handler's first exception, once its message is settled.
            timeout: the seconds to wait at most.

        Returns:
            The delivered messages, in order, each with its outcome and follow-on events.

        Raises:
            AssertionError: messages are left after ``timeout`` seconds.
        """
        __tracebackhide__ = True
        return self._delivery.deliver_all(consumers, raise_errors=raise_errors, timeout=timeout)

    def deliver(
        self,
        *consumers: type[Consumer] | Consumer,
        raise_errors: bool = True,
        timeout: float = 30.0,
    ) -> list[Delivered]:
        """Do the same as ``deliver_all``: a worker processes follow-on events too."""
        __tracebackhide__ = True
        return self._delivery.deliver_all(consumers, raise_errors=raise_errors, timeout=timeout)

    def perform(
        self,
        consumer: type[Consumer] | Consumer,
        payload: Any = None,
        *,
        raise_errors: bool = True,
        timeout: float = 30.0,
        **options: Any,
    ) -> Delivered:
        """Have a worker process one message of a consumer's queue, and return the result.

        Args:
            consumer: a class or an instance.
            payload: the message's payload; it goes through the real serializer.
            raise_errors: whether to raise the handler's exception.
            timeout: the seconds to wait at most.
            **options: ``target`` (by default the consumer's queue), and the options of
                ``enqueue_event()``.
        """
        __tracebackhide__ = True
        return self._delivery.perform(
            consumer, payload, options, raise_errors=raise_errors, timeout=timeout
        )

    def _looks(self) -> Iterator[None]:
        deadline = time.monotonic() + self.patience
        yield
        while (remaining := deadline - time.monotonic()) > 0:
            with self._broker.changed:
                self._broker.changed.wait(min(remaining, 0.05))
            yield
