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
    URL says. Assertions that want an event wait for it, for ``patience`` seconds, since threads and
    other processes may publish it. Thread-safe, but for ``deliver_all`` and ``perform``.

    Attributes:
        strict: whether the test fails in the end if an event was published that no assertion has
            matched.
        patience: seconds.
    """

    patience: float = 2.0

    def __init__(self, broker: LiveBroker, *, strict: bool = False) -> None:
        """Answer from what ``broker`` has; the fixture does this."""
        super().__init__(broker, strict=strict)
        self._broker = broker
        self._delivery = LiveDelivery(broker)

    @property
    def url(self) -> str:
        """The URL of the test's broker, for other processes."""
        return self._broker.url

    @property
    def environ(self) -> dict[str, str]:
        """The environment, for another process that is to publish to the test's broker."""
        return {**os.environ, "OUTBOX_URL": self.url}

    def deliver_all(
        self,
        *consumers: type[Consumer] | Consumer,
        raise_errors: bool = True,
        timeout: float = 30.0,
    ) -> list[Delivered]:
        """Run a worker of ``consumers`` until all that was published is processed, follow-ons too.

        It is a ``Worker`` of one thread, stopped at the end. Events published before a consumer's
        queue existed are put into that queue first.

        Args:
            *consumers: classes or instances; an event goes to each whose queue or topics match.
            raise_errors: raise the first error that a handler raises, once its message is settled.
            timeout: seconds.

        Returns:
            The messages delivered, in order, each with its outcome and follow-on events.

        Raises:
            AssertionError: something is left after ``timeout`` seconds.
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
            payload: of the message; it goes through the real serializer.
            raise_errors: raise what the handler raises.
            timeout: seconds.
            **options: ``target`` (by default the consumer's queue), and those of
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
