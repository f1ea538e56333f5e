"""Counters for monitoring."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["LATENCY_BOUNDS", "Latency", "Stats", "Tally"]

LATENCY_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the buckets of :class:`Latency`, in seconds; a last one has no bound."""


@dataclass(frozen=True, slots=True)
class Latency:
    """The time chunks took from being submitted until all of their events had a fate.

    Chunks that were reported before, as kept or withdrawn, are not counted.

    Attributes:
        count: the number of chunks.
        total: the sum, in seconds.
        maximum: the longest, in seconds.
        buckets: the number of chunks by duration: one for each of ``LATENCY_BOUNDS``, not
            cumulative, and one for the rest.
    """

    count: int
    total: float
    maximum: float
    buckets: tuple[int, ...]

    @property
    def mean(self) -> float:
        """The average in seconds; 0.0 while none was counted."""
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of a publisher, since it was created or its process was forked.

    Attributes:
        connected: whether events can be published now, as far as is known.
        kept: events that are kept now.
        kept_bytes: the bytes of their bodies.
        ever_kept: events that had to be kept, whatever their fate was later.
        published: events that the broker has confirmed.
        parked: events that were parked.
        ignored: unroutable events that were ignored.
        rejected: events that were given up.
        withdrawn: events of consumers that were not confirmed in time; the message is handled
            again.
        nacked: the number of times that the broker nacked an event.
        cleared: events that were dropped by a rollback or by ``clear_events()``.
        connects: the number of times that a connection was opened and could publish.
        latency: the latency of the chunks.
    """

    connected: bool
    kept: int
    kept_bytes: int
    ever_kept: int
    published: int
    parked: int
    ignored: int
    rejected: int
    withdrawn: int
    nacked: int
    cleared: int
    connects: int
    latency: Latency

    @property
    def reconnects(self) -> int:
        """The number of times that a connection was opened again."""
        return max(0, self.connects - 1)


class Tally:
    """The counters behind :class:`Stats`. The owner guards them; reading a number is always safe.

    Attributes:
        submitted: the number of events in chunks that were submitted.
        ever_kept: see :class:`Stats`, as for the others.
        fates: the number of events by the value of their fate.
        nacked: the number of nacks.
        connects: the number of connections.
        buckets: the number of chunks by duration, see :class:`Latency`.
        total: the sum of the durations in seconds.
        maximum: the longest duration in seconds.
    """

    __slots__ = (
        "buckets",
        "connects",
        "ever_kept",
        "fates",
        "maximum",
        "nacked",
        "submitted",
        "total",
    )

    def __init__(self) -> None:
        self.submitted = 0
        self.ever_kept = 0
        self.nacked = 0
        self.connects = 0
        self.fates: dict[str, int] = {}
        self.buckets = [0] * (len(LATENCY_BOUNDS) + 1)
        self.total = 0.0
        self.maximum = 0.0

    @property
    def latency(self) -> Latency:
        """A snapshot of the latencies."""
        buckets = tuple(self.buckets)
        return Latency(sum(buckets), self.total, self.maximum, buckets)
