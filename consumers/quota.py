"""How many messages a worker processes before it asks to be stopped."""

from __future__ import annotations

import threading

__all__ = ["Quota"]


class Quota:
    """Counts messages up to a bound. Thread-safe."""

    def __init__(self, limit: int) -> None:
        """Allow ``limit`` messages, 1 or more."""
        self._limit = limit
        self._lock = threading.Lock()
        self._begun = 0
        self._ended = 0

    @property
    def used_up(self) -> bool:
        """Whether all messages that are allowed have ended."""
        return self._ended >= self._limit

    def begin(self) -> bool:
        """Return whether one more message may be begun."""
        with self._lock:
            if self._begun >= self._limit:
                return False
            self._begun += 1
            return True

    def end(self) -> bool:
        """Note that a message has ended; return whether it was the last one that is allowed."""
        with self._lock:
            self._ended += 1
            return self._ended == self._limit
