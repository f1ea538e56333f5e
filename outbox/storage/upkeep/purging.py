"""When the rows that were kept are deleted."""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable

__all__ = ["Purging"]

_AT_ONCE = 1000  # rows
_EVERY = 60.0  # seconds between two looks for rows whose time is over
_SOON = 0.1  # seconds until the next look while there are more
_SPREAD = 10.0  # seconds in which processes that start together have their first looks


class Purging:
    """Has the rows deleted whose time is over, a thousand at a time.

    For one thread. A process that keeps rows deletes them, too; others don't look for any.
    """

    def __init__(self, keep: float) -> None:
        """Begin within the next ten seconds, if rows are kept, which is for ``keep`` seconds."""
        self._at = time.monotonic() + random.uniform(0, _SPREAD) if keep else math.inf

    def due_in(self) -> float:
        """Return the seconds until the next look; infinity if there will be none."""
        return self._at - time.monotonic()

    def turn(self, purge: Callable[[int], int]) -> None:
        """Delete rows, if it is time.

        Args:
            purge: deletes at most the given number of rows, and returns how many it has deleted.
        """
        if self.due_in() > 0:
            return
        self._at = time.monotonic() + _EVERY * random.uniform(0.8, 1.2)
        if purge(_AT_ONCE) >= _AT_ONCE:
            self._at = time.monotonic() + _SOON
