"""Counts the rows of a table that may be very large: by index, and no further than to a limit."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from sqlalchemy import (
    BigInteger,
    Connection,
    Integer,
    Select,
    String,
    bindparam,
    func,
    select,
    text,
    true,
)

from outbox.storage.clock import now, seconds_since
from outbox.storage.schema import dialect_of, events
from outbox.storage.statements import NEVER, statements
from outbox.storage.upkeep import published_rows

__all__ = ["AT_MOST", "QueueStatus", "Status", "count"]

AT_MOST = 10_000
"""The rows of one kind up to which they are counted by default."""

_ALL = 1 << 62

_QUEUE = bindparam("of_queue", type_=String)
_RANK = bindparam("of_rank", type_=Integer)
_LIMIT = bindparam("at_most", type_=BigInteger)


@dataclass(frozen=True, slots=True)
class QueueStatus:
    """The numbers of alive rows in one queue.

    Attributes:
        waiting: rows that are due and not leased.
        scheduled: rows that become due later: delayed, or backing off.
        leased: rows that are being published or processed.
        oldest: the seconds since the oldest waiting event was stored; None if none waits.
        waiting_is_complete: whether all waiting rows were counted.
        later_is_complete: whether all others were.
    """

    waiting: int = 0
    scheduled: int = 0
    leased: int = 0
    oldest: float | None = None
    waiting_is_complete: bool = True
    later_is_complete: bool = True

    @property
    def is_complete(self) -> bool:
        """Whether all rows were counted."""
        return self.waiting_is_complete and self.later_is_complete

    @property
    def total(self) -> int:
        """The number of alive rows."""
        return self.waiting + self.scheduled + self.leased

    def __add__(self, other: QueueStatus) -> QueueStatus:
        ages = [age for age in (self.oldest, other.oldest) if age is not None]
        return QueueStatus(
            self.waiting + other.waiting,
            self.scheduled + other.scheduled,
            self.leased + other.leased,
            max(ages, default=None),
            self.waiting_is_complete and other.waiting_is_complete,
            self.later_is_complete and other.later_is_complete,
        )


@dataclass(frozen=True, slots=True)
class Status:
    """The numbers of rows in the table. Where not all were counted, a number means at least that.

    Attributes:
        by_queue: those of the alive rows, by queue; ``""`` for the relay. Without empty queues.
        dead: dead rows by reason, the most frequent first.
        dead_is_complete: whether all dead rows were counted.
        kept: the number of rows that stay for a while after they were published or processed.
        kept_is_complete: whether all of those were counted.
    """

    by_queue: Mapping[str, QueueStatus]
    dead: dict[str, int]
    dead_is_complete: bool = True
    kept: int = 0
    kept_is_complete: bool = True

    @property
    def alive(self) -> QueueStatus:
        """The numbers of alive rows in all queues."""
        return sum(self.by_queue.values(), QueueStatus())

    @property
    def waiting(self) -> int:
        """The number of rows that are due and not leased."""
        return self.alive.waiting

    @property
    def scheduled(self) -> int:
        """The number of rows that become due later: delayed, or backing off."""
        return self.alive.scheduled

    @property
    def leased(self) -> int:
        """The number of rows that are being published or processed."""
        return self.alive.leased

    @property
    def oldest(self) -> float | None:
        """The seconds since the oldest waiting event was stored; None if none waits."""
        return self.alive.oldest

    @property
    def queues(self) -> dict[str, int]:
        """The numbers of alive rows by queue; ``""`` for the relay."""
        return {queue: each.total for queue, each in self.by_queue.items()}

    @property
    def is_complete(self) -> bool:
        """Whether all rows were counted."""
        return self.dead_is_complete and self.kept_is_complete and self.alive.is_complete


def count(connection: Connection, at_most: int | None = AT_MOST) -> Status:
    """Count the rows of each queue, and the dead ones.

    Args:
        connection: the connection, in READ COMMITTED.
        at_most: where to stop: how many rows are counted of those that wait with one priority in
            one queue, of those that don't yet, and of the dead. None counts them all, which reads
            the whole table.
    """
    limit = _ALL if at_most is None else at_most
    dialect = dialect_of(connection.dialect.name) or ""
    queues = connection.execute(_queues(dialect)).scalars().all()
    sql = statements(dialect)
    ranks: list[Any] = []
    if queues:
        ranks = list(connection.execute(sql.firsts_of_ranks, {"queues": sql.names(queues)}))
        ranks.sort(key=attrgetter("queue", "rank"))
    by_queue: dict[str, QueueStatus] = {}
    for queue, of_queue in itertools.groupby(ranks, key=attrgetter("queue")):
        total = QueueStatus()
        for each in of_queue:
            if each.due_at is not None and each.due_at < NEVER:
                total += _count_rank(connection, dialect, queue, each.rank, limit)
        if total.total:
            by_queue[queue] = total
    dead = _count_dead(connection, dialect, ranks, limit)
    kept = published_rows.count(connection, limit)
    return Status(by_queue, dead, sum(dead.values()) < limit, kept, kept < limit)


def _count_rank(
    connection: Connection, dialect: str, queue: str, rank: int, limit: int
) -> QueueStatus:
    # In one statement, so that a row which is claimed meanwhile is counted once.
    parameters = {"of_queue": queue, "of_rank": rank, "at_most": limit}
    counts = connection.execute(_of_rank(dialect), parameters).one()
    return QueueStatus(
        counts.waiting,
        counts.later - counts.leased,
        counts.leased,
        None if counts.oldest is None else max(0.0, float(counts.oldest)),
        counts.waiting < limit,
        counts.later < limit,
    )


def _count_dead(
    connection: Connection, dialect: str, ranks: list[Any], limit: int
) -> dict[str, int]:
    parameters: dict[str, Any] = {"at_most": limit}
    if dialect == "mariadb":
        if not ranks:
            return {}
        parameters["queues"] = list({each.queue for each in ranks})
        parameters["ranks"] = list({each.rank for each in ranks})
    counts = connection.execute(_dead(dialect), parameters)
    return {reason or "": number for reason, number in counts}


@functools.cache
def _queues(dialect: str) -> Select[Any]:
    """The queues that have rows, on MariaDB also dead ones."""
    queue = events.c.queue
    if dialect == "mariadb":  # which jumps from group to group
        return statements(dialect).by_due(select(queue).group_by(queue))
    alive = events.c.dead_at.is_(None)
    queues = select(func.min(queue).label("queue")).where(alive).cte("queues", recursive=True)
    following = select(func.min(queue)).where(queue > queues.c.queue, alive).scalar_subquery()
    queues = queues.union_all(select(following).where(queues.c.queue.is_not(None)))
    return select(queues.c.queue).where(queues.c.queue.is_not(None))


@functools.cache
def _of_rank(dialect: str) -> Select[Any]:
    """Of the rows with ``of_rank`` in ``of_queue``, the numbers, each up to ``at_most``."""
    row, by_due = events.c, statements(dialect).by_due
    of_rank = (row.queue == _QUEUE, row.rank == _RANK, row.dead_at.is_(None))
    in_order = (row.available_at, row.seq)
    due = select(row.stored_at).where(*of_rank, row.available_at <= now())
    due_later = select(row.lease_token).where(
        *of_rank,
        row.available_at > now(),
        # Not those in MariaDB's index of what is due that are dead.
        row.available_at < NEVER,
    )
    waiting = by_due(due.order_by(*in_order).limit(_LIMIT)).subquery("due")
    # What is leased is due soon, and so it is counted before what is scheduled for later.
    later = by_due(due_later.order_by(*in_order).limit(_LIMIT)).subquery("due_later")
    first = select(
        func.count().label("waiting"), seconds_since(func.min(waiting.c.stored_at)).label("oldest")
    ).select_from(waiting)
    second = select(
        func.count().label("later"), func.count(later.c.lease_token).label("leased")
    ).select_from(later)
    of_due, of_later = first.subquery("of_due"), second.subquery("of_later")
    return select(of_due, of_later).select_from(of_due.join(of_later, true()))


@functools.cache
def _dead(dialect: str) -> Select[Any]:
    """The dead rows by reason, up to ``at_most`` of them."""
    row = events.c
    those = select(row.reason).where(row.dead_at.is_not(None)).limit(_LIMIT)
    if dialect == "mariadb":  # where no index has a condition, but the dead are due last
        those = statements(dialect).by_due(
            those.where(
                row.queue.in_(bindparam("queues", type_=String, expanding=True)),
                row.rank.in_(bindparam("ranks", type_=Integer, expanding=True)),
                row.available_at >= NEVER,
            )
        )
    dead = those.subquery("dead")
    return (
        select(dead.c.reason, func.count().label("count"))
        .group_by(dead.c.reason)
        .order_by(text("2 DESC"), dead.c.reason)
    )
