"""The lock by which processes know whose a spool file is. Lock files are opened here alone.

It is a POSIX record lock: the kernel releases it however its process ends, also where a forked
child of that process lives on, which a lock of ``flock`` would outlast. Numbers of processes decide
nothing: containers that share a folder have the same ones.

A process loses such a lock as soon as it closes any descriptor of the file. So the files that it
holds are remembered, and never opened again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import threading
from pathlib import Path
from typing import Self

from outbox.system import process

__all__ = ["FileLock"]

_held: set[Path] = set()
_guard = threading.Lock()  # taken by outbox's own threads alone, which nothing interrupts


class FileLock:
    """A lock that this process has. Made by :meth:`take`; used by one thread at a time.

    Attributes:
        path: the lock file.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self._descriptor = descriptor
        self._status = os.fstat(descriptor)

    @classmethod
    def take(cls, path: Path) -> Self | None:
        """Take the lock at once; return None if another process has it, or this one.

        Args:
            path: the lock file, which is created if it doesn't exist.

        Raises:
            OSError: the file can't be opened, or the file system has no locks.
        """
        with _guard:
            if path in _held:
                return None
            flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(path, flags, 0o600)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                os.close(descriptor)
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    return None
                raise
            lock = cls(path, descriptor)
            if not lock.stands:  # its last holder has just removed it
                os.close(descriptor)
                return None
            _held.add(path)
            return lock

    @property
    def stands(self) -> bool:
        """Whether the lock file is still there: without it, others could take the lock again."""
        try:
            return os.path.samestat(os.stat(self.path), self._status)
        except OSError:
            return False

    def release(self, *, remove: bool) -> None:
        """Release the lock; remove its file before if ``remove`` says so."""
        with _guard:
            if remove and self.stands:
                with contextlib.suppress(OSError):  # who looks for files removes the rest of one
                    self.path.unlink()
            os.close(self._descriptor)
            _held.discard(self.path)


def _forget_all() -> None:
    """Forget, in a forked child, what its parent holds: locks aren't inherited."""
    global _guard
    _guard = threading.Lock()
    _held.clear()


process.after_fork(_forget_all)
