"""The table of stored events, and ``metadata``: all tables, for migrations."""

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
"""The supported databases: outbox is tested with these."""

GRACE = 1.0
"""The seconds for which relays leave a new row to the process that stored it."""

metadata = MetaData()


def _table(metadata: MetaData, grace: float) -> Table:
    """Return the table, whose new rows are due ``grace`` seconds after they are written."""
    # Debezium's outbox event router reads the first five columns. The timestamps are defaults of
    # the columns instead of values in the rows: so they come from the database's clock, and a
    # session's flush still writes all rows in one statement.
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
"""The same table, for new rows that become due only after :data:`GRACE`."""

_alive = events.c.dead_at.is_(null())
# The due rows in the order in which they are claimed: a claim reads neither dead rows nor rows
# that are scheduled for later.
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
# Finds out which event is the first of its key.
Index(
    "outbox_events_key",
    events.c.key,
    events.c.seq,
    postgresql_where=_keyed_and_alive,
    sqlite_where=_keyed_and_alive,
)


def ddl(dialect: str) -> str:
    """Return the statements that create the tables, for ``dialect``.

    Raises:
        UsageError: ``dialect`` is not in :data:`DIALECTS`.
    """
    if dialect not in DIALECTS:
        raise UsageError(f"unknown dialect {dialect!r}; use one of {', '.join(DIALECTS)}")
    try:
        chosen = registry.load(dialect)()
    except NoSuchModuleError as error:
        raise UsageError(f"SQLAlchemy has no dialect {dialect!r}") from error
    statements: list[ExecutableDDLElement] = []
    for table in metadata.sorted_tables:
        indexes = sorted(table.indexes, key=lambda index: str(index.name))
        statements += [CreateTable(table), *map(CreateIndex, indexes)]
    return "".join(f"{str(stmt.compile(dialect=chosen)).strip()};\n" for stmt in statements)
