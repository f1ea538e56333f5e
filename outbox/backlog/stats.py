"""Counters for monitoring."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

__all__ = ["LATENCY_BOUNDS", "Latency", "Stats", "Tally"]

LATENCY_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the buckets of :class:`Latency`, in seconds; a last one has no bound."""


@dataclass(frozen=True, slots=True)
class Latency:
    """How long chunks took from being submitted until all of their events had a fate.

    Chunks that were reported before, as kept or withdrawn, are not counted.

    Attributes:
        count: chunks.
        total: the sum, in seconds.
        maximum: the longest, in seconds.
        buckets: chunks by duration: one number for each of ``LATENCY_BOUNDS``, not cumulated, and
            one for the rest.
    """

    count: int
    total: float
    maximum: float
    buckets: tuple[int, ...]

    @property
    def mean(self) -> float:
        """The average in seconds; 0.0 while nothing was counted."""
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True)
class Stats:
    """What a publisher has done since it was made, or since its process was forked.

    Attributes:
        connected: whether events can be published now, as far as is known.
        kept: events that are kept now.
        kept_bytes: the bytes of their bodies.
        ever_kept: events that had to be kept, whatever became of them later.
        published: events that the broker has confirmed.
        parked: events that were parked.
        ignored: unroutable events that were ignored.
        rejected: events that were given up.
        withdrawn: events of consumers that were not confirmed in time; the message is handled
            again.
        nacked: how often the broker refused an event for the time being.
        cleared: events that were dropped by a rollback or by ``clear_events()``.
        connects: how often a connection was opened that could publish.
        latency: of the chunks.
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
        """How often a connection was opened again."""
        return max(0, self.connects - 1)


class Tally:
    """Counts. Whoever holds it guards it; reading single numbers is safe anywhere.

    Attributes:
        ever_kept: see :class:`Stats`, as for the others.
        fates: events by the value of their fate.
        nacked: refusals.
        connects: connections.
    """

    __slots__ = ("_buckets", "_maximum", "_total", "connects", "ever_kept", "fates", "nacked")

    def __init__(self) -> None:
        self.ever_kept = 0
        self.nacked = 0
        self.connects = 0
        self.fates: dict[str, int] = {}
        self._buckets = [0] * (len(LATENCY_BOUNDS) + 1)
        self._total = 0.0
        self._maximum = 0.0

    def add(self, fate: str, events: int = 1) -> None:
        """Count events that got their fate."""
        self.fates[fate] = self.fates.get(fate, 0) + events

    def took(self, seconds: float) -> None:
        """Count a chunk whose events all have their fate."""
        self._buckets[bisect.bisect_left(LATENCY_BOUNDS, seconds)] += 1
        self._total += seconds
        self._maximum = max(self._maximum, seconds)

    @property
    def latency(self) -> Latency:
        """A snapshot."""
        buckets = tuple(self._buckets)
        return Latency(sum(buckets), self._total, self._maximum, buckets)
