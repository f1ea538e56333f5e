"""One file, shared by all of this process that use it: they take turns, and wake each other.

SQLite lets other connections try again and again until a writer is done; between processes there
is nothing better. Within one, whoever waits is next.

Before the process forks, all connections are closed; parent and child open new ones. SQLite's locks
are POSIX's, which a child does not inherit, but its notes of them it does: a connection that the
child opens beside an inherited one would have no locks, and another process could take the log away
under it (https://www.sqlite.org/howtocorrupt.html, 2.6).
"""

from __future__ import annotations

import os
import threading
import weakref
from typing import Protocol

from outbox.system import process

__all__ = ["SharedFile", "shared_file_at"]


class Closable(Protocol):
    """What has the file open."""

    def let_go(self) -> None:
        """Close it, it being the caller's turn; it is opened anew when it is needed."""
        ...


class SharedFile:
    """One file, as this process uses it. Thread-safe.

    Attributes:
        turn: held by the one who uses the file.
        to_fork: the process waits for its turn to fork: who waits for other processes lets it.
        members: those who may have the file open.
    """

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.to_fork = False
        self.members: weakref.WeakSet[Closable] = weakref.WeakSet()
        self._listeners: frozenset[threading.Event] = frozenset()

    def listen(self, event: threading.Event) -> None:
        """Have ``event`` set when something was published."""
        self._listeners |= {event}

    def stop_listening(self, event: threading.Event) -> None:
        """Undo :meth:`listen`."""
        self._listeners -= {event}

    def wake(self) -> None:
        """Set the events of all who listen: something was published."""
        for event in self._listeners:
            event.set()


_lock = threading.Lock()
_by_path: dict[str, SharedFile] = {}


def shared_file_at(path: str) -> SharedFile:
    """Return the shared file at ``path``, the same one for all of this process."""
    with _lock:
        return _by_path.setdefault(path, SharedFile())


_held: list[SharedFile] = []
_LONGEST_WAIT = 10.0  # seconds: then a disk does not answer, and the child gets no file


def _before_fork() -> None:
    for one in list(_by_path.values()):
        one.to_fork = True
        if one.turn.acquire(timeout=_LONGEST_WAIT):
            _held.append(one)
            for member in list(one.members):
                member.let_go()


def _after_fork_in_parent() -> None:
    for one in _by_path.values():
        one.to_fork = False
    while _held:
        _held.pop().turn.release()


def _begin_anew() -> None:
    """In a forked child: a thread that is not there any more may have held any of the locks."""
    global _lock
    _lock = threading.Lock()
    _by_path.clear()
    _held.clear()


process.after_fork(_begin_anew)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork_in_parent)
