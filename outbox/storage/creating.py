"""Creates the tables of :mod:`outbox.storage.schema`, completes them, and prints how."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sqlalchemy import (
    Connection,
    Engine,
    Index,
    Insert,
    MetaData,
    Table,
    func,
    inspect,
    literal_column,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL
from sqlalchemy.exc import NoSuchModuleError
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.schema import (
    CreateIndex,
    CreateSchema,
    CreateTable,
    DropIndex,
    ExecutableDDLElement,
)
from sqlalchemy.sql.compiler import DDLCompiler

from outbox.errors import UsageError
from outbox.storage.results_table import results
from outbox.storage.schema import (
    SCHEMA_VERSION,
    bindings,
    dialect_of,
    events,
    exists,
    filled,
    full_name,
    known_dialect,
    meta,
    metadata,
    metadata_of,
    presence,
    recurring,
)
from outbox.storage.transactions import own_transaction
from outbox.storage.upkeep.published_rows import published

__all__ = [
    "ADDED_LATER",
    "check_server",
    "create_missing",
    "database_id",
    "ddl",
    "missing",
    "statements_of",
    "upgrade",
]

ADDED_LATER = (
    "outbox_events_dead",
    "outbox_events_heads",
    "outbox_events_tasks",
    "outbox_events_unkeyed",
    bindings.name,
    meta.name,
    results.name,
    recurring.name,
    presence.name,
    published.name,
)
"""What the first version didn't have: stored events are published without it, perhaps slowly."""

_CREATING = 0x6F7574626F78  # "outbox": the advisory lock of those that create tables
_OLDEST_MARIADB = (10, 6)
_LOCK_TIMEOUT = 60  # seconds for which MariaDB waits for it


class _VacuumOften(ExecutableDDLElement):
    """Has PostgreSQL vacuum a table after as many dead tuples as a claim may have to pass.

    By default it waits until a fifth of the table is dead: while 1,000,000 events wait, 200,000.
    """

    def __init__(self, table: Table) -> None:
        self.table = table


@compiles(_VacuumOften)
def _(element: _VacuumOften, compiler: DDLCompiler, **_: Any) -> str:
    return (
        f"ALTER TABLE {compiler.preparer.format_table(element.table)} SET "
        "(autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000)"
    )


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


def missing(connection: Connection) -> list[Table | Index]:
    """Return the tables of ``metadata``, and the indexes, that the database lacks."""
    inspector = inspect(connection)
    lacking: list[Table | Index] = []
    for table in metadata_of(connection.dialect.name).sorted_tables:
        schema = connection.schema_for_object(table)
        if not inspector.has_table(table.name, schema=schema):
            lacking += [table, *_indexes(table)]
            continue
        known = {index["name"] for index in inspector.get_indexes(table.name, schema=schema)}
        lacking += [index for index in _indexes(table) if index.name not in known]
    return lacking


def create_missing(connection: Connection) -> list[str]:
    """Create the tables and indexes that the database lacks; return their names.

    Processes that do this at the same time wait for each other. On MariaDB this commits the
    connection's transaction.

    Raises:
        UsageError: see :func:`check_server`.
    """
    check_server(connection)
    with _alone(connection):
        schema = connection.schema_for_object(events)
        if schema is not None and not inspect(connection).has_schema(schema):
            connection.execute(CreateSchema(schema, if_not_exists=True))
        lacking = missing(connection)
        for each in lacking:
            if isinstance(each, Table):
                connection.execute(CreateTable(each, if_not_exists=True))
            else:
                connection.execute(CreateIndex(each, if_not_exists=True))
        if connection.dialect.name == "postgresql":
            _have_vacuumed_often(connection)
        _note_version(connection)
    return [str(each.name) for each in lacking]


def upgrade(engine: Engine) -> list[str]:
    """Add what an earlier version's tables lack, while they are used; return the names.

    As :func:`create_missing`, except that PostgreSQL builds indexes without keeping writers
    waiting, which takes longer. Processes of earlier versions can go on.

    Raises:
        UsageError: there is no table of events, or see :func:`check_server`.
    """
    with own_transaction(engine) as connection:
        if not exists(connection, events):
            raise UsageError(
                f"the table {events.name} does not exist; create it with `outbox sql create`"
            )
        # Waits for others that create, and keeps them waiting. It holds no snapshot meanwhile, for
        # whose end the building of an index would wait.
        with _alone(connection):
            built = _build_concurrently(engine) if engine.dialect.name == "postgresql" else []
            return built + create_missing(connection)


