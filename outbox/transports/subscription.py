"""The protocol of a subscription: how a worker receives and settles messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from outbox.messages.delivery import Delivery

__all__ = ["Subscription"]


class Subscription(Protocol):
    """Consumes from some queues, reconnecting by itself. Thread-safe."""

    def start(self, deliver: Callable[[Delivery], None], refused: Callable[[str], None]) -> None:
        """Begin to consume.

        Args:
            deliver: called for each message, on the transport's thread; must not block.
            refused: called with the broker's reason when it will not have a queue as it is
                declared, before anything was ever consumed.
        """
        ...

    @property
    def is_consuming(self) -> bool:
        """Whether messages come as soon as there are any; not while the broker is away."""
        ...

    def ack(self, delivery: Delivery) -> None:
        """Tell the broker that ``delivery`` is done; nothing happens if it is stale."""
        ...

    def requeue(self, delivery: Delivery, delay: float) -> None:
        """Give ``delivery`` back to its queue, after ``delay`` seconds."""
        ...

    def out(self, queue: str) -> int:
        """How many messages of ``queue`` were handed out and are not settled, about."""
        ...

    def is_stale(self, delivery: Delivery) -> bool:
        """Whether ``delivery`` can no longer be settled: it will be delivered again."""
        ...

    def declare_again(self) -> None:
        """Declare the queues anew: one of them was found missing."""
        ...

    def cancel(self) -> None:
        """Take no further deliveries; those that are out can still be settled. Waits a little."""
        ...

    def close(self) -> None:
        """Settle what was settled, give back the rest, and disconnect."""
        ...
