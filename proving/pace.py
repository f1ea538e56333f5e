"""How fast writers go on: slowly, while more waits than can be settled soon."""

from __future__ import annotations

from pathlib import Path

__all__ = ["Pace"]

_SLOWED = 20.0


class Pace:
    """The pace of one kind of writer, whose programs are told by a file in the history's folder.

    How much a machine settles beside all the faults, nobody knows beforehand; what is left is
    settled in the end, and a proof would take as long as its backlog is deep. Nobody stops: each
    fault is to meet some of everything. Thread-safe.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        """Know the pace of ``kind``; at first it is the full one."""
        self._slowed = folder / f"{kind}.slowed"

    @property
    def factor(self) -> float:
        """By what every pause of the writer is multiplied, 1 or more."""
        return _SLOWED if self._slowed.exists() else 1.0

    def set(self, *, slow: bool) -> None:
        """Change it."""
        if slow:
            self._slowed.touch()
        else:
            self._slowed.unlink(missing_ok=True)
