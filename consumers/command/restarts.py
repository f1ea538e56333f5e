"""The delays before dead worker processes are replaced. Pure: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Callable

from outbox.system.backoff import backoff

__all__ = ["Restarts"]

_HEALTHY = 60.0
"""Seconds that a process must live for its death to begin a new count."""

_LOOP = 3


class Restarts:
    """The deaths of the processes in one slot.

    Attributes:
        in_a_row: the number of early deaths in a row, the latest included.
    """

    def __init__(self, delay: Callable[[int], float] = backoff) -> None:
        """Start with none; ``delay(n)`` returns the seconds to wait after ``n`` earlier deaths."""
        self._delay = delay
        self.in_a_row = 0

    def died(self, lived: float) -> float:
        """Count a death after ``lived`` seconds; return the seconds to wait before the next start.

        0.5, doubling up to 30, with jitter; back to 0.5 if the process lived for a minute.
        """
        if lived >= _HEALTHY:
            self.in_a_row = 0
        self.in_a_row += 1
        return self._delay(self.in_a_row - 1)

    @property
    def looping(self) -> bool:
        """Whether the next process is likely to die as well."""
        return self.in_a_row >= _LOOP
