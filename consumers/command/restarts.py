"""How soon a worker process that has died is replaced. Pure: times come in, delays go out."""

from __future__ import annotations

from collections.abc import Callable

from outbox.system.backoff import backoff

__all__ = ["Restarts"]

_HEALTHY = 60.0
"""Seconds of life after which an end is no longer taken for one more of the same."""

_LOOP = 3


class Restarts:
    """The ends of the processes in one place, one after the other.

    Attributes:
        in_a_row: how many have died young, the last one included.
    """

    def __init__(self, delay: Callable[[int], float] = backoff) -> None:
        """Begin with none; ``delay`` returns the seconds to wait after the n-th end, from 0."""
        self._delay = delay
        self.in_a_row = 0

    def died(self, lived: float) -> float:
        """Return the seconds to wait before the next one, which follows one of ``lived`` seconds.

        0.5 doubling to 30, with jitter; from the beginning again after one that lived for a minute.
        """
        if lived >= _HEALTHY:
            self.in_a_row = 0
        self.in_a_row += 1
        return self._delay(self.in_a_row - 1)

    @property
    def looping(self) -> bool:
        """Whether it looks as if the next one would die as well."""
        return self.in_a_row >= _LOOP
