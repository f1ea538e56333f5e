"""Claimed rows on their way to the broker: all at once, or in waves that keep the order of keys."""

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
    """Return ``rows`` in groups that keep their order, each with one event of a key at most."""
    found: list[list[Claimed]] = []
    seen: Counter[str] = Counter()
    for row in rows:
        number = 0
        if row.event.key is not None:
            number = seen[row.event.key]
            seen[row.event.key] += 1
        if number == len(found):
            found.append([])
        found[number].append(row)
    return found


class Batch:
    """Rows of one claim that are being published. Not thread-safe.

    Ordered, they leave in waves: one is confirmed before the next is sent, and of a key nothing is
    sent after what was not confirmed.

    Attributes:
        rows: all of them, in their order.
        fates: what is known of them so far.
        until: no further wave is sent after that, by ``time.monotonic()``: a lease ends some time.
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
        """Nothing is sent before :meth:`advance`.

        Args:
            publisher: of the events.
            rows: at least one.
            ordered: whether in waves.
            until: see above.
            on_report: called on any thread when :meth:`advance` may have something to do.
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
        """Take in what is reported, and send what is next; return whether all have their fate.

        Raises:
            UsageError: the publisher is closed; what it has not confirmed is left.
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
        """Wait for the report of what was sent first."""
        for _, report in self._sent[:1]:
            report.result()

    def abandon(self) -> RowFates:
        """Return the fates known so far, and all others as left: who waited does so no more."""
        self._waves.clear()
        self._sent = []
        known = self.fates
        settled = {row.seq for row in known.done}
        settled |= {row.seq for row, _ in (*known.refused, *known.rejected)}
        known.left = [row for row in self.rows if row.seq not in settled]
        return known

    def _take_in(self) -> None:
        for rows, report in self._sent:
            found = sort_out(rows, report.result())
            self.fates.add(found)
            failed = [*found.left, *(row for row, _ in found.refused)]
            self._stopped.update(row.event.key for row in failed if row.event.key is not None)
        self._sent = []

    def _send_next(self) -> None:
        wave = self._waves.popleft()
        in_time = not self._begun or time.monotonic() < self.until
        self._begun = True
        going: list[Claimed] = []
        for row in wave:
            goes = in_time and row.event.key not in self._stopped
            (going if goes else self.fates.left).append(row)
        if going:
            self._send(going)

    def _send(self, rows: list[Claimed]) -> None:
        try:
            report = self._publisher.submit([row.event for row in rows], keep=False)
        except UsageError:  # the publisher is closed
            raise
        except Exception as error:  # one cannot be encoded: it must not hold up the others
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
    """Publish ``rows`` so that those of one key arrive in order, and return what became of them.

    Args:
        publisher: of the events.
        rows: in their order.

    Raises:
        UsageError: the publisher is closed.
    """
    batch = Batch(publisher, rows, ordered=True)
    while not batch.advance():
        batch.wait()
    return batch.fates
