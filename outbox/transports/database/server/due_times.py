"""The statements that say when the next event of some queues is due.

They seek in the index, so their cost doesn't grow with the number of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from sqlalchemy import Connection, Select, String, Text, bindparam, func, select
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.sql.elements import ColumnElement

from outbox.storage.clock import seconds_since
from outbox.storage.schema import events

__all__ = ["due_in"]


def due_in(connection: Connection, dialect: str, queues: Sequence[str]) -> float | None:
    """Return the seconds until a row of ``queues`` is due; None if they are empty."""
    age: Any = connection.execute(_STATEMENTS[dialect](), {"queues": list(queues)}).scalar()
    return None if age is None else -float(age)


@functools.cache
def _by_ranks() -> Select[Any]:
    """From rank to rank, the highest first: of each the row that is due first."""

    def highest(queue: ColumnElement[str], *conditions: ColumnElement[bool]) -> Any:
        alive = _of(queue, *conditions, table=lower)
        return alive.with_only_columns(func.max(lower.c.rank)).scalar_subquery()

    lower = events.alias("lower")
    names = func.unnest(bindparam("queues", type_=ARRAY(Text))).column_valued("name")
    ranks = select(names.label("queue"), highest(names).label("rank")).cte("ranks", recursive=True)
    next_rank = highest(ranks.c.queue, lower.c.rank < ranks.c.rank)
    ranks = ranks.union_all(select(ranks.c.queue, next_rank).where(ranks.c.rank.is_not(None)))
    first = _of(ranks.c.queue, events.c.rank == ranks.c.rank)
    due_at = first.with_only_columns(func.min(events.c.available_at)).scalar_subquery()
    return select(seconds_since(func.min(due_at))).select_from(ranks)


@functools.cache
def _by_groups() -> Select[Any]:
    """Of each rank the row that is due first; dead rows are due in the year 9999."""
    # MariaDB jumps from group to group if they are the first columns of an index.
    row = events.c
    firsts = (
        select(func.min(row.available_at).label("due_at"))
        .where(row.queue.in_(bindparam("queues", type_=String, expanding=True)))
        .group_by(row.queue, row.rank)
        .subquery("firsts")
    )
    return select(seconds_since(func.min(firsts.c.due_at)))


def _of(queue: ColumnElement[str], *conditions: ColumnElement[bool], table: Any = events) -> Any:
    """Select from the alive rows of ``queue`` that meet ``conditions``."""
    row = table.c
    return select(row.seq).where(row.queue == queue, row.dead_at.is_(None), *conditions)


_STATEMENTS = {"postgresql": _by_ranks, "mariadb": _by_groups}
