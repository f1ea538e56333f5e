"""Requests to stop, by a signal or otherwise."""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["Signals", "Stop"]


class Stop:
    """A request to stop what runs in this process.

    Attributes:
        asked: whether it was made.
    """

    def __init__(self) -> None:
        self.asked = False

    def ask(self) -> None:
        """Request an orderly stop. May be called from anywhere, any number of times."""
        self.asked = True

    def begin(self) -> None:
        """Note that from now on there is something to finish."""


class Signals(Stop):
    """A stop requested by SIGTERM, SIGINT, or SIGHUP unless that is ignored (as under nohup).

    A handler may interrupt anything, even the taking of a lock, so it takes none itself. Until
    ``begin()``, which the main thread must call, signals do what they did before.
    """

    def __init__(self, *, second_exits: int | None) -> None:
        """Set the code with which a second signal ends the process at once; None for no effect."""
        super().__init__()
        self._second_exits = second_exits

    def begin(self) -> None:
        """Install the signal handlers."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked and self._second_exits is not None:
            os._exit(self._second_exits)
        self.ask()
