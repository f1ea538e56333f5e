"""Histograms of durations."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["BOUNDS", "Histogram"]

BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
"""Upper bounds of the buckets of :class:`Histogram`, in seconds; a last one has no bound."""


@dataclass(frozen=True, slots=True)
class Histogram:
    """How long something took, each time.

    Attributes:
        total: the sum, in seconds.
        buckets: how often it took how long: a number for each of ``BOUNDS``, not cumulative, and
            one for the rest.
    """

    total: float
    buckets: tuple[int, ...]

    @property
    def count(self) -> int:
        """How often it happened."""
        return sum(self.buckets)

    @property
    def mean(self) -> float:
        """The average in seconds; 0.0 if it has never happened."""
        return self.total / self.count if self.count else 0.0
