"""The table of stored events, and ``metadata``: all tables, for migrations.

A table exists twice: once with the types that outbox's statements need, and once, in ``metadata``,
with plain types of SQLAlchemy, since a generated migration must run where only SQLAlchemy is
imported. Both create the same columns.

On MariaDB two indexes have other columns, since an index has no condition there. ``metadata`` can't
express that; :func:`metadata_of` can.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    TIMESTAMP,
    BigInteger,
    Column,
    ColumnElement,
    Connection,
    Float,
    Identity,
    Index,
    Insert,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    event,
    insert,
    inspect,
    literal,
    literal_column,
    null,
    text,
)
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement

from outbox.errors import UsageError
from outbox.messages.headers import TASK
from outbox.storage.clock import Timestamp, in_seconds, now

__all__ = [
    "DIALECTS",
    "GRACE",
    "MARIADB_OPTIONS",
    "SCHEMA_VERSION",
    "bindings",
    "dialect_of",
    "events",
    "exists",
    "events_with_grace",
    "filled",
    "for_migrations",
    "full_name",
    "has_header",
    "known_dialect",
    "meta",
    "metadata",
    "metadata_of",
    "presence",
    "recurring",
]

DIALECTS = ("postgresql", "mariadb", "sqlite")
"""The supported databases: outbox is tested with these."""

_ALSO = {"mysql": "mariadb"}

GRACE = 1.0
"""The seconds for which relays leave a new row to the process that stored it."""

metadata = MetaData()
"""All tables with plain types, for ``create_all`` and for migrations."""

_MARIADB = ("mariadb", "mysql")  # SQLAlchemy's names, by the beginning of the URL
_PLAIN_TIMESTAMP = (
    TIMESTAMP(timezone=True)
    .with_variant(Float(), "sqlite")
    .with_variant(mysql.DATETIME(fsp=6), *_MARIADB)
)
# MariaDB's BLOB and TEXT end at 64 KB.
_BYTES = LargeBinary().with_variant(mysql.LONGBLOB(), *_MARIADB)
_TEXT = Text().with_variant(mysql.LONGTEXT(), *_MARIADB)

MARIADB_OPTIONS: dict[str, Any] = {
    f"{name}_{option}": value
    for name in _MARIADB
    for option, value in (
        ("engine", "InnoDB"),
        ("charset", "utf8mb4"),
        # By default "mail", "Mail" and "mail " would be one queue, one key, one id.
        ("collate", "utf8mb4_nopad_bin"),
    )
}
"""The options of every table on MariaDB; the others ignore them."""

SCHEMA_VERSION = 1
"""The version of the tables, in ``outbox_meta``. Tables only ever get more columns and indexes."""


class _contains(FunctionElement[bool]):
    """Whether a text contains another one, in words that an index's condition may have."""

    inherit_cache = True


@compiles(_contains, "postgresql")
def _(element: _contains, compiler: SQLCompiler, **options: Any) -> str:
    text, part = (compiler.process(each, **options) for each in element.clauses)
    return f"strpos({text}, {part}) > 0"


@compiles(_contains)
def _(element: _contains, compiler: SQLCompiler, **options: Any) -> str:
    text, part = (compiler.process(each, **options) for each in element.clauses)
    return f"instr({text}, {part}) > 0"


class _random_id(FunctionElement[str]):
    """A new id, made by the database."""

    inherit_cache = True


@compiles(_random_id, "postgresql")
def _(element: _random_id, compiler: SQLCompiler, **_: Any) -> str:
    return "gen_random_uuid()"


@compiles(_random_id, *_MARIADB)
def _(element: _random_id, compiler: SQLCompiler, **_: Any) -> str:
    return "UUID()"


@compiles(_random_id, "sqlite")
def _(element: _random_id, compiler: SQLCompiler, **_: Any) -> str:
    return "lower(hex(randomblob(16)))"


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
        Column("payload", _BYTES, nullable=False),
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
        Column("headers", _TEXT),
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
        Column("reason", _TEXT),
        **MARIADB_OPTIONS,
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


def has_header(name: str) -> ColumnElement[bool]:
    """Return the condition that an event has a header of this name, or one that contains it."""
    # A literal: the condition of an index matches no parameter.
    return _contains(events.c.headers, literal_column(f"'\"{name}\"'"))


# Finds a task by its id; no other event is in it, or pays for it.
Index(
    "outbox_events_tasks",
    events.c.id,
    postgresql_where=has_header(TASK),
    sqlite_where=has_header(TASK),
)
_dead = events.c.dead_at.is_not(null())
# Finds the dead rows, of which there are few, without reading the others.
Index("outbox_events_dead", events.c.seq, postgresql_where=_dead, sqlite_where=_dead)
for_migrations(events)

