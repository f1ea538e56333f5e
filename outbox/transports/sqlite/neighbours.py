"""Those of this process that use one file: they take turns, and wake each other.

SQLite lets other connections try again and again until a writer is done; between processes there
is nothing better. Within one, whoever waits is next.
"""

from __future__ import annotations

import threading

from outbox import process

__all__ = ["Neighbours", "neighbours_at"]


class Neighbours:
    """Thread-safe.

    Attributes:
        turn: held by the one who writes.
    """

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self._listeners: frozenset[threading.Event] = frozenset()

    def listen(self, event: threading.Event) -> None:
        """Have ``event`` set when something was published."""
        self._listeners |= {event}

    def leave(self, event: threading.Event) -> None:
        """Undo :meth:`listen`."""
        self._listeners -= {event}

    def wake(self) -> None:
        """Tell all who listen that something was published."""
        for event in self._listeners:
            event.set()


_lock = threading.Lock()
_by_path: dict[str, Neighbours] = {}


def neighbours_at(path: str) -> Neighbours:
    """Return those of this process at the file ``path``."""
    with _lock:
        return _by_path.setdefault(path, Neighbours())


def _begin_anew() -> None:
    """In a forked child: a thread that is not there any more may have held any of the locks."""
    global _lock
    _lock = threading.Lock()
    _by_path.clear()


process.after_fork(_begin_anew)
