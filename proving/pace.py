"""The pace of writers: slow while more waits than can be processed soon."""

from __future__ import annotations

from pathlib import Path

__all__ = ["Pace"]

_SLOWED = 20.0


class Pace:
    """The pace of one kind of writer, kept as a file in the history's folder. Thread-safe.

    How much a machine can process under faults isn't known in advance, and the rest must be
    processed at the end, so an unlimited backlog would make a proof too long. Writers only slow
    down and never stop, because each fault should hit all kinds of work.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        """Make the pace of ``kind``, at first full speed."""
        self._slowed = folder / f"{kind}.slowed"

    @property
    def factor(self) -> float:
        """The factor by which the writer multiplies each pause, 1 or more."""
        return _SLOWED if self._slowed.exists() else 1.0

    def set(self, *, slow: bool) -> None:
        """Set the pace."""
        if slow:
            self._slowed.touch()
        else:
            self._slowed.unlink(missing_ok=True)
