"""Counters of a worker, for monitoring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from outbox.telemetry.histogram import Histogram

__all__ = ["QueueStats", "WorkerStats"]


@dataclass(frozen=True, slots=True)
class QueueStats:
    """Counters of one queue's messages.

    Attributes:
        queue: the queue.
        consumer: the name of the consumer's class or function.
        outcomes: the number of messages by how their processing ended: ``acked``, ``duplicate``,
            ``expired``, ``retried``, ``timed_out``, ``requeued``, ``rejected``, ``dead`` and
            ``returned``; see ``docs/metrics.md``.
        duration: the time from a message's begin until it was settled.
        wait: the time from when an event occurred, or was due, until its message first began.
        in_flight: messages that have begun and not ended.
    """

    queue: str
    consumer: str
    outcomes: Mapping[str, int]
    duration: Histogram
    wait: Histogram
    in_flight: int


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """Counters of a worker since it was made, which are not all read at the same instant.

    Attributes:
        queues: those of each queue.
        late: handlers that go on after their timeout.
        is_consuming: whether the broker delivers messages as soon as there are any.
    """

    queues: tuple[QueueStats, ...]
    late: int
    is_consuming: bool

    @property
    def in_flight(self) -> int:
        """Messages that have begun and not ended."""
        return sum(each.in_flight for each in self.queues)

    @property
    def ended(self) -> int:
        """Messages that were begun and have ended, in whichever way."""
        return sum(sum(each.outcomes.values()) for each in self.queues)