bindings = Table(
    "outbox_bindings",
    MetaData(),
    Column("queue", String(255), primary_key=True),
    Column("exchange", String(255), primary_key=True),
    Column("pattern", String(255), primary_key=True),
    sqlite_with_rowid=False,
    **MARIADB_OPTIONS,
)
"""Which queues get which events, where the database is the broker."""
for_migrations(bindings)

# Times are microseconds since the epoch: they are compared for equality, in every database.
recurring = Table(
    "outbox_recurring",
    MetaData(),
    Column("queue", String(255), primary_key=True),
    Column("name", String(255), primary_key=True),
    Column("schedule", _TEXT, nullable=False),
    Column("next_at_us", BigInteger, nullable=False),
    Column("last_at_us", BigInteger),
    Column("seen_at_us", BigInteger, nullable=False),
    **MARIADB_OPTIONS,
)
"""The recurring tasks, where the database is the broker."""
for_migrations(recurring)

# Without an index on the time: so PostgreSQL updates a row in place, and there are few.
presence = Table(
    "outbox_presence",
    MetaData(),
    Column("process", String(32), primary_key=True),
    Column("announcement", _TEXT, nullable=False),
    Column("announced_at", Timestamp, nullable=False),
    **MARIADB_OPTIONS,
)
"""What processes announce of themselves, where a database on a server is the broker."""
for_migrations(presence)

meta = Table(
    "outbox_meta",
    MetaData(),
    Column("id", String(36), primary_key=True),
    Column("schema_version", Integer, nullable=False),
    **MARIADB_OPTIONS,
)
"""One row: the identity of the tables, whatever URL leads to them, and their version."""


def filled(table: Table) -> Insert:
    """Return the statement that writes the row of ``table``, which is :data:`meta` or a copy."""
    version: ColumnElement[int] = literal_column(str(SCHEMA_VERSION))
    return insert(table).values(id=_random_id(), schema_version=version).inline()


@event.listens_for(meta, "after_create", propagate=True)  # to copies
def _fill(table: Table, connection: Connection, **_: Any) -> None:
    connection.execute(filled(table))


for_migrations(meta)

# An index has no condition here, so it has columns in its place. Dead rows leave the index of what
# is due otherwise: they are due in the year 9999.
_MARIADB_INDEXES = {
    "outbox_events_heads": ("queue", "key", "dead_at", "seq"),
    "outbox_events_unkeyed": ("queue", "key", "available_at", "seq"),
    "outbox_events_dead": (),  # they are found by when they are due
}


def full_name(connection: Connection) -> str:
    """Return the name of the table of events, as PostgreSQL's to_regclass() takes it."""
    schema = connection.schema_for_object(events)
    quote = connection.dialect.identifier_preparer.quote
    return f"{quote(schema)}.{events.name}" if schema else events.name


def dialect_of(name: str) -> str | None:
    """Return which of :data:`DIALECTS` SQLAlchemy's ``name`` for a dialect means; None if none."""
    name = _ALSO.get(name, name)
    return name if name in DIALECTS else None


def known_dialect(name: str) -> str:
    """Return the same, or raise UsageError: outbox can't store events in that database."""
    dialect = dialect_of(name)
    if dialect is None:
        raise UsageError(f"events cannot be stored in {name}, only in {' or '.join(DIALECTS)}")
    return dialect


def exists(connection: Connection, table: Table) -> bool:
    """Return whether one of the tables exists, in the schema that ``connection`` uses for it."""
    schema = connection.schema_for_object(table)
    return inspect(connection).has_table(table.name, schema=schema)


def metadata_of(dialect: str) -> MetaData:
    """Return all tables as they are created on a database: :data:`metadata`, except on MariaDB.

    Use it where that is given to Alembic, or to ``create_all``, for a MariaDB database.

    Args:
        dialect: one of :data:`DIALECTS`, or ``"mysql"`` for MariaDB.

    Raises:
        UsageError: it is another one.
    """
    known = dialect_of(dialect)
    if known is None:
        raise UsageError(f"unknown dialect {dialect!r}; use one of {', '.join(DIALECTS)}")
    if known != "mariadb":
        return metadata
    copies = MetaData()
    for table in metadata.sorted_tables:
        copy = table.to_metadata(copies)
        for index in list(copy.indexes):
            names = _MARIADB_INDEXES.get(str(index.name))
            if names is not None:
                copy.indexes.discard(index)
                if names:
                    Index(index.name, *(copy.columns[name] for name in names))
        for column in copy.columns:
            if column.identity is not None:  # there an AUTO_INCREMENT
                column.identity = column.server_default = None
    return copies
