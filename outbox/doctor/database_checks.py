"""Checks of the database with the stored events; they read only."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Connection, Engine, func, inspect, select, text

from outbox.doctor.check import Check
from outbox.doctor.examined import Examined
from outbox.doctor.finding import NotApplicable, NotChecked, Problem, Severity
from outbox.errors import ConnectFailed, OutboxError, UsageError
from outbox.storage.clock import now, seconds_since
from outbox.storage.creating import ADDED_LATER, check_server
from outbox.storage.failures import DatabaseError, reason_of
from outbox.storage.floors import NO_FLOOR
from outbox.storage.schema import dialect_of, events, full_name, metadata_of
from outbox.storage.statements import statements
from outbox.storage.transactions import own_transaction

__all__ = ["CHECKS", "clock_difference", "dead_rows", "tables_of"]

_OLD = 60.0  # seconds after which a relay should have published a row
_LONG_TRANSACTION = 600.0  # seconds
_DEAD_TUPLES = 0.2  # of all
_FEW_TUPLES = 10_000
_MANY_ROWS = 10_000
_DUE = "outbox_events_due"
_DUE_COLUMNS = ["queue", "rank", "available_at", "seq"]


def tables_of(examined: Examined) -> set[str]:
    """Return the names of outbox's tables that the database has.

    Raises:
        NotChecked: it can't be used.
    """
    with _connected(examined) as connection:
        schema = connection.schema_for_object(events)
        names = set(inspect(connection).get_table_names(schema=schema))
    return names & {table.name for table in metadata_of(connection.dialect.name).sorted_tables}


@contextlib.contextmanager
def _connected(examined: Examined) -> Iterator[Connection]:
    try:
        with own_transaction(examined.engine) as connection:
            yield connection
    except DatabaseError as error:
        raise NotChecked(f"the database failed: {reason_of(error)}") from None


def _need_events(examined: Examined) -> None:
    if events.name not in tables_of(examined):
        raise NotChecked(f"there is no table {events.name} (OBX201)")


def _tables(examined: Examined) -> Iterator[Problem]:
    try:
        engine = examined.reach_database()
        with own_transaction(engine) as connection:
            check_server(connection)
            yield from _lacking(connection)
    except (DatabaseError, ConnectFailed) as error:
        remedy = "Check the database's URL, and that it runs."
        yield Problem("error", f"the database cannot be reached: {reason_of(error)}", remedy)
    except OutboxError as error:
        yield Problem("error", str(error).partition("\n")[0])


def _lacking(connection: Connection) -> Iterator[Problem]:
    # So that the table of the inbox is known.
    import outbox.sql.inbox  # noqa: F401

    inspector = inspect(connection)
    for table in metadata_of(connection.dialect.name).sorted_tables:
        schema = connection.schema_for_object(table)
        if not inspector.has_table(table.name, schema=schema):
            severity: Severity = "warning" if table.name in ADDED_LATER else "error"
            yield Problem(severity, f"there is no table {table.name}")
            continue
        columns = {each["name"] for each in inspector.get_columns(table.name, schema=schema)}
        indexes = {each["name"] for each in inspector.get_indexes(table.name, schema=schema)}
        missing = [column.name for column in table.columns if column.name not in columns]
        if missing:
            yield Problem("error", f"the table {table.name} has no column {', '.join(missing)}")
        for name in sorted({str(index.name) for index in table.indexes} - indexes):
            yield Problem("warning", f"the table {table.name} has no index {name}")


def _backlog(examined: Examined) -> Iterator[Problem]:
    _need_events(examined)
    row = events.c
    with _connected(examined) as connection:
        alive = row.dead_at.is_(None) & (row.queue == "")
        expired = alive & row.lease_token.is_not(None) & (row.available_at <= now())
        since = connection.execute(
            select(seconds_since(row.available_at))
            .where(alive, row.lease_token.is_(None), row.available_at <= now())
            .order_by(row.available_at)
            .limit(1)
        ).scalar()
        ended = connection.execute(
            select(seconds_since(row.available_at))
            .where(expired)
            .order_by(row.available_at)
            .limit(1)
        ).scalar()
    if since is not None and since > _OLD:
        yield Problem(
            "warning",
            f"a stored event has been due for {_duration(since)}: no relay publishes it, or the "
            "relay can't keep up",
        )
    if ended is not None and ended > _OLD:
        yield Problem(
            "warning",
            f"the lease of a stored event ended {_duration(ended)} ago: the relay that held it is "
            "dead, and no other one runs",
        )


def dead_rows(examined: Examined) -> Iterator[Problem]:
    """Yield a problem if there are dead stored events; for the check of dead letters."""
    _need_events(examined)
    is_dead = events.c.dead_at.is_not(None)
    with _connected(examined) as connection:
        count = connection.execute(select(func.count()).where(is_dead)).scalar_one()
    if count:
        yield Problem(
            "warning",
            f"{count:,} stored event{' is' if count == 1 else 's are'} dead",
            "Look with `outbox status`; then `outbox retry` or `outbox purge`.",
        )


def _vacuum(examined: Examined) -> Iterator[Problem]:
    _need_events(examined)
    if dialect_of(examined.engine.dialect.name) != "postgresql":
        raise NotApplicable
    with _connected(examined) as connection:
        oldest = connection.execute(_OLDEST_TRANSACTION).one_or_none()
        settings = connection.execute(_AUTOVACUUM, {"table": full_name(connection)}).one()
        tuples = connection.execute(_TUPLES, {"table": full_name(connection)}).one_or_none()
    if oldest is not None and oldest.seconds > _LONG_TRANSACTION:
        yield Problem(
            "warning",
            f"a transaction of {_duration(oldest.seconds)} (pid {oldest.pid}, {oldest.state}) "
            "keeps vacuum from removing published rows",
            f"End it: SELECT pg_terminate_backend({oldest.pid}). Set "
            "idle_in_transaction_session_timeout.",
        )
    if settings.autovacuum != "on":
        yield Problem("warning", "autovacuum is off on this server")
    if any(option.lower() in _OFF for option in settings.options or ()):
        yield Problem(
            "warning",
            f"autovacuum is off for the table {events.name}",
            f"ALTER TABLE {events.name} RESET (autovacuum_enabled).",
        )
    if tuples is not None and tuples.dead > _FEW_TUPLES:
        share = tuples.dead / (tuples.dead + tuples.live)
        if share > _DEAD_TUPLES:
            yield Problem(
                "warning",
                f"{share:.0%} of the table {events.name} are dead tuples ({tuples.dead:,})",
                "Let autovacuum run more often on this table; see docs/durable.md.",
            )


_OFF = {f"autovacuum_enabled={value}" for value in ("false", "off", "0", "no")}
_OLDEST_TRANSACTION = text(
    "SELECT pid, state, extract(epoch FROM clock_timestamp() - xact_start)::float8 AS seconds "
    "FROM pg_stat_activity WHERE xact_start IS NOT NULL AND pid <> pg_backend_pid() "
    "AND backend_type = 'client backend' AND datname = current_database() "
    "ORDER BY xact_start LIMIT 1"
)
_AUTOVACUUM = text(
    "SELECT current_setting('autovacuum') AS autovacuum, "
    "(SELECT reloptions FROM pg_class WHERE oid = to_regclass(:table)) AS options"
)
_TUPLES = text(
    "SELECT n_live_tup AS live, n_dead_tup AS dead FROM pg_stat_user_tables "
    "WHERE relid = to_regclass(:table)"
)


def _plan(examined: Examined) -> Iterator[Problem]:
    _need_events(examined)
    dialect = dialect_of(examined.engine.dialect.name) or ""
    problem = f"claims don't use the index {_DUE}"
    with _connected(examined) as connection:
        columns = _columns_of(connection)
        if columns and columns != _DUE_COLUMNS:
            yield Problem("warning", f"the index {_DUE} has other columns: {', '.join(columns)}")
            return
        if dialect == "postgresql":
            rows = connection.execute(_ROWS, {"table": full_name(connection)}).scalar() or 0
            if _DUE not in _explained(connection, dialect):
                if rows > _MANY_ROWS:
                    yield Problem(
                        "warning",
                        f"{problem}, though the table has {rows:,.0f} rows",
                        f"Bring the statistics up to date: ANALYZE {events.name}.",
                    )
                    return
                # In a small table it is cheaper to read all: is the index usable at all?
                connection.exec_driver_sql("SET LOCAL enable_seqscan TO off")
                connection.exec_driver_sql("SET LOCAL enable_bitmapscan TO off")
        try:
            plan = _explained(connection, dialect)
        except DatabaseError as error:
            if dialect != "mariadb":  # which is told what index to use
                raise
            yield Problem("warning", f"{problem}: {reason_of(error)}")
            return
    if _DUE not in plan:
        yield Problem("warning", f"{problem}, which is missing or invalid")


def _columns_of(connection: Connection) -> list[str]:
    """Return the columns of the index; none if it is missing."""
    schema = connection.schema_for_object(events)
    for index in inspect(connection).get_indexes(events.name, schema=schema):
        if index["name"] == _DUE:
            return [str(name) for name in index["column_names"]]
    return []


_ROWS = text("SELECT reltuples FROM pg_class WHERE oid = to_regclass(:table)")


def _explained(connection: Connection, dialect: str) -> str:
    parameters = {
        "of_queue": "", "of_rank": 0, "at_most": 100, "max_bytes": 1_000_000, "seconds": 60.0,
        "of_token": "doctor", "floor": NO_FLOOR,
    }  # fmt: skip
    schema = connection.schema_for_object(events)
    compiled = statements(dialect).lease_due.compile(
        dialect=connection.dialect,
        schema_translate_map={None: schema},
        render_schema_translate=True,
    )
    values = compiled.construct_params(parameters)
    order = getattr(compiled, "positiontup", None)
    arguments: Any = values if order is None else tuple(values[name] for name in order)
    word = "EXPLAIN QUERY PLAN" if dialect == "sqlite" else "EXPLAIN"
    # It only plans: nothing is claimed or locked.
    rows = connection.exec_driver_sql(f"{word} {compiled}", arguments)
    return "\n".join(" ".join(map(str, row)) for row in rows)


def _server(examined: Examined) -> Iterator[Problem]:
    dialect = dialect_of(examined.engine.dialect.name)
    if dialect == "sqlite":
        raise NotApplicable
    engine = examined.engine
    try:
        with own_transaction(engine) as connection:
            check_server(connection)
        level = _default_isolation(engine)
    except UsageError as error:
        yield Problem("error", str(error), "Use MariaDB 10.6 or later, or PostgreSQL.")
        return
    except DatabaseError as error:
        raise NotChecked(f"the database failed: {reason_of(error)}") from None
    if level == "SERIALIZABLE":
        yield Problem(
            "note",
            "transactions are SERIALIZABLE by default: those of the application that store events "
            "may fail for a conflict, and must be tried again",
            "Use READ COMMITTED where the application doesn't need more.",
        )
    if dialect == "postgresql" and _is_pooled(engine):
        yield Problem(
            "note",
            "a pooler in transaction mode stands before the server, behind which LISTEN does not "
            "work",
            "Start `outbox relay` without --listen, or give it a URL that leads to PostgreSQL "
            "itself.",
        )


def _default_isolation(engine: Engine) -> str:
    name = "default_transaction_isolation"
    statement = f"SHOW {name}"
    if dialect_of(engine.dialect.name) == "mariadb":
        statement = "SELECT @@global.tx_isolation"
    with engine.connect() as connection:
        level = str(connection.exec_driver_sql(statement).scalar())
    return level.replace("-", " ").upper()


def _is_pooled(engine: Engine) -> bool:
    """Return whether two transactions of one connection can run in two processes of the server."""
    pid = text("SELECT pg_backend_pid()")
    with engine.connect() as connection, engine.connect() as other:
        with connection.begin():
            first = connection.execute(pid).scalar()
        with other.begin():
            other.execute(pid)  # keeps a pooler's last used connection busy meanwhile
            with connection.begin():
                second = connection.execute(pid).scalar()
    return bool(first != second)


def clock_difference(engine: Engine) -> float:
    """Return how many seconds the database's clock is ahead of this machine's.

    Raises:
        NotChecked: the database can't be used.
    """
    try:
        with own_transaction(engine) as connection:
            began = time.time()
            theirs = connection.execute(select(now())).scalar_one()
            return float(theirs.timestamp() - (began + time.time()) / 2)
    except DatabaseError as error:
        raise NotChecked(f"the database failed: {reason_of(error)}") from None


def _duration(seconds: float) -> str:
    for unit, name in ((86_400, "days"), (3_600, "hours"), (60, "minutes")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} seconds"


CHECKS = (
    Check(
        "OBX201",
        "the tables, columns and indexes",
        "Run `outbox sql create`, or your migrations (outbox.sql.metadata, `outbox sql ddl`; with "
        "Django `manage.py migrate`).",
        _tables,
    ),
    Check(
        "OBX202",
        "stored events that no relay publishes",
        "Start `outbox relay`, or another one.",
        _backlog,
    ),
    Check(
        "OBX203",
        "vacuum of the table of stored events",
        "Switch it on: autovacuum = on in postgresql.conf.",
        _vacuum,
    ),
    Check(
        "OBX204",
        "the index of the relay's claims",
        f"Create it again: DROP INDEX {_DUE}, then `outbox sql create`.",
        _plan,
    ),
    Check(
        "OBX205",
        "the server: version, pooler, isolation",
        "Use a server with SKIP LOCKED.",
        _server,
    ),
)
