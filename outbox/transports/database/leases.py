"""The rows a worker has claimed, and the times to extend their leases.

All rows share one deadline: they are extended together, well before the oldest lease ends. A lease
that has ended is extended like any other, unless another worker has claimed the row meanwhile: only
then the delivery becomes stale. So what was done while the database was away is settled afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterable

from outbox.storage.store import Claimed

__all__ = ["Leases"]

_EXTENSIONS = 3
"""How often leases are extended while one would last."""


class Leases:
    """The claimed rows by delivery tag, numbered in the order they are taken.

    Changed on one thread, read on any. No I/O; ``now`` is the time of any monotonic clock.

    Attributes:
        prefetch: the maximum of each queue.
    """

    def __init__(self, prefetch: int, lease: float) -> None:
        """Start with no rows; allow at most ``prefetch`` of each queue at a time.

        Args:
            prefetch: that number.
            lease: the seconds that a lease lasts.
        """
        self.prefetch = prefetch
        self._lease = lease
        self._rows: dict[int, Claimed] = {}
        self._of_queue: Counter[str] = Counter()
        self._last_tag = 0
        self._since = 0.0  # all present leases began at this time or later
        self._extend_at = 0.0

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, tag: int) -> bool:
        return tag in self._rows

    @property
    def rows(self) -> list[Claimed]:
        """The rows, in the order they were taken."""
        return list(self._rows.values())

    def items(self) -> list[tuple[int, Claimed]]:
        """Return the tags and rows, in the order they were taken."""
        return list(self._rows.items())

    def take(self, row: Claimed, now: float) -> int:
        """Add ``row``, leased at ``now``, and return its delivery tag."""
        if not self._rows:
            self._begin(now)
        self._last_tag += 1
        self._rows[self._last_tag] = row
        self._of_queue[row.queue] += 1
        return self._last_tag

    def get(self, tag: int) -> Claimed | None:
        """Return the row with this tag, or None if it was settled or lost."""
        return self._rows.get(tag)

    def drop(self, tags: Iterable[int]) -> None:
        """Remove the rows with these tags."""
        for tag in tags:
            row = self._rows.pop(tag, None)
            if row is not None:
                self._of_queue[row.queue] -= 1

    def held(self, queue: str) -> int:
        """Return the number of claimed rows of ``queue``."""
        return self._of_queue[queue]

    def ranks(self, queue: str, *, settled: Container[int]) -> Counter[int]:
        """Return how many rows of ``queue`` are claimed, by rank, without those ``settled``."""
        return Counter(
            row.event.priority or 0
            for tag, row in self._rows.items()
            if row.queue == queue and tag not in settled
        )

    def free(self, queue: str) -> int:
        """Return the number of rows of ``queue`` that may be claimed now."""
        return self.prefetch - self._of_queue[queue]

    def extend_in(self, now: float) -> float | None:
        """Return the seconds until the leases have to be extended; None if there are none."""
        return self._extend_at - now if self._rows else None

    def extend_soon(self) -> None:
        """Have the leases extended at once: by the database's clock they may have ended."""
        self._extend_at = self._since

    def among(self, rows: Iterable[Claimed], *, settled: Container[int]) -> bool:
        """Return whether a row is in ``rows`` that is held here and not among those ``settled``.

        Args:
            rows: rows that were claimed again.
            settled: the tags of rows whose settlement is part of the same transaction.
        """
        again = {row.seq for row in rows if row.deliveries > 1}
        return bool(again) and any(
            row.seq in again and tag not in settled for tag, row in self._rows.items()
        )

    def extended(self, seqs: set[int], now: float) -> int:
        """Note that at ``now`` exactly the leases of the rows ``seqs`` were extended.

        Returns:
            The number of rows that other workers have claimed meanwhile; they are removed.
        """
        lost = [tag for tag, row in self._rows.items() if row.seq not in seqs]
        self.drop(lost)
        self._begin(now)
        return len(lost)

    def drop_all(self) -> int:
        """Remove all rows; return the number of rows."""
        count = len(self._rows)
        self.drop(list(self._rows))
        return count

    def _begin(self, now: float) -> None:
        self._since = now
        self._extend_at = now + self._lease / _EXTENSIONS
