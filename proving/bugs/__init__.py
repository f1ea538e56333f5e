"""Deliberate bugs that the checker must catch.

Each changes the library in a way that could pass a review. It is planted at run time in the
programs under test.
"""

from __future__ import annotations

from collections.abc import Sequence

from proving.bugs import collecting, durability, sending, working
from proving.bugs.bug import Bug

__all__ = ["BUGS", "Bug", "plant"]

BUGS: Sequence[Bug] = (*collecting.BUGS, *durability.BUGS, *sending.BUGS, *working.BUGS)
"""All bugs."""


def plant(name: str) -> None:
    """Plant the bug called ``name`` in this process; an empty name plants none."""
    if name:
        next(bug for bug in BUGS if bug.name == name).plant()
