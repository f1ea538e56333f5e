"""The signals that a supervisor has received, and the pipe through which they end its waits."""

from __future__ import annotations

import contextlib
import os
import signal
from collections import deque
from collections.abc import Iterator
from types import FrameType

__all__ = ["SignalQueue"]


class SignalQueue:
    """The signals that the main thread has yet to handle.

    A signal handler alone doesn't end a ``select`` (PEP 475); a byte in a pipe does.
    """

    def __init__(self) -> None:
        """Create an empty queue; ``open()`` installs the handlers."""
        self._signals: deque[int] = deque()
        self._woken = -1

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Handle the signals of a service in a ``with`` block, on the main thread.

        SIGTERM, SIGINT, SIGHUP unless it is ignored, as under nohup, SIGUSR1, SIGTSTP unless it
        may come from a terminal, and SIGCHLD.
        """
        handled = [signal.SIGTERM, signal.SIGINT, signal.SIGCHLD, signal.SIGUSR1]
        if not os.isatty(0):  # otherwise Ctrl-Z suspends the command, as any other
            handled.append(signal.SIGTSTP)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup ignores it
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
        """Remove and yield the signals, except SIGCHLD, which only ends a wait."""
        while self._signals:
            yield self._signals.popleft()

    def fileno(self) -> int:
        """Return the descriptor that becomes readable when a signal arrives."""
        return self._woken

    def clear_wake_up(self) -> None:
        """Empty the pipe, so that the next ``select`` waits again."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 4096)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGHUP and os.isatty(0):  # the terminal was closed
            number = signal.SIGTERM
        if number != signal.SIGCHLD:
            self._signals.append(number)
