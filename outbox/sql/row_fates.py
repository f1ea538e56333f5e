"""The fates of claimed rows, and how they are written to the table."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from outbox.errors import BrokerError, Nacked
from outbox.report import PublishReport, Withdrawn
from outbox.storage.failures import DatabaseError, reason_of
from outbox.storage.store import Claimed, Store

__all__ = ["RowFates", "sort_out", "write_fates"]

logger = logging.getLogger("outbox.sql")

_reported: set[str] = set()
"""Why events weren't kept, as far as the log has it."""

_NACKED = (1.0, 60.0)  # seconds until a nacked event is retried: the first time, and at most


@dataclass
class RowFates:
    """The fates of claimed rows: each is in one list.

    Attributes:
        done: rows whose events were confirmed, or ignored as unroutable; they can be deleted.
        unconfirmed: rows without an answer from the broker, through no fault of their events; to
            publish again soon.
        nacked: rows whose events the broker nacked, each with the reason; to publish again later.
        rejected: rows whose events can't be published, each with the reason.
        parked: the number of ``done`` events that were parked.
        error: the reason for unconfirmed rows, or None.
    """

    done: list[Claimed] = field(default_factory=list)
    unconfirmed: list[Claimed] = field(default_factory=list)
    nacked: list[tuple[Claimed, str]] = field(default_factory=list)
    rejected: list[tuple[Claimed, str]] = field(default_factory=list)
    parked: int = 0
    error: BrokerError | None = None

    def add(self, other: RowFates) -> None:
        """Add the fates of other rows."""
        self.done += other.done
        self.unconfirmed += other.unconfirmed
        self.nacked += other.nacked
        self.rejected += other.rejected
        self.parked += other.parked
        self.error = self.error or other.error


def sort_out(rows: Sequence[Claimed], report: PublishReport) -> RowFates:
    """Return the fates of ``rows``, whose events were published together, from their report."""
    if len(report.published) == len(rows):
        return RowFates(done=list(rows))
    by_event = {id(row.event): row for row in rows}  # by identity: two rows may have equal events
    nacked = isinstance(report.error, Nacked)
    fates = RowFates(parked=len(report.parked), error=None if nacked else report.error)
    for event in (*report.published, *report.parked, *report.ignored):
        fates.done.append(by_event[id(event)])
    for rejection in report.rejected:
        row = by_event[id(rejection.event)]
        if not isinstance(rejection, Withdrawn):
            fates.rejected.append((row, rejection.reason))
        elif nacked:
            fates.nacked.append((row, str(report.error)))
        else:
            fates.unconfirmed.append(row)
    return fates


def write_fates(store: Store, fates: RowFates, keep: float = 0.0) -> None:
    """Write the fates of rows to the table, if possible with one statement per kind.

    Fates that are written are removed from ``fates``, so after a database error this can be
    called again.

    Args:
        store: the store.
        fates: the fates.
        keep: the seconds for which published rows are kept; 0 if they aren't.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the database is unavailable, or the statement failed.
    """
    if fates.done:
        _complete(store, fates.done, keep)
        fates.done = []
    if fates.unconfirmed:
        store.release(fates.unconfirmed)
        fates.unconfirmed = []
    while fates.nacked:
        row, reason = fates.nacked[0]
        alike, others = _split(fates.nacked, reason, row.attempts)
        delay = min(_NACKED[0] * 2 ** min(row.attempts, 10), _NACKED[1])
        store.release(alike, delay, reason=reason, failed=True)
        fates.nacked = others
    while fates.rejected:
        _, reason = fates.rejected[0]
        alike, others = _split(fates.rejected, reason)
        store.bury(alike, reason)
        logger.error("burying %d event(s) that cannot be published: %r", len(alike), reason)
        fates.rejected = others


def _complete(store: Store, rows: Sequence[Claimed], keep: float) -> None:
    try:
        store.complete(rows, keep=keep)
    except DatabaseError as error:
        if not keep:
            raise
        # As when the table is missing, or the role has no right to it. Rows that stayed where they
        # are would be published again and again.
        store.complete(rows)
        reason = reason_of(error)
        if reason not in _reported:
            _reported.add(reason)
            logger.error("published events are deleted, and not kept: %s", reason)


def _split(
    pairs: Iterable[tuple[Claimed, str]], reason: str, attempts: int | None = None
) -> tuple[list[Claimed], list[tuple[Claimed, str]]]:
    """Return the rows with this reason (and number of attempts, if given), and the other pairs."""
    alike, others = [], []
    for row, why in pairs:
        if why == reason and attempts in (None, row.attempts):
            alike.append(row)
        else:
            others.append((row, why))
    return alike, others
