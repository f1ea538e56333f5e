"""The table of stored events, and ``metadata``: all tables, for migrations.

A table exists twice: once with the types that outbox's statements need, and once, in ``metadata``,
with plain types of SQLAlchemy, since a generated migration must run where only SQLAlchemy is
imported. Both create the same columns.
"""

from __future__ import annotations

from sqlalchemy import (
    TIMESTAMP,
    BigInteger,
    Column,
    Connection,
    Float,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    func,
    inspect,
    literal,
    null,
    select,
    text,
)
from sqlalchemy.dialects import registry
from sqlalchemy.exc import NoSuchModuleError
from sqlalchemy.schema import CreateIndex, CreateTable, ExecutableDDLElement

from outbox.errors import UsageError
from outbox.storage.clock import Timestamp, in_seconds, now

__all__ = [
    "DIALECTS",
    "GRACE",
    "create_missing",
    "ddl",
    "events",
    "events_with_grace",
    "for_migrations",
    "metadata",
    "missing",
]

DIALECTS = ("postgresql", "sqlite")
"""The supported databases: outbox is tested with these."""

GRACE = 1.0
"""The seconds for which relays leave a new row to the process that stored it."""

metadata = MetaData()
"""All tables with plain types, for ``create_all`` and for migrations."""

_PLAIN_TIMESTAMP = TIMESTAMP(timezone=True).with_variant(Float(), "sqlite")
_CREATING = 0x6F7574626F78  # "outbox": the advisory lock of those that create tables


def for_migrations(table: Table) -> None:
    """Add a copy of ``table``, with its indexes and with plain types, to :data:`metadata`."""
    for column in table.to_metadata(metadata).columns:
        if isinstance(column.type, Timestamp):
            column.type = _PLAIN_TIMESTAMP


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
            # An identity, not a serial: who may insert needs no right to a sequence.
            Identity(always=False),
            primary_key=True,
            autoincrement=True,
        ),
        Column("queue", String(255), nullable=False, server_default=text("''")),
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


events = _table(MetaData(), 0.0)
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
# Finds the first row of each key, and the next key, without reading the rows between them.
Index(
    "outbox_events_heads",
    events.c.queue,
    events.c.key,
    events.c.seq,
    postgresql_where=_keyed_and_alive,
    sqlite_where=_keyed_and_alive,
)
_unkeyed_and_new = (
    events.c.key.is_(null())
    & _alive
    & (events.c.queue == literal(""))
    & (events.c.deliveries == literal(0))
)
# Finds the relay's due rows without a key behind any number of rows that wait for others of their
# key. Only new rows are in it, so that a claim writes no entry: that would make each 15 % slower.
Index(
    "outbox_events_unkeyed",
    events.c.queue,
    events.c.available_at,
    events.c.seq,
    postgresql_where=_unkeyed_and_new,
    sqlite_where=_unkeyed_and_new,
)
for_migrations(events)


def missing(connection: Connection) -> list[Table | Index]:
    """Return the tables of :data:`metadata`, and the indexes, that the database lacks."""
    inspector = inspect(connection)
    found: list[Table | Index] = []
    for table in metadata.sorted_tables:
        schema = connection.schema_for_object(table)
        if not inspector.has_table(table.name, schema=schema):
            found += [table, *_indexes(table)]
            continue
        known = {index["name"] for index in inspector.get_indexes(table.name, schema=schema)}
        found += [index for index in _indexes(table) if index.name not in known]
    return found


def create_missing(connection: Connection) -> list[str]:
    """Create the tables and indexes that the database lacks; return their names.

    Processes that do this at the same time wait for each other.
    """
    if connection.dialect.name == "postgresql":
        # Without it, all but one would fail: even IF NOT EXISTS sees only what is committed.
        connection.execute(select(func.pg_advisory_xact_lock(_CREATING)))
    lacking = missing(connection)
    for each in lacking:
        if isinstance(each, Table):
            connection.execute(CreateTable(each, if_not_exists=True))
        else:
            connection.execute(CreateIndex(each, if_not_exists=True))
    return [str(each.name) for each in lacking]


def _indexes(table: Table) -> list[Index]:
    return sorted(table.indexes, key=lambda index: str(index.name))


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
        statements += [CreateTable(table), *map(CreateIndex, _indexes(table))]
    return "".join(f"{str(stmt.compile(dialect=chosen)).strip()};\n" for stmt in statements)
