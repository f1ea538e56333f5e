"""The signals that a supervisor has got, and the pipe by which they end its waits."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import deque
from collections.abc import Iterator
from types import FrameType

__all__ = ["SignalQueue"]


class SignalQueue:
    """Holds signals until the main thread handles them.

    Only a pipe wakes a ``select``: a signal handler alone does not end a wait (PEP 475).
    """

    def __init__(self) -> None:
        """Hold nothing yet; handle no signal."""
        self._signals: deque[int] = deque()
        self._woken = -1

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Handle SIGTERM, SIGINT, SIGHUP and SIGCHLD in a ``with`` block, on the main thread."""
        handled = [signal.SIGTERM, signal.SIGINT, signal.SIGCHLD]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as it is under nohup
            handled.append(signal.SIGHUP)
        self._woken, wake = os.pipe()
        for end in (self._woken, wake):
            os.set_blocking(end, False)
        descriptor = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._note) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(descriptor)
            os.close(self._woken)
            os.close(wake)

    def take(self) -> Iterator[int]:
        """Iterate over the signals to handle; SIGCHLD, which only ends a wait, is left out."""
        while self._signals:
            yield self._signals.popleft()

    def fileno(self) -> int:
        """Return the descriptor that can be read when a signal has arrived."""
        return self._woken

    def clear_wake_up(self) -> None:
        """Let the next ``select`` wait again."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 4096)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP and os.isatty(0):  # the terminal was closed
            number = signal.SIGTERM
        if number != signal.SIGCHLD:
            self._signals.append(number)
