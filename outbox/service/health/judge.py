"""Decides whether a process is stuck. Pure: no clock, no I/O."""

from __future__ import annotations

from collections.abc import Mapping

__all__ = ["LONGEST_STEP", "Judge"]

LONGEST_STEP = 2.0
"""Seconds, at most, that one step counts for. The parent takes steps of a second or less; a longer
one means that the parent itself has been stopped, by SIGSTOP, a debugger or the whole machine, and
then its processes may have been, too."""

_MEANINGS = {
    "io": "the thread of its consumer's connection has not answered",
    "publisher": "the thread of its publisher's connection has not answered",
    "loop": "its event loop has been blocked",
    "handlers": "as many handlers as it may run have exceeded their timeout, and none has ended",
}


class Judge:
    """What one process lets hear of itself, and for how long it has not.

    A process reports once a second how long each of its parts has been silent: ``pulses``. If the
    report itself stays away, no thread of the process gets to run, for example because C code
    holds the interpreter's lock.
    """

    def __init__(self, stuck_after: float) -> None:
        """Allow each part ``stuck_after`` seconds of silence; 0 for any number."""
        self._stuck_after = stuck_after
        self._silence = 0.0
        self._pulses: Mapping[str, float] = {}

    def hear(self, pulses: object) -> None:
        """Note a report, with the seconds of silence of each part, by the part's name."""
        self._silence = 0.0
        self._pulses = pulses if isinstance(pulses, dict) else {}

    def step(self, seconds: float) -> None:
        """Let ``seconds`` go by."""
        self._silence += min(seconds, LONGEST_STEP)

    @property
    def is_silent(self) -> bool:
        """Whether none of its threads has run for as long as is allowed."""
        return bool(self._stuck_after) and self._silence > self._stuck_after

    def verdict(self) -> str:
        """Return why the process is stuck, for people to read; empty if it isn't."""
        if not self._stuck_after:
            return ""
        if self.is_silent:
            return f"none of its threads has run for {self._silence:.0f} s"
        for part, age in self._pulses.items():
            if isinstance(age, (int, float)) and age + self._silence > self._stuck_after:
                meaning = _MEANINGS.get(part, f"{part} has been silent")
                return f"{meaning} for {age + self._silence:.0f} s"
        return ""
