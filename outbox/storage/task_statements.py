"""Statements on the rows of single tasks: whether one waits, and taking it away."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ColumnElement, Engine, and_, delete, func, select

from outbox.messages.headers import DEAD_REASON, PARKED_REASON, TASK
from outbox.storage.schema import events, exists, has_header
from outbox.storage.transactions import READS_ONLY, own_transaction

__all__ = ["count_waiting", "delete_waiting"]


def _waits(event_id: str) -> ColumnElement[bool]:
    row = events.c
    return and_(
        row.id == event_id,
        row.dead_at.is_(None),
        # After its lease has ended, its worker may still be at it.
        row.lease_token.is_(None),
        has_header(TASK),
        ~has_header(DEAD_REASON),
        ~has_header(PARKED_REASON),
    )


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
