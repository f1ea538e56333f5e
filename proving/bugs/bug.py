"""A deliberate bug."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

__all__ = ["Bug"]


@dataclass(frozen=True, slots=True)
class Bug:
    """A bug, and what exposes it.

    Attributes:
        name: the name on the command line.
        found_as: the kind of finding that must result, a key of :attr:`Verdict.findings`.
        faults: the faults that provoke it.
        kinds: the kinds of programs that it is planted in.
        plant: a function that changes the library.
        habits: what the programs do besides, see :data:`proving.ground.HABITS`.
        tries: runs in one of which it must be caught: more than 1 if an instant has to be hit.
    """

    name: str
    found_as: str
    faults: Sequence[str]
    kinds: Sequence[str]
    plant: Callable[[], None]
    habits: Sequence[str] = ()
    tries: int = 1
