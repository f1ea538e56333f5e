"""The rows that a worker has in its hands, and until when they are its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from outbox.storage.store import Claimed

__all__ = ["LEASE", "Leases"]

LEASE = 30.0
"""Seconds after which what a worker had is delivered again, when the worker is gone."""

_EXTEND_AFTER = LEASE / 3


class Leases:
    """Numbers rows in the order in which they are taken, and forgets those that are lost.

    Changed on one thread; may be asked by others. No I/O; ``now`` is on any steady clock.
    """

    def __init__(self, prefetch: int) -> None:
        """Hold nothing; at most ``prefetch`` rows of each queue at a time."""
        self._prefetch = prefetch
        self._rows: dict[int, Claimed] = {}
        self._of_queue: Counter[str] = Counter()
        self._last_tag = 0
        self._since = 0.0  # when all of them were leased at the latest

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, tag: int) -> bool:
        return tag in self._rows

    @property
    def rows(self) -> list[Claimed]:
        """What is held, in the order in which it was taken."""
        return list(self._rows.values())

    def take(self, row: Claimed, now: float) -> int:
        """Hold ``row``, leased at ``now``; return its number."""
        if not self._rows:
            self._since = now
        self._last_tag += 1
        self._rows[self._last_tag] = row
        self._of_queue[row.queue] += 1
        return self._last_tag

    def get(self, tag: int) -> Claimed | None:
        """Return the row of a number, if it is still held."""
        return self._rows.get(tag)

    def drop(self, tags: Iterable[int]) -> None:
        """Hold these no longer."""
        for tag in tags:
            row = self._rows.pop(tag, None)
            if row is not None:
                self._of_queue[row.queue] -= 1

    def held(self, queue: str) -> int:
        """Return how many rows of ``queue`` are held."""
        return self._of_queue[queue]

    def free(self, queue: str) -> int:
        """Return how many rows of ``queue`` may be taken now."""
        return self._prefetch - self._of_queue[queue]

    def extend_in(self, now: float) -> float | None:
        """Return in how many seconds the leases are to be extended; None if there are none."""
        return self._since + _EXTEND_AFTER - now if self._rows else None

    def extended(self, left: set[int], now: float) -> int:
        """Note that at ``now`` the leases of the rows ``left`` were extended, and no others.

        Returns:
            How many rows somebody else has got meanwhile.
        """
        lost = [tag for tag, row in self._rows.items() if row.seq not in left]
        self.drop(lost)
        self._since = now
        return len(lost)

    def end(self, now: float) -> int:
        """Forget all if their leases may have ended; return how many there were."""
        if not self._rows or now < self._since + LEASE:
            return 0
        count = len(self._rows)
        self.drop(list(self._rows))
        return count
