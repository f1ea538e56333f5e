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
        """Have it stop in order. May be called from anywhere, as often as one likes."""
        self.asked = True

    def begin(self) -> None:
        """Note that from now on there is something to finish."""


class Signals(Stop):
    """Notes SIGTERM, SIGINT, and SIGHUP, unless that is ignored already (as it is under nohup).

    A handler may interrupt anything, also a lock that is being taken: it takes none itself. Until
    ``begin()``, which the main thread has to call, signals do what they did before.
    """

    def __init__(self, *, second_exits: int | None) -> None:
        """Note them; a second one ends the process at once with this code, unless it is None."""
        super().__init__()
        self._second_exits = second_exits

    def begin(self) -> None:
        """Handle signals."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked and self._second_exits is not None:
            os._exit(self._second_exits)
        self.ask()
