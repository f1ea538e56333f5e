"""A file shared by all its users in this process: they take turns.

While a connection writes, SQLite makes the others poll. Between processes that is unavoidable;
within a process a lock passes the turn on at once.

All connections are closed before the process forks, and opened again by parent and child. SQLite
uses POSIX locks, which a child doesn't inherit; but it inherits SQLite's record of them. If it
opened the file while it has an inherited connection, SQLite would think that it holds locks which
it doesn't, and another process could remove the log under it
(https://www.sqlite.org/howtocorrupt.html, 2.6).
"""

from __future__ import annotations

import threading
import weakref
from typing import Protocol

from outbox.system import process
from outbox.system.fork_pause import around_fork

__all__ = ["SharedFile", "shared_file_at"]


class Closable(Protocol):
    """A user of the file, with a connection that can be closed before a fork."""

    def disconnect(self) -> None:
        """Close the connection; the caller has the turn. It is reopened when needed."""
        ...


class SharedFile:
    """One file and its users in this process. Thread-safe.

    Attributes:
        turn: the lock to hold while using the file.
        to_fork: whether the process waits for the turn in order to fork; the holder must then stop
            waiting for other processes.
        members: the users that may have the file open.
    """

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.to_fork = False
        self.members: weakref.WeakSet[Closable] = weakref.WeakSet()


_lock = threading.Lock()
_by_path: dict[str, SharedFile] = {}


def shared_file_at(path: str) -> SharedFile:
    """Return the shared file at ``path``: the same object for all callers in this process."""
    with _lock:
        return _by_path.setdefault(path, SharedFile())


_held: list[SharedFile] = []
_LONGEST_WAIT = 10.0  # seconds; after that the disk hangs, and the child can't use the file


def _before_fork() -> None:
    for file in list(_by_path.values()):
        file.to_fork = True
        if file.turn.acquire(timeout=_LONGEST_WAIT):
            _held.append(file)
            for member in list(file.members):
                member.disconnect()


def _after_fork_in_parent() -> None:
    for file in _by_path.values():
        file.to_fork = False
    while _held:
        _held.pop().turn.release()


def _reset_after_fork() -> None:
    """Replace all locks in a forked child: a thread that the child lacks may have held them."""
    global _lock
    _lock = threading.Lock()
    _by_path.clear()
    _held.clear()


process.after_fork(_reset_after_fork)
around_fork(_before_fork, _after_fork_in_parent)
