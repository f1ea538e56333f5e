"""The places of an engine's threads, and how they pass on when handlers are late."""

from __future__ import annotations

import threading

__all__ = ["Places"]


class Places:
    """A counter of the places that threads work in. Thread-safe.

    A thread whose handler exceeded its timeout is late: it loses its place to a successor, for as
    many late threads as there are places. Beyond that, a place stays free until any late thread
    comes back. So there are never more threads than twice the places, however many handlers hang.

    Attributes:
        late: the number of threads in handlers that exceeded their timeout.
        came_back: how many of them have ended since the start.
    """

    def __init__(self, count: int) -> None:
        """Create ``count`` places, all empty."""
        self.late = 0
        self.came_back = 0
        self._count = count
        self._taken = 0
        self._free = 0  # the places for late threads that come back
        self._changed = threading.Condition()

    def take_all(self) -> None:
        """Fill every place."""
        self._taken = self._count

    def leave(self, *, to_late: bool = False) -> bool:
        """Empty a place, and return whether all are empty now.

        With ``to_late``, the next late thread that comes back takes it.
        """
        with self._changed:
            self._taken -= 1
            self._free += to_late
            self._changed.notify_all()
            return not self._taken

    def lose(self) -> bool:
        """Note that a thread is late; return whether its successor takes over its place."""
        with self._changed:
            self.late += 1
            goes_on = self.late <= self._count
            self._free += not goes_on
            return goes_on

    def come_back(self) -> bool:
        """Note that a late handler has ended; return whether its thread has a place to work in."""
        with self._changed:
            self.late -= 1
            self.came_back += 1
            if not self._free:
                return False
            self._free -= 1
            self._taken += 1
            return True

    def wait_until_empty(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until every place is empty; return whether they are.

        Joining the threads would not do: meanwhile, successors may take over late threads' places.
        """
        with self._changed:
            return self._changed.wait_for(lambda: not self._taken, timeout)
