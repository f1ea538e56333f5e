"""Floors: where in a table's index the claims of one worker begin.

A row that was claimed and deleted stays in the index, dead, until the database has cleaned up,
which it can't while any transaction is open that began before. The oldest come first, so that every
claim would read through all that was ever claimed. One that begins where the first row alive was
found last does not.

No I/O.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import time
from collections import defaultdict
from collections.abc import Sequence

__all__ = ["NO_FLOOR", "Floors", "Span"]

NO_FLOOR = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
"""A floor below every row."""

_MARGIN = datetime.timedelta(seconds=0.1)
"""How far a floor is below the present at least: transactions may commit in another order than they
have stored their rows."""

_LOOK_THROUGH_EVERY = 1.0
"""Seconds after which an index is read through from its beginning, for rows below the floor: they
were stored by a transaction that took long, or given back."""

_SHARE = 9
"""While there is little to claim, reading through takes one part of the time, and this many parts
are left."""

_LONGEST_PAUSE = 5.0
"""Seconds between two readings at most, however long they take."""

_ABOVE = 1 << 15  # every SMALLINT


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Where to look for the rows of one rank, and of new ranks above it.

    Attributes:
        queue: the queue.
        rank: the rank; -1 for none.
        next: the next higher rank that is known.
        floor: where the rows of ``rank`` begin.
    """

    queue: str
    rank: int
    next: int
    floor: datetime.datetime


@dataclasses.dataclass(slots=True)
class _Queue:
    floors: dict[int, datetime.datetime] = dataclasses.field(default_factory=dict)  # by rank
    looked_through_at: float = -math.inf
    pause: float = 0.0
    is_idle: bool = True


class Floors:
    """The floors of one worker's claims, by queue and rank. For one thread."""

    def __init__(self) -> None:
        """Begin without any: the first claim reads everything."""
        self._queues: defaultdict[str, _Queue] = defaultdict(_Queue)

    def is_time_to_look_through(self, queues: Sequence[str], *, idle: bool = False) -> bool:
        """Return whether to look for rows of these queues from the beginning of the index.

        Args:
            queues: the queues.
            idle: whether less is to be had than there is room for; also if the last claim from the
                queue was of that kind.
        """
        now = time.monotonic()
        for queue in (self._queues[name] for name in queues):
            is_idle = idle or queue.is_idle
            pause = queue.pause if is_idle else max(queue.pause, _LOOK_THROUGH_EVERY)
            if now >= queue.looked_through_at + pause:
                return True
        return False

    def looked_through(self, queues: Sequence[str], began: float, ended: float) -> None:
        """Note that the index was read through, between two times of ``time.monotonic()``."""
        for name in queues:
            queue = self._queues[name]
            queue.looked_through_at = ended
            queue.pause = min(_LONGEST_PAUSE, _SHARE * (ended - began))

    def claimed(self, queue: str, *, all_wanted: bool) -> None:
        """Note a claim, and whether it got as many rows as it wanted."""
        self._queues[queue].is_idle = not all_wanted

    def are_known(self, queue: str) -> bool:
        """Return whether a rank of ``queue`` is known."""
        return bool(self._queues[queue].floors)

    def spans(self, queues: Sequence[str]) -> list[Span]:
        """Return where to look for rows of these queues."""
        spans: list[Span] = []
        for name in queues:
            floors = self._queues[name].floors
            ranks = [-1, *sorted(floors)]
            spans += [
                Span(name, rank, following, floors.get(rank, NO_FLOOR))
                for rank, following in zip(ranks, [*ranks[1:], _ABOVE], strict=True)
            ]
        return spans

    def add(self, queue: str, rank: int) -> None:
        """Note a rank that is in use, whose floor isn't known yet."""
        self._queues[queue].floors.setdefault(rank, NO_FLOOR)

    def raise_to(
        self, queue: str, rank: int, first: datetime.datetime | None, now: datetime.datetime
    ) -> None:
        """Set the floor of a rank.

        Args:
            queue: the queue.
            rank: the rank, or that of a span without one.
            first: when the first row alive is due; None if there is none.
            now: the time of the database's clock.
        """
        if rank >= 0:
            self._queues[queue].floors[rank] = min(first or now, now - _MARGIN)
