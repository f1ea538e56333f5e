"""The table of stored events; ``metadata``, which has all tables, is for migrations."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    Column,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    literal,
    null,
    text,
)
from sqlalchemy.dialects import registry
from sqlalchemy.exc import NoSuchModuleError
from sqlalchemy.schema import CreateIndex, CreateTable, ExecutableDDLElement

from outbox.errors import UsageError
from outbox.storage.clock import Timestamp, in_seconds, now

__all__ = ["DIALECTS", "GRACE", "ddl", "events", "events_with_grace", "metadata"]

DIALECTS = ("postgresql", "sqlite")
"""The databases for which stored events have been built and tested."""

GRACE = 1.0
"""Seconds that relays leave to the process that has stored an event to publish it itself."""

metadata = MetaData()


def _table(metadata: MetaData, grace: float) -> Table:
    """Return the table, whose new rows are due ``grace`` seconds after they were written."""
    # The first five columns are those that Debezium's outbox event router reads. The defaults are
    # of the column and not of a row: the clock is the database's, and the rows of a flush of a
    # session still go into one statement.
    return Table(
        "outbox_events",
        metadata,
        Column("id", String(255), nullable=False),
        Column("aggregatetype", String(255), nullable=False),
        Column("aggregateid", String(255), nullable=False),
        Column("type", String(255), nullable=False),
        Column("payload", LargeBinary, nullable=False),
        Column(
            "seq",
            BigInteger().with_variant(Integer, "sqlite"),
            primary_key=True,
            autoincrement=True,
        ),
        Column("queue", String(255), nullable=False, server_default=""),
        Column("exchange", String(255), nullable=False),
        Column("content_type", String(255), nullable=False),
        Column("headers", Text),
        Column("key", String(255)),
        Column("priority", SmallInteger),
        Column("rank", SmallInteger, nullable=False, server_default=text("0")),
        Column("unroutable", String(10)),
        Column("occurred_at", Timestamp, nullable=False),
        Column("stored_at", Timestamp, nullable=False, default=now()),
        Column(
            "available_at",
            Timestamp,
            nullable=False,
            default=in_seconds(literal(grace)) if grace else now(),
        ),
        Column("lease_token", String(36)),
        Column("deliveries", Integer, nullable=False, server_default=text("0")),
        Column("attempts", Integer, nullable=False, server_default=text("0")),
        Column("dead_at", Timestamp),
        Column("reason", Text),
    )


events = _table(metadata, 0.0)
events_with_grace = _table(MetaData(), GRACE)
"""The same table, for rows that relays leave alone for a moment after they were written."""

_alive = events.c.dead_at.is_(null())
# What is due, in the order in which it is claimed: neither the dead nor what is for later are
# looked at on the way.
Index(
    "outbox_events_due",
    events.c.queue,
    events.c.rank,
    events.c.available_at,
    events.c.seq,
    postgresql_where=_alive,
    sqlite_where=_alive,
)
_keyed_and_alive = events.c.key.is_not(null()) & _alive
# Which event is the first of its key.
Index(
    "outbox_events_key",
    events.c.key,
    events.c.seq,
    postgresql_where=_keyed_and_alive,
    sqlite_where=_keyed_and_alive,
)


def ddl(dialect: str) -> str:
    """Return the statements that make the table, for ``dialect``.

    Raises:
        UsageError: it is none of :data:`DIALECTS`.
    """
    if dialect not in DIALECTS:
        raise UsageError(f"the dialect {dialect!r} is none of {', '.join(DIALECTS)}")
    try:
        chosen = registry.load(dialect)()
    except NoSuchModuleError as error:
        raise UsageError(f"SQLAlchemy does not know the dialect {dialect!r}") from error
    statements: list[ExecutableDDLElement] = []
    for table in metadata.sorted_tables:
        indexes = sorted(table.indexes, key=lambda index: str(index.name))
        statements += [CreateTable(table), *map(CreateIndex, indexes)]
    return "".join(f"{str(one.compile(dialect=chosen)).strip()};\n" for one in statements)
