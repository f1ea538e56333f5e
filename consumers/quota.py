"""How many messages a worker processes before it asks to be stopped."""

from __future__ import annotations

import threading

__all__ = ["Quota"]


class Quota:
    """Counts messages, against a bound if there is one. Thread-safe.

    Attributes:
        begun: how many messages were begun. Without a bound a lower limit: nobody takes a lock for
            it.
    """

    def __init__(self, limit: int | None) -> None:
        """Allow ``limit`` messages, 1 or more; None for any number."""
        self._limit = limit
        self._lock = threading.Lock()
        self._ended = 0
        self.begun = 0

    @property
    def used_up(self) -> bool:
        """Whether all messages that are allowed have ended."""
        return self._limit is not None and self._ended >= self._limit

    def begin(self) -> bool:
        """Return whether one more message may be begun."""
        if self._limit is None:
            self.begun += 1
            return True
        with self._lock:
            if self.begun >= self._limit:
                return False
            self.begun += 1
            return True

    def end(self) -> bool:
        """Note that a message has ended; return whether it was the last one that is allowed."""
        if self._limit is None:
            return False
        with self._lock:
            self._ended += 1
            return self._ended == self._limit
