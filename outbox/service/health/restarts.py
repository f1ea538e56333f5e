"""The delays before dead worker processes are replaced. Pure: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Callable

from outbox.system.backoff import backoff

__all__ = ["Restarts"]

_HEALTHY = 60.0
"""Seconds that a process must live for its death to begin a new count."""

_LOOP = 3

_MESSAGES_DELAY = 2.0
"""Seconds, at most, until a process is replaced that died while messages ran. A message that kills
it ends by itself after a few losses; until then the others must not wait for long."""


class Restarts:
    """The deaths of the processes in one slot.

    Attributes:
        in_a_row: the number of early deaths in a row, the latest included.
    """

    def __init__(self, delay: Callable[[int], float] = backoff) -> None:
        """Start with none; ``delay(n)`` returns the seconds to wait after ``n`` earlier deaths."""
        self._delay = delay
        self.in_a_row = 0
        self._with_messages = 0

    def died_with_messages(self, lived: float) -> float:
        """Count a death while messages ran; return the seconds to wait before the next start.

        It is not an early death: as far as is known, a message has caused it.
        """
        if lived >= _HEALTHY:
            self._with_messages = 0
        self._with_messages += 1
        return min(_MESSAGES_DELAY, self._delay(self._with_messages - 1))

    def died(self, lived: float) -> float:
        """Count a death after ``lived`` seconds; return the seconds to wait before the next start.

        0.5, doubling up to 30, with jitter; back to 0.5 if the process lived for a minute.
        """
        if lived >= _HEALTHY:
            self.in_a_row = 0
        self.in_a_row += 1
        return self._delay(self.in_a_row - 1)

    @property
    def repeated(self) -> bool:
        """Whether it has died again and again, early or while messages ran."""
        return self.looping or self._with_messages >= _LOOP

    @property
    def looping(self) -> bool:
        """Whether the next process is likely to die as well."""
        return self.in_a_row >= _LOOP
