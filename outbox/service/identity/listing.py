"""The services of a folder, as another process sees them, and signals to them."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from outbox.service.identity.pid_file import ELSEWHERE, holder_of, own_files, pid_path
from outbox.service.identity.status_file import Status, status_path
from outbox.service.readable import wait_readable

__all__ = ["Listed", "Signalled", "listed"]

_POLL = 0.05
"""Seconds between two looks at a lock, where the system has no pidfd."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A process of a service: one that has its id, is to take it over, or leaves; or its remains.

    Attributes:
        id: the service's id.
        path: the file on which it holds its lock.
        number: its process id as the text of the pid file has it; None if that isn't a number.
        holder: the process that holds the lock; None if it has died, and ``ELSEWHERE`` if it is in
            another container.
        is_owner: whether it has the id.
        status: what it wrote down last; None if nothing can be read.
    """

    id: str
    path: Path
    number: int | None
    holder: int | None
    is_owner: bool
    status: Status | None

    @property
    def is_alive(self) -> bool:
        """Whether it runs, here or in another container."""
        return self.holder is not None

    @property
    def is_elsewhere(self) -> bool:
        """Whether it runs in another container, and can't be signalled from here."""
        return self.holder == ELSEWHERE


def listed(folder: Path, id: str | None = None) -> list[Listed]:
    """Return the processes of all services in ``folder``, or of one, owners first.

    Must not be called in the parent of a service: see ``pid_file.holder_of``.

    Raises:
        OSError: a file can't be read.
    """
    found: list[Listed] = []
    inodes = set()
    for one, key, path in own_files(folder, id):
        with contextlib.suppress(FileNotFoundError):
            status = path.lstat()
            inodes.add((status.st_dev, status.st_ino))
            is_owner = False
            with contextlib.suppress(FileNotFoundError):
                is_owner = os.path.samestat(status, pid_path(folder, one).lstat())
            found.append(
                Listed(
                    one,
                    path,
                    _number(path),
                    holder_of(path),
                    is_owner,
                    Status.read(status_path(folder, one, key)),
                )
            )
    # Pid files without an own file: copied, restored, or of another program.
    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(folder):
            one = name.removeprefix("outbox-").removesuffix(".pid")
            if name != pid_path(folder, one).name or id not in (None, one):
                continue
            path = folder / name
            with contextlib.suppress(FileNotFoundError):
                status = path.lstat()
                if (status.st_dev, status.st_ino) not in inodes:
                    found.append(Listed(one, path, _number(path), holder_of(path), True, None))
    return sorted(found, key=lambda each: (each.id, not each.is_owner, each.path))


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        with path.open("rb") as file:
            return int(file.read(32))
    return None


class Signalled:
    """A living process of a service, to which signals are sent, and whose end can be awaited.

    The number that the kernel names as the lock's holder may be another process's a moment later:
    so the lock is asked again when the process can't be confused any more.
    """

    def __init__(self, process: Listed) -> None:
        """Find the process.

        Raises:
            ProcessLookupError: it has ended, or runs in another container.
        """
        holder = process.holder
        if not holder:  # dead, or elsewhere
            raise ProcessLookupError(process.path)
        self._path = process.path
        self._pid = holder
        self._descriptor = -1
        if hasattr(os, "pidfd_open"):
            try:
                self._descriptor = os.pidfd_open(holder)
            except ProcessLookupError:
                raise
            except OSError:  # an old kernel, or a sandbox that forbids it
                self._descriptor = -1
        if holder_of(process.path) != holder:
            self.close()
            raise ProcessLookupError(process.path)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; nothing happens if it has ended.

        Raises:
            PermissionError: it belongs to another user.
        """
        with contextlib.suppress(ProcessLookupError):
            if self._descriptor >= 0:
                signal.pidfd_send_signal(self._descriptor, number)
            elif holder_of(self._path) == self._pid:
                os.kill(self._pid, number)

    def wait(self, timeout: float | None) -> bool:
        """Return whether it has ended, after waiting for that; None waits without a limit."""
        if self._descriptor >= 0:
            return bool(wait_readable([self._descriptor], timeout))
        end = None if timeout is None else time.monotonic() + timeout
        while holder_of(self._path) == self._pid:
            if end is not None and time.monotonic() >= end:
                return False
            time.sleep(_POLL)
        return True

    def close(self) -> None:
        """Let go of the process."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
