"""The fates of claimed rows: found in a report, written into the table."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from outbox.errors import BrokerError, Nacked
from outbox.report import PublishReport, Withdrawn
from outbox.storage.store import Claimed, Store

__all__ = ["RowFates", "sort_out", "write_fates"]

logger = logging.getLogger("outbox.sql")

_REFUSED = (1.0, 60.0)  # seconds until a refused event is tried again: the first time, and at most


@dataclass
class RowFates:
    """The fates of claimed rows: each is in one list.

    Attributes:
        done: the broker answers for them, or ignored them as it should: they can go.
        left: not confirmed, by no fault of theirs; to be published again.
        refused: the broker would not have them for now, each with the reason.
        rejected: never to be published, each with the reason.
        parked: how many of ``done`` are among the parked.
        error: why some are left, or None.
    """

    done: list[Claimed] = field(default_factory=list)
    left: list[Claimed] = field(default_factory=list)
    refused: list[tuple[Claimed, str]] = field(default_factory=list)
    rejected: list[tuple[Claimed, str]] = field(default_factory=list)
    parked: int = 0
    error: BrokerError | None = None

    def add(self, other: RowFates) -> None:
        """Add the fates of other rows."""
        self.done += other.done
        self.left += other.left
        self.refused += other.refused
        self.rejected += other.rejected
        self.parked += other.parked
        self.error = self.error or other.error


def sort_out(rows: Sequence[Claimed], report: PublishReport) -> RowFates:
    """Return the fates of ``rows``, whose events were published together, from their report."""
    if len(report.published) == len(rows):
        return RowFates(done=list(rows))
    by_event = {id(row.event): row for row in rows}  # by identity: equal ones may be two rows
    nacked = isinstance(report.error, Nacked)
    fates = RowFates(parked=len(report.parked), error=None if nacked else report.error)
    for event in (*report.published, *report.parked, *report.ignored):
        fates.done.append(by_event[id(event)])
    for one in report.rejected:
        row = by_event[id(one.event)]
        if not isinstance(one, Withdrawn):
            fates.rejected.append((row, one.reason))
        elif nacked:
            fates.refused.append((row, str(report.error)))
        else:
            fates.left.append(row)
    return fates


def write_fates(store: Store, fates: RowFates) -> None:
    """Write the fates of rows into the table, each kind in one statement where that can be.

    What is written leaves ``fates``: after an error of the database it can be called again.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the database is away, or would not.
    """
    if fates.done:
        store.complete(fates.done)
        fates.done = []
    if fates.left:
        store.release(fates.left)
        fates.left = []
    while fates.refused:
        row, reason = fates.refused[0]
        alike, others = _split(fates.refused, reason, row.attempts)
        delay = min(_REFUSED[0] * 2 ** min(row.attempts, 10), _REFUSED[1])
        store.release(alike, delay, reason=reason, failed=True)
        fates.refused = others
    while fates.rejected:
        _, reason = fates.rejected[0]
        alike, others = _split(fates.rejected, reason)
        store.bury(alike, reason)
        logger.error("%d event(s) can never be published, %r", len(alike), reason)
        fates.rejected = others


def _split(
    pairs: Iterable[tuple[Claimed, str]], reason: str, attempts: int | None = None
) -> tuple[list[Claimed], list[tuple[Claimed, str]]]:
    """Return the rows that have this reason, and as many attempts if given; and the other pairs."""
    alike, others = [], []
    for row, why in pairs:
        if why == reason and attempts in (None, row.attempts):
            alike.append(row)
        else:
            others.append((row, why))
    return alike, others
