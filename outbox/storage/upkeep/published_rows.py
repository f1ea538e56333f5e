"""The table of what was published or processed, for those who want to look at it for a while.

Rows move there from the table of events, in the transaction that would have deleted them: so no
claim ever reads past them, and their number and their vacuuming don't matter to it.
"""

from __future__ import annotations

import functools
from typing import Any

from sqlalchemy import (
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Float,
    Identity,
    Index,
    Insert,
    Integer,
    MetaData,
    Select,
    Table,
    bindparam,
    delete,
    func,
    insert,
    select,
)

from outbox.errors import UsageError
from outbox.storage.clock import Timestamp, in_seconds, now
from outbox.storage.schema import MARIADB_OPTIONS, events, exists, for_migrations

__all__ = ["check", "count", "moving", "published", "purge"]

_WITHOUT = ("seq", "available_at", "lease_token", "dead_at", "reason")
_CARRIED = [column for column in events.columns if column.name not in _WITHOUT]

published = Table(
    "outbox_published",
    MetaData(),
    # Not that of the row in the table of events: SQLite uses those again.
    Column(
        "number",
        BigInteger().with_variant(Integer, "sqlite"),
        Identity(always=False),
        primary_key=True,
        autoincrement=True,
    ),
    *(Column(each.name, each.type, nullable=each.nullable) for each in _CARRIED),
    Column("published_at", Timestamp, nullable=False),
    Column("kept_until", Timestamp, nullable=False),
    **MARIADB_OPTIONS,
)
Index("outbox_published_kept", published.c.kept_until)
for_migrations(published)


def check(connection: Connection) -> None:
    """Check that the table exists.

    Raises:
        UsageError: it doesn't.
    """
    if not exists(connection, published):
        raise UsageError(
            f"the table {published.name} does not exist, which keep_published needs; add it with "
            "`outbox sql upgrade`, or with your migrations (outbox.sql.metadata, `outbox sql ddl`)"
        )


def moving(condition: ColumnElement[bool]) -> Insert:
    """Return the statement that copies rows of events for ``seconds``, and locks them.

    The rows are to be deleted in the same transaction.
    """
    copied = [column.name for column in _CARRIED]
    kept_until: Any = in_seconds(bindparam("seconds", type_=Float))
    rows = select(*_CARRIED, now(), kept_until).where(condition).order_by(events.c.seq)
    return insert(published).from_select(
        [*copied, "published_at", "kept_until"], rows.with_for_update(), include_defaults=False
    )


def purge(connection: Connection, limit: int) -> int:
    """Delete up to ``limit`` rows whose time is over; return how many."""
    # Two processes that do this at the same time take different rows.
    numbers = connection.execute(_over(), {"at_most": limit}).scalars().all()
    if numbers:
        connection.execute(delete(published).where(published.c.number.in_(numbers)))
    return len(numbers)


def count(connection: Connection, at_most: int) -> int:
    """Return the number of rows, at most ``at_most``; 0 if the table doesn't exist."""
    if not exists(connection, published):
        return 0
    rows = select(published.c.number).limit(at_most).subquery()
    return int(connection.execute(select(func.count()).select_from(rows)).scalar_one())


@functools.cache
def _over() -> Select[Any]:
    row = published.c
    return (
        select(row.number)
        .where(row.kept_until < now())
        .order_by(row.kept_until)
        .limit(bindparam("at_most", type_=Integer))
        .with_for_update(skip_locked=True)
    )
