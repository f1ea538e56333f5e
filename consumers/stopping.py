"""Being told to stop."""

from __future__ import annotations

import os
import signal
from types import FrameType

from outbox.consumers import exit_codes

__all__ = ["Signals", "Stop"]


class Stop:
    """Whether the worker of this process is to stop.

    Attributes:
        asked: whether it is.
    """

    def __init__(self) -> None:
        self.asked = False

    def ask(self) -> None:
        """Have the worker stop in order. May be called from anywhere, as often as one likes."""
        self.asked = True

    def begin(self) -> None:
        """Be told that from now on there is something to finish."""


class Signals(Stop):
    """Notes SIGTERM and SIGINT.

    A handler may interrupt anything, also a lock that is being taken: it takes none itself. Until
    ``begin()``, which the main thread has to call, signals do what they did before.
    """

    def __init__(self, *, second_kills: bool) -> None:
        """Note them; with ``second_kills`` a second one ends the process at once."""
        super().__init__()
        self._second_kills = second_kills

    def begin(self) -> None:
        """Handle signals."""
        signal.signal(signal.SIGTERM, self._note)
        signal.signal(signal.SIGINT, self._note)

    def _note(self, _number: int, _frame: FrameType | None) -> None:
        if self.asked and self._second_kills:
            os._exit(exit_codes.KILLED)
        self.ask()
