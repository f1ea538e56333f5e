"""Notices that the machine's clock was set forward, or that the machine was suspended."""

from __future__ import annotations

import time
from collections.abc import Callable

__all__ = ["ClockJumps"]

_TOLERANCE = 1.0
"""Seconds by which the clock may run ahead between two looks; a clock that is adjusted gradually,
at most 1.8 s in an hour, stays below."""


class ClockJumps:
    """Compares the machine's clock with one that can't be set and that stops while it sleeps.

    For one thread, which must look every few minutes at least.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.time,
        steady_clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self._steady_clock = steady_clock
        self._ahead = clock() - steady_clock()

    def look(self) -> float:
        """Return the seconds that the clock has jumped forward since the last look, or 0."""
        before, self._ahead = self._ahead, self._clock() - self._steady_clock()
        jump = self._ahead - before
        return jump if jump > _TOLERANCE else 0.0
