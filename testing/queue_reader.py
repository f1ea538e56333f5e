"""Reads a queue of a live test, once all its bindings are known to exist."""

from __future__ import annotations

from collections.abc import Callable
from threading import Event as Signal

from outbox import Event
from outbox.ids import new_id
from outbox.messages.delivery import Delivery, QueueSpec
from outbox.settings import Settings
from outbox.system.steady_clock import monotonic
from outbox.transports.registry import open_subscription
from outbox.transports.transport import Transport

__all__ = ["QueueReader"]

_PREFETCH = 1000
_TIMEOUT = 20.0


class QueueReader:
    """Passes on the messages that arrive in a queue. Thread-safe.

    A greeting is sent to the queue by name. Its arrival shows that the queue is being consumed
    from, and so has all its bindings.
    """

    def __init__(
        self,
        settings: Settings,
        spec: QueueSpec,
        arrived: Callable[[Delivery], None] | None,
    ) -> None:
        """Make a reader, not connected yet.

        Args:
            settings: the settings for the broker.
            spec: the queue, which is declared as a worker would declare it.
            arrived: the callback for each message, on the transport's thread; None to leave the
                messages unacknowledged.
        """
        self._spec = spec
        self._arrived = arrived
        self._subscription = open_subscription(settings, [spec], _PREFETCH)
        self._greeting = Event(
            id=new_id(), target=spec.name, exchange="", body=b"null", unroutable="ignore"
        )
        self._bound = Signal()
        self._refused = ""

    def open(self, transport: Transport) -> bool:
        """Declare the queue and consume from it, with the greeting sent over ``transport``.

        Returns:
            Whether the queue existed before.

        Raises:
            AssertionError: the broker doesn't answer, or refuses the queue.
        """
        deadline = monotonic() + _TIMEOUT
        existed = self._greet(transport, deadline)
        self._subscription.start(self._on_delivery, self._on_refused)
        greeted = existed
        while not greeted and not self._refused:
            self._bound.wait(0.01)
            greeted = self._greet(transport, deadline)
        while not self._refused and not self._bound.wait(0.1):
            if monotonic() > deadline:
                raise AssertionError(f"queue {self._spec.name!r} was not bound in {_TIMEOUT:g} s")
        if self._refused:
            raise AssertionError(f"the broker refused queue {self._spec.name!r}: {self._refused}")
        return existed

    def close(self) -> None:
        """Stop consuming; unacknowledged messages go back to the queue."""
        self._subscription.cancel()
        self._subscription.close()

    def _greet(self, transport: Transport, deadline: float) -> bool:
        chunk = transport.prepare([self._greeting], keep=False)
        transport.hand_in(chunk)
        try:
            report = chunk.future.result(max(0.0, deadline - monotonic()))
        except TimeoutError:
            transport.release(chunk)
            raise AssertionError(f"the test's broker did not answer in {_TIMEOUT:g} s") from None
        if report.error is not None and monotonic() > deadline:
            raise AssertionError(f"publishing to the test's broker failed: {report.error}")
        return bool(report.published)

    def _on_delivery(self, delivery: Delivery) -> None:
        if delivery.message_id == self._greeting.id:
            self._subscription.ack(delivery)
            self._bound.set()
        elif self._arrived is not None:
            self._arrived(delivery)
            self._subscription.ack(delivery)

    def _on_refused(self, reason: str) -> None:
        self._refused = reason
        self._bound.set()
