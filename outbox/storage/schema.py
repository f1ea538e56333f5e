"""The table of stored events, and ``metadata``: all tables, for migrations.

A table exists twice: once with the types that outbox's statements need, and once, in ``metadata``,
with plain types of SQLAlchemy, since a generated migration must run where only SQLAlchemy is
imported. Both create the same columns.

On MariaDB two indexes have other columns, since an index has no condition there. ``metadata`` can't
express that; :func:`metadata_of` can.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

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
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import URL
from sqlalchemy.exc import NoSuchModuleError
from sqlalchemy.schema import CreateIndex, CreateTable, ExecutableDDLElement

from outbox.errors import UsageError
from outbox.storage.clock import Timestamp, in_seconds, now

__all__ = [
    "DIALECTS",
    "GRACE",
    "MARIADB_OPTIONS",
    "check_server",
    "create_missing",
    "ddl",
    "dialect_of",
    "events",
    "events_with_grace",
    "for_migrations",
    "known_dialect",
    "metadata",
    "metadata_of",
    "missing",
    "statements_of",
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

_CREATING = 0x6F7574626F78  # "outbox": the advisory lock of those that create tables
_OLDEST_MARIADB = (10, 6)
_LOCK_TIMEOUT = 60  # seconds for which MariaDB waits for it


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
for_migrations(events)

# An index has no condition here, so it has columns in its place. Dead rows leave the index of what
# is due otherwise: they are due in the year 9999.
_MARIADB_INDEXES = {
    "outbox_events_heads": ("queue", "key", "dead_at", "seq"),
    "outbox_events_unkeyed": ("queue", "key", "available_at", "seq"),
}


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
                Index(index.name, *(copy.columns[name] for name in names))
        for column in copy.columns:
            if column.identity is not None:  # there an AUTO_INCREMENT
                column.identity = column.server_default = None
    return copies


def missing(connection: Connection) -> list[Table | Index]:
    """Return the tables of :data:`metadata`, and the indexes, that the database lacks."""
    inspector = inspect(connection)
    found: list[Table | Index] = []
    for table in metadata_of(connection.dialect.name).sorted_tables:
        schema = connection.schema_for_object(table)
        if not inspector.has_table(table.name, schema=schema):
            found += [table, *_indexes(table)]
            continue
        known = {index["name"] for index in inspector.get_indexes(table.name, schema=schema)}
        found += [index for index in _indexes(table) if index.name not in known]
    return found


def check_server(connection: Connection) -> None:
    """Raise UsageError if the server is MySQL, or a MariaDB without SKIP LOCKED."""
    if dialect_of(connection.dialect.name) != "mariadb":
        return
    version: tuple[Any, ...] = connection.dialect.server_version_info or ()
    if not getattr(connection.dialect, "is_mariadb", False) or version < _OLDEST_MARIADB:
        number = ".".join(map(str, version))
        raise UsageError(
            f"events can be stored in MariaDB from 10.6, not in this server ({number})"
        )


def create_missing(connection: Connection) -> list[str]:
    """Create the tables and indexes that the database lacks; return their names.

    Processes that do this at the same time wait for each other. On MariaDB this commits the
    connection's transaction.

    Raises:
        UsageError: see :func:`check_server`.
    """
    check_server(connection)
    with _alone(connection):
        lacking = missing(connection)
        for each in lacking:
            if isinstance(each, Table):
                connection.execute(CreateTable(each, if_not_exists=True))
            else:
                connection.execute(CreateIndex(each, if_not_exists=True))
    return [str(each.name) for each in lacking]


@contextlib.contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """Wait until no other connection creates tables, and keep others waiting in the block."""
    dialect = known_dialect(connection.dialect.name)
    if dialect == "postgresql":
        # Without it, all but one would fail: even IF NOT EXISTS sees only what is committed.
        connection.execute(select(func.pg_advisory_xact_lock(_CREATING)))
    elif dialect == "mariadb":
        # A lock of the connection: creating a table commits, which would end any other.
        connection.execute(select(func.get_lock(str(_CREATING), _LOCK_TIMEOUT)))
    try:
        yield
    finally:
        if dialect == "mariadb" and not connection.invalidated:
            connection.execute(select(func.release_lock(str(_CREATING))))


def _indexes(table: Table) -> list[Index]:
    return sorted(table.indexes, key=lambda index: str(index.name))


def ddl(dialect: str) -> str:
    """Return the statements that create the tables, for ``dialect``, as a script.

    Raises:
        UsageError: ``dialect`` is not in :data:`DIALECTS`, nor ``"mysql"`` for MariaDB.
    """
    return "".join(f"{statement};\n" for statement in statements_of(dialect))


def statements_of(dialect: str) -> list[str]:
    """Return the statements that create the tables, for ``dialect``, one by one.

    Raises:
        UsageError: ``dialect`` is not in :data:`DIALECTS`, nor ``"mysql"`` for MariaDB.
    """
    tables = metadata_of(dialect).sorted_tables
    try:
        chosen = URL.create(dialect_of(dialect) or dialect).get_dialect()()
    except NoSuchModuleError as error:
        raise UsageError(f"SQLAlchemy has no dialect {dialect!r}") from error
    statements: list[ExecutableDDLElement] = []
    for table in tables:
        statements += [CreateTable(table), *map(CreateIndex, _indexes(table))]
    return [str(statement.compile(dialect=chosen)).strip() for statement in statements]
