"""Statements on the rows of tasks: whether one waits, taking it away, and all that wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import ColumnElement, Engine, Select, and_, delete, func, or_, select

from outbox.errors import UsageError
from outbox.messages.headers import DEAD_REASON, PARKED_REASON, TASK
from outbox.storage.schema import events, exists, has_header
from outbox.storage.transactions import READS_ONLY, own_transaction, reading

__all__ = ["count_waiting", "delete_waiting", "waiting_tasks"]

_AT_ONCE = 1000

_is_waiting = and_(
    events.c.dead_at.is_(None),
    # After its lease has ended, its worker may still be at it.
    events.c.lease_token.is_(None),
    has_header(TASK),
    ~has_header(DEAD_REASON),
    ~has_header(PARKED_REASON),
)


def _waits(event_id: str) -> ColumnElement[bool]:
    return and_(events.c.id == event_id, _is_waiting)


def _page(after: tuple[str, int] | None, at_once: int) -> Select[Any]:
    """Return the statement for the rows behind one, which has this id and ``seq``."""
    row = events.c
    page = select(row.seq, row.id, row.type, row.queue, row.headers, row.available_at)
    if after is not None:
        # Ids aren't unique. The first condition is for the index, which has only them.
        id_, seq = after
        page = page.where(row.id >= id_, or_(row.id > id_, row.seq > seq))
    return page.where(_is_waiting).order_by(row.id, row.seq).limit(at_once)


def count_waiting(engine: Engine, event_id: str) -> int:
    """Return how many rows of a task no process has leased."""
    looking = engine.execution_options(**{READS_ONLY: True})
    with own_transaction(looking) as connection:
        if not exists(connection, events):  # nothing has created it yet
            return 0
        found: Any = connection.execute(
            select(func.count()).select_from(events).where(_waits(event_id))
        )
        return int(found.scalar_one())


def delete_waiting(engine: Engine, event_id: str) -> list[Any]:
    """Delete the rows of a task that no process has leased.

    Returns:
        Their columns ``type``, which is the queue that was called, ``headers`` and ``payload``.
    """
    row = events.c
    deletion = delete(events).where(_waits(event_id))
    with own_transaction(engine) as connection:
        if not exists(connection, events):
            return []
        deleted = connection.execute(deletion.returning(row.type, row.headers, row.payload))
        return list(deleted.all())


def waiting_tasks(engine: Engine, *, at_once: int = _AT_ONCE) -> Iterator[Any]:
    """Yield the rows of tasks that no process has leased, due or not, in no useful order.

    Each statement reads a few of them, from where the last one has ended: no transaction stays open
    meanwhile, and memory doesn't grow with their number. They are read by their ids, since the
    index of tasks has these: in the order in which they are due, each statement would have to sort
    all that is left.

    Args:
        engine: the engine.
        at_once: how many rows a statement reads.

    Yields:
        The columns ``seq``, ``id``, ``type``, ``queue``, ``headers`` and ``available_at``.

    Raises:
        UsageError: the table of events is missing.
    """
    with reading(engine) as connection:
        is_there = exists(connection, events)
    if not is_there:
        raise UsageError(
            f"the table {events.name} does not exist; create it with `outbox sql create`, or name "
            "another database"
        )
    last = None
    while True:
        with reading(engine) as connection:
            rows = connection.execute(_page(last, at_once)).all()
        yield from rows
        if len(rows) < at_once:
            return
        last = (rows[-1].id, rows[-1].seq)
