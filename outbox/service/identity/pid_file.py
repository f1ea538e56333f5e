"""A service's pid file, which people read, and the lock on it, by which programs decide.

``outbox-<id>.pid`` holds a process id and a newline, nothing else. Whether that process runs is
never concluded from the number, which another process may have by now: while it runs, it holds a
POSIX record lock on its file. The kernel releases that however the process ends, and names the
holder to any process that asks.

Each process of an id, also one that waits or leaves, has the file ``outbox-<id>.pid.<pid>``. Who
takes the id over renames a second link of it over ``outbox-<id>.pid``: of two that do so at once,
the last one stays, in whatever order things happen. No process waits for another, or signals
another for a take-over.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import struct
import sys
from pathlib import Path
from typing import Literal, TypeAlias

from outbox.errors import UsageError
from outbox.service.identity.folder import open_folder

__all__ = ["ELSEWHERE", "PidFile", "Standing", "check_id", "holder_of", "own_files", "pid_path"]

Standing: TypeAlias = Literal["own", "absent", "stale", "held"]

ELSEWHERE = 0
"""The number of a holder in another PID namespace, such as another container."""

_ID = re.compile(r"[A-Za-z0-9._-]{1,64}", re.ASCII)
_OWN = re.compile(r"outbox-(.+)\.pid\.(\d+(?:-\d+)?)", re.ASCII)

_FLOCK = "qqihh" if sys.platform == "darwin" else "hhqqi"
"""``struct flock`` in the order of its fields: the type first, except on macOS."""


def check_id(text: str) -> str:
    """Return ``text`` if it can be a service's id; for ``type=`` of an argument.

    Raises:
        ValueError: it is not 1 to 64 of the characters ``A-Z a-z 0-9 . _ -``.
    """
    if not _ID.fullmatch(text):
        raise ValueError(f"{text!r} is not an id: 1 to 64 letters, digits, '.', '_' or '-'")
    return text


def pid_path(folder: Path, id: str) -> Path:
    """Return the path of the pid file of a service."""
    return folder / f"outbox-{id}.pid"


def own_files(folder: Path, id: str | None = None) -> list[tuple[str, str, Path]]:
    """Return id, key and path of each process's own file, those of dead processes included."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(folder)):
            matched = _OWN.fullmatch(name)
            if matched and id in (None, matched[1]):
                found.append((matched[1], matched[2], folder / name))
    return found


def holder_of(path: Path) -> int | None:
    """Return the process that holds the lock on a pid file; None if it is free or there is no file.

    ``ELSEWHERE`` is a process in another PID namespace.

    The holder itself must not call this with its own file: when a process closes any descriptor of
    a file, it loses its locks on that file.

    Raises:
        OSError: the file can't be opened.
    """
    try:
        # O_NONBLOCK: should it be a FIFO, opening it must not wait for a writer.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        return _holder(descriptor)
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> int | None:
    fields = {"type": fcntl.F_WRLCK, "whence": os.SEEK_SET, "start": 0, "length": 0, "pid": 0}
    order = ["type", "whence", "start", "length", "pid"]
    if sys.platform == "darwin":
        order = ["start", "length", "pid", "type", "whence"]
    asked = struct.pack(_FLOCK, *(fields[name] for name in order))
    asked = asked.ljust(struct.calcsize(_FLOCK + "0q"), b"\0")  # the compiler's padding
    answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, asked)
    values = dict(zip(order, struct.unpack_from(_FLOCK, answer), strict=True))
    return None if values["type"] == fcntl.F_UNLCK else max(values["pid"], ELSEWHERE)


class PidFile:
    """The pid file of a service, as the process sees it that has the id or wants it.

    Used by one thread. Nothing else in the process may open the files: see ``holder_of``.

    Attributes:
        path: the file that people read.
        key: what distinguishes this process from others of the id: its number, with a suffix where
            a process of another container has the same.
    """

    def __init__(self, folder: Path, id: str) -> None:
        """Create and lock this process's own file, without taking the id.

        Raises:
            UsageError: the folder can't be used, or its file system has no hard links.
        """
        self._folder = folder
        self._id = id
        self.path = pid_path(folder, id)
        self.key = str(os.getpid())
        self._descriptor = -1
        self._create()

    @property
    def _own(self) -> Path:
        return self._folder / f"outbox-{self._id}.pid.{self.key}"

    def standing(self) -> Standing:
        """Return who has the id: this process, none, or another, whose lock is free or held."""
        try:
            if os.path.samestat(self.path.lstat(), os.fstat(self._descriptor)):
                return "own"
            return "stale" if holder_of(self.path) is None else "held"
        except FileNotFoundError:
            return "absent"

    def take(self) -> None:
        """Take the id, from whichever process has it.

        Raises:
            OSError: the folder can't be written to.
        """
        if not self._has_own():  # a program that cleans temporary folders has removed it
            before = self._descriptor
            self._create()
            os.close(before)
        spare = self._folder / f".outbox-{self._id}.{self.key}.new"
        spare.unlink(missing_ok=True)
        os.link(self._own, spare)
        os.replace(spare, self.path)

    def close(self) -> None:
        """Remove the files, the pid file only if it is this process's, and release the lock."""
        with contextlib.suppress(OSError):
            if self.standing() == "own":
                # Should another take over just here, its file vanishes, and it writes it again.
                self.path.unlink()
        with contextlib.suppress(OSError):
            if self._has_own():
                self._own.unlink()
        os.close(self._descriptor)
        self._descriptor = -1

    def _has_own(self) -> bool:
        try:
            return os.path.samestat(self._own.lstat(), os.fstat(self._descriptor))
        except FileNotFoundError:
            return False

    def _create(self) -> None:
        """Make this process's own file; it appears under its name with its text and its lock."""
        open_folder(self._folder)
        draft = self._folder / f".outbox-{self._id}.{os.getpid()}.{os.urandom(4).hex()}"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        try:
            descriptor = os.open(draft, flags, 0o644)
        except OSError as error:
            raise UsageError(f"cannot write to the folder {self._folder}: {error}") from None
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(descriptor, b"%d\n" % os.getpid())
            self._link(draft)
        except OSError as error:
            os.close(descriptor)
            raise UsageError(
                f"the folder {self._folder} cannot hold pid files, which need locks and hard links "
                f"({error.strerror}); choose another: --pid-dir"
            ) from None
        finally:
            draft.unlink(missing_ok=True)
        self._descriptor = descriptor

    def _link(self, draft: Path) -> None:
        for attempt in range(2, 100):
            try:
                os.link(draft, self._own)
                return
            except FileExistsError:
                # A dead process had this number; or a living one in another container has it.
                if holder_of(self._own) is None:
                    self._own.unlink(missing_ok=True)
                else:
                    self.key = f"{os.getpid()}-{attempt}"
        raise FileExistsError(f"{self._own} exists")
