"""The table of recurring tasks, and the statements on it.

A row says whose times it has: the text of a schedule. Workers with that text compete for each tick
with one conditional update, which also says that they are there. Workers with another text leave
the row alone until none of those has been seen for a while: so of two deployments that run side by
side, one counts.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.sql.elements import ColumnElement

from outbox.errors import UsageError
from outbox.messages.headers import TASK
from outbox.storage.clock import now
from outbox.storage.schema import events, exists, has_header
from outbox.storage.schema import recurring as ticks

__all__ = ["TickRow", "add", "advance", "check", "clock", "has_event", "remove", "rows", "see"]

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class TickRow:
    """The row of a recurring task.

    Attributes:
        name: its name.
        schedule: the text of the schedule whose times it has.
        next_at: the time of the next tick.
        last_at: the time of the last one, or None.
        seen_at: when a worker with that schedule was last seen.
    """

    name: str
    schedule: str
    next_at: datetime.datetime
    last_at: datetime.datetime | None
    seen_at: datetime.datetime


def check(connection: Connection) -> None:
    """Check that the table exists.

    Raises:
        UsageError: it doesn't.
    """
    if not exists(connection, ticks):
        raise UsageError(
            f"the table {ticks.name} does not exist; add it with `outbox sql upgrade`, or with "
            "your migrations (outbox.sql.metadata, `outbox sql ddl`)"
        )


def clock(connection: Connection) -> datetime.datetime:
    """Return the database's time, in UTC."""
    moment: datetime.datetime = connection.execute(select(now())).scalar_one()
    return moment.astimezone(datetime.UTC)


def rows(connection: Connection, queue: str) -> dict[str, TickRow]:
    """Return the rows of a queue of tasks, by the tasks' names."""
    found = connection.execute(select(ticks).where(ticks.c.queue == queue).order_by(ticks.c.name))
    return {
        row.name: TickRow(
            row.name,
            row.schedule,
            _moment(row.next_at_us),
            None if row.last_at_us is None else _moment(row.last_at_us),
            _moment(row.seen_at_us),
        )
        for row in found
    }


def add(
    connection: Connection,
    queue: str,
    name: str,
    schedule: str,
    next_at: datetime.datetime,
    seen_at: datetime.datetime,
) -> None:
    """Add the row of a task.

    Raises:
        sqlalchemy.exc.IntegrityError: another worker has.
    """
    values = {"queue": queue, "name": name, "schedule": schedule, **_times(next_at, seen_at)}
    connection.execute(insert(ticks).values(values))


def advance(
    connection: Connection,
    queue: str,
    row: TickRow,
    schedule: str,
    next_at: datetime.datetime,
    seen_at: datetime.datetime,
    *,
    tick: datetime.datetime | None = None,
) -> bool:
    """Move a row on, with the tick at a time, or without; return False if another worker has.

    Args:
        connection: the connection, in the transaction in which the tick's event is written.
        queue: the queue of tasks.
        row: the row as it was read.
        schedule: the text of the schedule that the next time is from.
        next_at: the next time; it differs from the row's.
        seen_at: the present time.
        tick: the time of the tick, or None.
    """
    values: dict[str, Any] = {"schedule": schedule, **_times(next_at, seen_at)}
    if tick is not None:
        values["last_at_us"] = _number(tick)
    as_it_was = (ticks.c.next_at_us == _number(row.next_at)) & (ticks.c.schedule == row.schedule)
    statement = update(ticks).where(_is(queue, row.name), as_it_was).values(values)
    return bool(connection.execute(statement).rowcount)


def see(connection: Connection, queue: str, row: TickRow, seen_at: datetime.datetime) -> None:
    """Note that a worker with the row's schedule is there."""
    statement = (
        update(ticks)
        .where(_is(queue, row.name), ticks.c.schedule == row.schedule)
        .values(seen_at_us=_number(seen_at))
    )
    connection.execute(statement)


def remove(connection: Connection, queue: str, name: str) -> bool:
    """Delete the row of a task; return whether there was one."""
    return bool(connection.execute(delete(ticks).where(_is(queue, name))).rowcount)


def has_event(connection: Connection, queue: str, event_id: str) -> bool:
    """Return whether an event is in a queue, in whatever state but dead."""
    found = select(events.c.seq).where(
        events.c.id == event_id,
        has_header(TASK),  # so that its index is used
        events.c.queue == queue,
        events.c.dead_at.is_(None),
    )
    return connection.execute(found.limit(1)).first() is not None


def _is(queue: str, name: str) -> ColumnElement[bool]:
    return (ticks.c.queue == queue) & (ticks.c.name == name)


def _times(next_at: datetime.datetime, seen_at: datetime.datetime) -> dict[str, int]:
    return {"next_at_us": _number(next_at), "seen_at_us": _number(seen_at)}


def _number(moment: datetime.datetime) -> int:
    return (moment - _EPOCH) // _MICROSECOND


def _moment(number: int) -> datetime.datetime:
    return _EPOCH + number * _MICROSECOND
