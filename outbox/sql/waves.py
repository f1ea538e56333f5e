"""Publishing of claimed rows: all at once, or in waves that keep the order within a key."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future

from outbox.errors import UsageError
from outbox.publisher import Publisher
from outbox.report import PublishReport
from outbox.sql.row_fates import RowFates, sort_out
from outbox.storage.store import Claimed

__all__ = ["Batch", "publish_in_waves", "waves"]


def waves(rows: Iterable[Claimed]) -> list[list[Claimed]]:
    """Return ``rows`` in order, in groups with at most one event per key."""
    groups: list[list[Claimed]] = []
    seen: Counter[str] = Counter()
    for row in rows:
        number = 0
        if row.event.key is not None:
            number = seen[row.event.key]
            seen[row.event.key] += 1
        if number == len(groups):
            groups.append([])
        groups[number].append(row)
    return groups


class Batch:
    """The rows of one claim while they are being published. Not thread-safe.

    An ordered batch is sent in waves: each wave is confirmed before the next is sent, and behind an
    unconfirmed or nacked event nothing with its key is sent.

    Attributes:
        rows: all rows, in their order.
        fates: the fates known so far.
        until: the ``time.monotonic()`` after which no further wave is sent, since the lease ends.
    """

    def __init__(
        self,
        publisher: Publisher,
        rows: Sequence[Claimed],
        *,
        ordered: bool,
        until: float = math.inf,
        on_report: Callable[[], None] | None = None,
    ) -> None:
        """Make a batch; :meth:`advance` sends it.

        Args:
            publisher: the publisher of the events.
            rows: the rows, at least one.
            ordered: whether to send in waves.
            until: see the class.
            on_report: a function that is called on any thread when :meth:`advance` may have work.
        """
        self.rows = rows
        self.fates = RowFates()
        self.until = until
        self._publisher = publisher
        self._on_report = on_report
        self._waves = deque(waves(rows) if ordered else [list(rows)])
        self._sent: list[tuple[list[Claimed], Future[PublishReport]]] = []
        self._begun = False
        self._stopped: set[str | None] = set()

    def advance(self) -> bool:
        """Process reports and send the next wave; return whether all rows have their fate.

        Raises:
            UsageError: the publisher is closed; rows without a fate are now unconfirmed.
        """
        try:
            while all(report.done() for _, report in self._sent):
                self._take_in()
                if not self._waves:
                    return True
                self._send_next()
        except UsageError:
            self.abandon()
            raise
        return False

    def wait(self) -> None:
        """Wait for the first report of the wave that was sent."""
        for _, report in self._sent[:1]:
            report.result()

    def abandon(self) -> RowFates:
        """Stop waiting; return the fates known so far, with all other rows as unconfirmed."""
        self._waves.clear()
        self._sent = []
        known = self.fates
        settled = {row.seq for row in known.done}
        settled |= {row.seq for row, _ in (*known.nacked, *known.rejected)}
        known.unconfirmed = [row for row in self.rows if row.seq not in settled]
        return known

    def _take_in(self) -> None:
        for rows, report in self._sent:
            fates = sort_out(rows, report.result())
            self.fates.add(fates)
            failed = [*fates.unconfirmed, *(row for row, _ in fates.nacked)]
            self._stopped.update(row.event.key for row in failed if row.event.key is not None)
        self._sent = []

    def _send_next(self) -> None:
        wave = self._waves.popleft()
        in_time = not self._begun or time.monotonic() < self.until
        self._begun = True
        sendable: list[Claimed] = []
        for row in wave:
            can_send = in_time and row.event.key not in self._stopped
            (sendable if can_send else self.fates.unconfirmed).append(row)
        if sendable:
            self._send(sendable)

    def _send(self, rows: list[Claimed]) -> None:
        try:
            report = self._publisher.submit([row.event for row in rows], keep=False)
        except UsageError:  # the publisher is closed
            raise
        except Exception as error:  # halve the rows to find the one that can't be encoded
            if len(rows) == 1:
                self.fates.rejected.append((rows[0], f"cannot be encoded: {error!r}"))
                return
            half = len(rows) // 2
            self._send(rows[:half])
            self._send(rows[half:])
            return
        if self._on_report is not None:
            on_report = self._on_report
            report.add_done_callback(lambda _: on_report())
        self._sent.append((rows, report))


def publish_in_waves(publisher: Publisher, rows: Sequence[Claimed]) -> RowFates:
    """Publish ``rows`` in order within each key, and return their fates.

    Args:
        publisher: the publisher of the events.
        rows: the rows in their order.

    Raises:
        UsageError: the publisher is closed.
    """
    batch = Batch(publisher, rows, ordered=True)
    while not batch.advance():
        batch.wait()
    return batch.fates