def _build_concurrently(engine: Engine) -> list[str]:
    """Build the indexes that PostgreSQL's tables lack; return their names."""
    indexes: dict[str, Index] = {}
    for table in metadata.sorted_tables:
        for index in _indexes(table.to_metadata(MetaData())):
            index.dialect_options["postgresql"]["concurrently"] = True
            indexes[str(index.name)] = index
    with engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        unfinished = connection.execute(_UNFINISHED, {"table": full_name(connection)})
        for name in unfinished.scalars().all():
            if name in indexes:
                connection.execute(DropIndex(indexes[name], if_exists=True))
        lacking = {str(each.name) for each in missing(connection)}
        built = [
            name
            for name, index in indexes.items()
            if name in lacking and index.table is not None and index.table.name not in lacking
        ]
        for name in built:
            connection.execute(CreateIndex(indexes[name], if_not_exists=True))
    return built


# An index whose building was cut off; it exists, but isn't used.
_UNFINISHED = text(
    "SELECT relname FROM pg_index JOIN pg_class ON pg_class.oid = indexrelid "
    "WHERE NOT indisvalid AND indrelid = to_regclass(:table)"
)


@contextlib.contextmanager
def _alone(connection: Connection) -> Iterator[None]:
    """Wait until no other connection creates tables, and keep others waiting in the block."""
    dialect = known_dialect(connection.dialect.name)
    if dialect == "postgresql":
        # Without it, all but one would fail: even IF NOT EXISTS sees only what is committed.
        # Without a parameter, so that psycopg leaves no portal open, whose snapshot would stay.
        connection.execute(select(func.pg_advisory_xact_lock(literal_column(str(_CREATING)))))
    elif dialect == "mariadb":
        # A lock of the connection: creating a table commits, which would end any other.
        connection.execute(select(func.get_lock(str(_CREATING), _LOCK_TIMEOUT)))
    try:
        yield
    finally:
        if dialect == "mariadb" and not connection.invalidated:
            connection.execute(select(func.release_lock(str(_CREATING))))


def _have_vacuumed_often(connection: Connection) -> None:
    """Set when the table is vacuumed, unless that was set before, or is not the user's to set."""
    table = connection.execute(_OPTIONS, {"table": full_name(connection)}).one()
    options = [option.partition("=")[0] for option in table.reloptions or ()]
    if table.owned and not any(each.startswith("autovacuum_vacuum_") for each in options):
        connection.execute(_VacuumOften(events))


_OPTIONS = text(
    "SELECT reloptions, pg_has_role(relowner, 'USAGE') AS owned FROM pg_class "
    "WHERE oid = to_regclass(:table)"
)


def _note_version(connection: Connection) -> None:
    version = connection.execute(select(func.max(meta.c.schema_version))).scalar()
    if version is None:
        connection.execute(filled(meta))
    elif version < SCHEMA_VERSION:
        connection.execute(update(meta).values(schema_version=SCHEMA_VERSION))


def database_id(connection: Connection) -> str | None:
    """Return the id of outbox's tables, which is the same whatever URL leads to them.

    Returns:
        The id; None if they have none, since a migration has created them that writes no rows, or
        an earlier version of outbox.
    """
    if not exists(connection, meta):
        return None
    return connection.execute(select(meta.c.id).order_by(meta.c.id).limit(1)).scalar()


def _indexes(table: Table) -> list[Index]:
    return sorted(table.indexes, key=lambda index: str(index.name))


def ddl(dialect: str) -> str:
    """Return the statements that create the tables, for ``dialect``, as a script.

    Raises:
        UsageError: ``dialect`` is not in ``DIALECTS``, nor ``"mysql"`` for MariaDB.
    """
    return "".join(f"{statement};\n" for statement in statements_of(dialect))


def statements_of(dialect: str) -> list[str]:
    """Return the statements that create the tables, for ``dialect``, one by one.

    Raises:
        UsageError: ``dialect`` is not in ``DIALECTS``, nor ``"mysql"`` for MariaDB.
    """
    tables = metadata_of(dialect).sorted_tables
    try:
        chosen = URL.create(dialect_of(dialect) or dialect).get_dialect()()
    except NoSuchModuleError as error:
        raise UsageError(f"SQLAlchemy has no dialect {dialect!r}") from error
    statements: list[ExecutableDDLElement | Insert] = []
    for table in tables:
        statements += [CreateTable(table), *map(CreateIndex, _indexes(table))]
        if table.name == events.name and dialect == "postgresql":
            statements.append(_VacuumOften(table))
    statements.append(filled(meta))
    return [str(statement.compile(dialect=chosen)).strip() for statement in statements]
