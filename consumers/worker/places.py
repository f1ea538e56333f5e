"""The places of an engine's threads, and what becomes of them when handlers are late."""

from __future__ import annotations

import threading

__all__ = ["Places"]


class Places:
    """Counts the places that threads work in. Thread-safe.

    A thread in a handler whose time is over is late: it loses its place to a successor, for as many
    late threads as there are places. Beyond that a place stays free until one of them comes back.

    Attributes:
        late: how many threads are in handlers whose time is over.
    """

    def __init__(self, count: int) -> None:
        """Have ``count`` places, all empty."""
        self.late = 0
        self._count = count
        self._taken = 0
        self._free = 0  # of late threads without a successor
        self._changed = threading.Condition()

    def take_all(self) -> None:
        """Have a thread in every place."""
        self._taken = self._count

    def leave(self, *, to_late: bool = False) -> None:
        """Empty a place; with ``to_late`` the next late thread that comes back takes it."""
        with self._changed:
            self._taken -= 1
            self._free += to_late
            self._changed.notify_all()

    def lose(self) -> bool:
        """Note that a thread is late; return whether its successor goes on in its place."""
        with self._changed:
            self.late += 1
            goes_on = self.late <= self._count
            self._free += not goes_on
            return goes_on

    def come_back(self) -> bool:
        """Note that a late handler has ended; return whether its thread has a place to work in."""
        with self._changed:
            self.late -= 1
            if not self._free:
                return False
            self._free -= 1
            self._taken += 1
            return True

    def wait_until_empty(self, timeout: float) -> bool:
        """Wait until nothing works any more, at most ``timeout`` seconds; return whether so.

        Threads cannot be waited for: meanwhile others may take the places of late ones.
        """
        with self._changed:
            return self._changed.wait_for(lambda: not self._taken, timeout)
