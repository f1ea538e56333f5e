"""What becomes of claimed rows when they are published."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from outbox.errors import BrokerError
from outbox.publisher import Publisher
from outbox.report import PublishReport, Withdrawn
from outbox.sql.store import Claimed

__all__ = ["Outcome", "publish_in_waves", "sort_out", "waves"]


@dataclass
class Outcome:
    """The fates of claimed rows.

    Attributes:
        done: the broker answers for them, or ignored them as it should: they can go.
        left: not confirmed; to be published again.
        rejected: never to be published, each with the reason.
        error: why some are left, or None.
    """

    done: list[Claimed] = field(default_factory=list)
    left: list[Claimed] = field(default_factory=list)
    rejected: list[tuple[Claimed, str]] = field(default_factory=list)
    error: BrokerError | None = None

    def add(self, other: Outcome) -> None:
        """Add the fates of other rows."""
        self.done += other.done
        self.left += other.left
        self.rejected += other.rejected
        self.error = self.error or other.error


def sort_out(rows: Iterable[Claimed], report: PublishReport) -> Outcome:
    """Return the fates of ``rows``, whose events were published together, from their report."""
    by_event = {id(row.event): row for row in rows}  # by identity: equal ones may be two rows
    outcome = Outcome(error=report.error)
    for event in (*report.published, *report.parked, *report.ignored):
        outcome.done.append(by_event[id(event)])
    for one in report.rejected:
        row = by_event[id(one.event)]
        if isinstance(one, Withdrawn):
            outcome.left.append(row)
        else:
            outcome.rejected.append((row, one.reason))
    return outcome


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


def publish_in_waves(
    publisher: Publisher, rows: Sequence[Claimed], *, until: float = math.inf
) -> Outcome:
    """Publish ``rows`` so that those of one key arrive in order, and return what became of them.

    One wave is confirmed before the next is sent; of a key, nothing is sent after what failed.

    Args:
        publisher: of the events.
        rows: in their order.
        until: no wave is sent after that, by ``time.monotonic()``: a lease ends some time.

    Raises:
        UsageError: the publisher is closed.
    """
    outcome = Outcome()
    stopped: set[str | None] = set()
    for number, wave in enumerate(waves(rows)):
        in_time = not number or time.monotonic() < until
        going = [row for row in wave if in_time and row.event.key not in stopped]
        outcome.left += [row for row in wave if not in_time or row.event.key in stopped]
        if not going:
            continue
        report = publisher.submit([row.event for row in going], keep=False).result()
        found = sort_out(going, report)
        outcome.add(found)
        stopped.update(row.event.key for row in found.left if row.event.key is not None)
    return outcome
