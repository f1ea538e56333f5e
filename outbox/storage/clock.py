"""The database's clock, in SQL: the only clock that decides which events are due, leased or old.

So a process whose clock is wrong, or that was frozen, does no harm.
"""

from __future__ import annotations

import datetime
from typing import Any

from sqlalchemy import TIMESTAMP, Dialect, Float
from sqlalchemy.dialects import mysql
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import FunctionElement
from sqlalchemy.types import TypeDecorator, TypeEngine

__all__ = ["ExactTimestamp", "Timestamp", "in_seconds", "now", "seconds_after", "seconds_since"]

_UTC = datetime.UTC
_MARIADB = ("mariadb", "mysql")  # SQLAlchemy's names, by the beginning of the URL
_MARIADB_NOW = "UTC_TIMESTAMP(6)"
_SQLITE_NOW = "((julianday('now') - 2440587.5) * 86400.0)"


class Timestamp(TypeDecorator[datetime.datetime]):
    """An aware datetime: ``TIMESTAMP WITH TIME ZONE``.

    On SQLite, seconds since the epoch; on MariaDB ``DATETIME(6)`` in UTC, since a ``TIMESTAMP`` is
    converted to the zone of the session and ends in 2038.
    """

    impl = TIMESTAMP
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:  # noqa: D102
        if dialect.name == "sqlite":
            return dialect.type_descriptor(Float())
        if dialect.name in _MARIADB:
            return dialect.type_descriptor(mysql.DATETIME(fsp=6))
        return dialect.type_descriptor(TIMESTAMP(timezone=True))

    def process_bind_param(self, value: datetime.datetime | None, dialect: Dialect) -> Any:  # noqa: D102
        if value is not None and dialect.name == "sqlite":
            return value.timestamp()
        if value is not None and dialect.name in _MARIADB:
            return value.astimezone(_UTC).replace(tzinfo=None)
        return value

    def process_result_value(self, value: Any, dialect: Dialect) -> datetime.datetime | None:  # noqa: D102
        if value is not None and dialect.name == "sqlite":
            return datetime.datetime.fromtimestamp(value, _UTC)
        if value is not None and dialect.name in _MARIADB:
            if not isinstance(value, datetime.datetime):  # PyMySQL's text of the zero date
                raise TypeError(f"{value!r} is not a time")
            return value.replace(tzinfo=_UTC)
        instant: datetime.datetime | None = value
        return instant

    def result_processor(self, dialect: Dialect, coltype: Any) -> Any:  # noqa: D102
        # Drivers of PostgreSQL return such a datetime; a call for each would cost as much as it.
        if dialect.name == "postgresql":
            return None
        return super().result_processor(dialect, coltype)


class ExactTimestamp(Timestamp):
    """The same as the database has it, to be handed back to it: a float of seconds on SQLite.

    There a datetime would be rounded to microseconds.
    """

    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:  # noqa: D102
        return value if isinstance(value, float) else super().process_bind_param(value, dialect)

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:  # noqa: D102
        return value if dialect.name == "sqlite" else super().process_result_value(value, dialect)


class now(FunctionElement[datetime.datetime]):
    """The time at which the statement began, the same for all of its rows.

    On PostgreSQL neither ``now()``, which is when the transaction began, nor ``clock_timestamp()``,
    which differs from row to row, so that finding the due rows couldn't use an index.
    """

    type = Timestamp()
    inherit_cache = True


class in_seconds(FunctionElement[datetime.datetime]):
    """The time a number of seconds after :class:`now`."""

    type = Timestamp()
    inherit_cache = True


class seconds_after(FunctionElement[datetime.datetime]):
    """The time a number of seconds, the second argument, after a timestamp."""

    type = Timestamp()
    inherit_cache = True


class seconds_since(FunctionElement[float]):
    """The seconds from a timestamp to :class:`now`."""

    type = Float()
    inherit_cache = True


@compiles(now, "postgresql")
def _(element: now, compiler: SQLCompiler, **_: Any) -> str:
    return "statement_timestamp()"


@compiles(now, *_MARIADB)
def _(element: now, compiler: SQLCompiler, **_: Any) -> str:
    return _MARIADB_NOW


@compiles(now, "sqlite")
def _(element: now, compiler: SQLCompiler, **_: Any) -> str:
    return _SQLITE_NOW


@compiles(in_seconds, "postgresql")
def _(element: in_seconds, compiler: SQLCompiler, **options: Any) -> str:
    seconds = compiler.process(element.clauses, **options)
    return f"(statement_timestamp() + make_interval(secs => {seconds}))"


@compiles(in_seconds, *_MARIADB)
def _(element: in_seconds, compiler: SQLCompiler, **options: Any) -> str:
    return _later(_MARIADB_NOW, compiler.process(element.clauses, **options))


@compiles(in_seconds, "sqlite")
def _(element: in_seconds, compiler: SQLCompiler, **options: Any) -> str:
    return f"({_SQLITE_NOW} + {compiler.process(element.clauses, **options)})"


@compiles(seconds_after, "postgresql")
def _(element: seconds_after, compiler: SQLCompiler, **options: Any) -> str:
    moment, seconds = (compiler.process(each, **options) for each in element.clauses)
    return f"({moment} + make_interval(secs => {seconds}))"


@compiles(seconds_after, *_MARIADB)
def _(element: seconds_after, compiler: SQLCompiler, **options: Any) -> str:
    moment, seconds = (compiler.process(each, **options) for each in element.clauses)
    return _later(moment, seconds)


@compiles(seconds_after, "sqlite")
def _(element: seconds_after, compiler: SQLCompiler, **options: Any) -> str:
    moment, seconds = (compiler.process(each, **options) for each in element.clauses)
    return f"({moment} + {seconds})"


@compiles(seconds_since, "postgresql")
def _(element: seconds_since, compiler: SQLCompiler, **options: Any) -> str:
    moment = compiler.process(element.clauses, **options)
    return f"EXTRACT(EPOCH FROM statement_timestamp() - {moment})::float8"


@compiles(seconds_since, *_MARIADB)
def _(element: seconds_since, compiler: SQLCompiler, **options: Any) -> str:
    moment = compiler.process(element.clauses, **options)
    return f"(TIMESTAMPDIFF(MICROSECOND, {moment}, {_MARIADB_NOW}) / 1e6)"


@compiles(seconds_since, "sqlite")
def _(element: seconds_since, compiler: SQLCompiler, **options: Any) -> str:
    return f"({_SQLITE_NOW} - {compiler.process(element.clauses, **options)})"


def _later(moment: str, seconds: str) -> str:
    return f"({moment} + INTERVAL ROUND(({seconds}) * 1e6) MICROSECOND)"
