"""The protocol of a subscription: how a worker receives and settles messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from outbox.messages.delivery import Delivery

__all__ = ["Subscription"]


class Subscription(Protocol):
    """Consumes from a worker's queues, and reconnects automatically. Thread-safe.

    Attributes:
        limits_processing: whether the broker takes back a message that isn't settled within a
            certain time.
        keeps_order: whether queues can be ``ordered``; then failed messages of theirs are settled
            with :meth:`back_off`, which keeps their places.
    """

    limits_processing: bool
    keeps_order: bool

    def start(self, deliver: Callable[[Delivery], None], refused: Callable[[str], None]) -> None:
        """Start consuming.

        Args:
            deliver: the callback for each message, on the transport's thread; it must not block.
            refused: the callback for the broker's reason to refuse a declaration, called only
                before the first successful start.
        """
        ...

    @property
    def is_consuming(self) -> bool:
        """Whether messages are delivered as they arrive; False while the broker is unavailable.

        A queue that can't be had for now is left out, unless there is no other.
        """
        ...

    @property
    def owner(self) -> str:
        """The name of this subscription where it leases messages for a time, else empty."""
        ...

    def ping(self, answer: Callable[[], None]) -> bool:
        """Have ``answer`` called soon on the transport's thread.

        Returns:
            False if that thread isn't running, or may rightly be busy for long.
        """
        ...

    def release_of(self, owners: Sequence[str], was_begun: Callable[[str, str], bool]) -> None:
        """Have what subscriptions of dead processes hold delivered soon.

        Args:
            owners: the ``owner`` of each of them.
            was_begun: returns whether a message, given by its queue and id, had been begun.
                The others lose nothing.
        """
        ...

    def ack(self, delivery: Delivery) -> None:
        """Ack ``delivery``; do nothing if it is stale."""
        ...

    def requeue(self, delivery: Delivery, delay: float) -> None:
        """Requeue ``delivery`` after ``delay`` seconds; do nothing if it is stale."""
        ...

    def back_off(self, delivery: Delivery, delay: float, headers: Mapping[str, Any]) -> None:
        """Requeue ``delivery`` like :meth:`requeue`, with ``headers`` added to its own.

        Raises:
            NotImplementedError: the transport has no order.
        """
        ...

    def out(self, queue: str) -> int:
        """Return the approximate number of unsettled deliveries from ``queue``."""
        ...

    def is_stale(self, delivery: Delivery) -> bool:
        """Return whether ``delivery`` can no longer be settled, and will be redelivered."""
        ...

    def declare_again(self) -> None:
        """Declare the queues again, because one of them is missing."""
        ...

    def cancel(self) -> None:
        """Stop the deliveries, waiting briefly; unsettled ones can still be settled."""
        ...

    def close(self) -> None:
        """Send what was settled, return the other deliveries to their queues, and disconnect."""
        ...
