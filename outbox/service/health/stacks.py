"""The stacks of a process's threads, which faulthandler writes even while no Python code can run.

They go into a file without a name that parent and process share, so that the parent can log them
also for a process that has to be killed.

A handler of a signal in C walks the stacks of threads that go on running, and now and then that
ends the process, by SIGSEGV. So a process is asked by a word first, which a thread of Python
answers while no other one runs, and by the signal only if it doesn't: then C code holds the
interpreter, and the stacks stay as they are.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping

from outbox.system.signals import handle

__all__ = ["StackFile", "dump_for_parent", "dump_on_signal", "signal_held_back"]

_VARIABLE = "_OUTBOX_STACKS"
_MOST = 2**20
"""Bytes, at most, that are logged of one dump."""

_SETTLED = 0.5
"""Seconds without a change after which a dump is complete."""


class StackFile:
    """The parent's side of the file. Used by one thread."""

    def __init__(self) -> None:
        """Make the file.

        Raises:
            OSError: there is no room for it.
        """
        if hasattr(os, "memfd_create"):
            self.descriptor = os.memfd_create("outbox-stacks")
        else:
            with tempfile.TemporaryFile() as file:
                self.descriptor = os.dup(file.fileno())
        flags = fcntl.fcntl(self.descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self.descriptor, fcntl.F_SETFL, flags | os.O_APPEND)
        self._size = 0
        self._since = 0.0

    def variables(self) -> Mapping[str, str]:
        """Return the environment with which the process finds the file."""
        return {_VARIABLE: str(self.descriptor)}

    def take(self, now: float) -> str:
        """Return a dump once it is complete, and remove it; empty if there is none.

        Args:
            now: the time in seconds, on any clock that doesn't go back.
        """
        size = os.fstat(self.descriptor).st_size
        if size != self._size:
            self._size, self._since = size, now
        if not size or now - self._since < _SETTLED:
            return ""
        text = os.pread(self.descriptor, min(size, _MOST), 0)
        os.ftruncate(self.descriptor, 0)
        self._size = 0
        return text.decode(errors="replace").rstrip()

    @property
    def has_begun(self) -> bool:
        """Whether a dump has begun, and was not taken."""
        return os.fstat(self.descriptor).st_size > 0

    def close(self) -> None:
        """Close the parent's side; once only."""
        os.close(self.descriptor)


def dump_for_parent() -> Callable[[], None]:
    """Return what writes the stacks of all threads, to the parent's log or to standard error.

    SIGUSR1, with which the parent asks when no thread of Python answers, writes them as well.
    """
    descriptor = os.environ.pop(_VARIABLE, "")
    file = int(descriptor) if descriptor else None
    if file is not None:
        os.set_inheritable(file, False)
    with contextlib.suppress(*_NO_FILE):
        faulthandler.register(signal.SIGUSR1, sys.stderr if file is None else file)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGUSR1})
    return lambda: _dump(file)


def dump_on_signal() -> None:
    """Have SIGUSR1 write the stacks of all threads to standard error, once Python code can run."""
    with contextlib.suppress(ValueError):  # not the main thread
        handle(signal.SIGUSR1, lambda _number, _frame: _dump(None))
        signal.siginterrupt(signal.SIGUSR1, False)


def _dump(file: int | None) -> None:
    with contextlib.suppress(*_NO_FILE):
        faulthandler.dump_traceback(sys.stderr if file is None else file)


_NO_FILE = (ValueError, OSError, AttributeError, RuntimeError)
"""Standard error may be closed, or be an object without a file."""


@contextlib.contextmanager
def signal_held_back() -> Iterator[None]:
    """Start a process whose first SIGUSR1 waits for ``dump_for_parent``, instead of ending it."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
