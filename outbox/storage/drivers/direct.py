"""Statements for hot loops, executed by the driver: SQLAlchemy would take longer than they do."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import ClauseElement, Connection, Dialect

__all__ = ["execute", "execute_alone"]

_PREPARED = "outbox_prepared"
"""Where the connection's own dictionary has its prepared statements."""


class _Compiled(NamedTuple):
    text: str
    constants: Mapping[str, Any]
    processors: Mapping[str, Callable[[Any], Any]]
    order: Sequence[str]

    def parameters(self, given: Mapping[str, Any]) -> list[Any]:
        values = {**self.constants, **given}
        for name, process in self.processors.items():
            values[name] = process(values[name])
        return [values[name] for name in self.order]


def execute_alone(connection: Connection, statement: Any, parameters: Mapping[str, Any]) -> int:
    """Execute a statement that is a transaction by itself; return the rows that it has changed.

    What it is compiled to is kept, so it must be one of few: made once, or cached. So may the
    server's plan be, so it must be right for a table of any size.

    Args:
        connection: a connection in AUTOCOMMIT, outside of a transaction of SQLAlchemy's.
        statement: the statement.
        parameters: its parameters.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: it was refused, or the database is unavailable. Nothing has
            changed, unless the connection was lost.
    """
    run = _RUNS.get(connection.dialect.driver)  # those with which this was tried
    if run is not None and not connection.get_execution_options().get("schema_translate_map"):
        # After an error nothing has changed, and SQLAlchemy meets the same one, in its own words;
        # or a lost connection, over which nothing is executed twice.
        with contextlib.suppress(Exception):
            return run(connection, statement, parameters)
    with connection.begin():
        return execute(connection, statement, parameters)


def execute(connection: Connection, statement: Any, parameters: Mapping[str, Any]) -> int:
    """Execute a statement by SQLAlchemy; return the rows that it has changed."""
    # Otherwise it drops the count of an INSERT.
    options = {"preserve_rowcount": True}
    return connection.execute(statement, parameters, execution_options=options).rowcount


def _by_psycopg(
    connection: Connection, statement: ClauseElement, parameters: Mapping[str, Any]
) -> int:
    compiled = _compiled(statement, connection.dialect, "numeric_dollar")
    prepared = connection.info.get(_PREPARED)
    if prepared is None:
        from outbox.storage.drivers.prepared import Prepared

        prepared = connection.info[_PREPARED] = Prepared()
    driver = connection.connection.driver_connection
    changed: int = prepared.execute(driver, compiled.text, compiled.parameters(parameters))
    return changed


def _by_pymysql(
    connection: Connection, statement: ClauseElement, parameters: Mapping[str, Any]
) -> int:
    compiled = _compiled(statement, connection.dialect, "format")
    driver: Any = connection.connection.driver_connection
    with driver.cursor() as cursor:
        cursor.execute(compiled.text, compiled.parameters(parameters))
        return int(cursor.rowcount)


_RUNS: Mapping[str, Callable[[Connection, Any, Mapping[str, Any]], int]] = {
    "psycopg": _by_psycopg,
    "pymysql": _by_pymysql,
}


@functools.lru_cache(maxsize=256)
def _compiled(statement: ClauseElement, dialect: Dialect, paramstyle: str) -> _Compiled:
    if dialect.paramstyle != paramstyle:
        kind: Any = type(dialect)
        dialect = kind(paramstyle=paramstyle)
    compiled: Any = statement.compile(dialect=dialect)
    constants, processors = {}, {}
    for name, parameter in compiled.binds.items():
        if not parameter.required:
            constants[name] = parameter.effective_value
        process = parameter.type.dialect_impl(dialect).bind_processor(dialect)
        if process is not None:
            processors[name] = process
    return _Compiled(str(compiled), constants, processors, compiled.positiontup)
