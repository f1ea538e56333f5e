"""Whether an exception says that a database is away, which is no fault of the message."""

from __future__ import annotations

import sys
from typing import Any

__all__ = ["is_away"]

# Result codes of SQLite (https://www.sqlite.org/rescode.html): busy, locked, I/O error, full,
# cannot open.
_SQLITE = {5, 6, 10, 13, 14}
# Classes and codes of SQLSTATE (PostgreSQL's documentation, appendix A): connection exceptions,
# too many connections, shutdown and recovery.
_SQLSTATES = ("08", "53300", "57P")

# Errors of MariaDB's and MySQL's servers and client libraries (mariadb.com/kb, "MariaDB Error Code
# Reference"): too many connections, shutdown, and links that cannot be made or are lost.
_MYSQL = {1040, 1053, 1077, 1152, 1203, 2002, 2003, 2006, 2013, 2055}


def is_away(error: BaseException) -> bool:
    """Return whether ``error``, or what it was raised from, is a failure of a database's link.

    SQLAlchemy's, Django's, psycopg's (2 and 3), asyncpg's, PyMySQL's, mysqlclient's and SQLite's
    exceptions are understood.
    """
    seen: set[int] = set()
    found: BaseException | None = error
    while found is not None and id(found) not in seen:
        seen.add(id(found))
        if _is_link_failure(found):
            return True
        original = getattr(found, "orig", None)  # SQLAlchemy's
        found = original if isinstance(original, BaseException) else found.__cause__
    return False


def _is_link_failure(error: BaseException) -> bool:
    if _is_of("sqlite3", "OperationalError", error):
        return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _SQLITE
    if _is_of("sqlalchemy.exc", "DBAPIError", error):
        return bool(getattr(error, "connection_invalidated", False))
    for module in ("pymysql", "MySQLdb"):
        if _is_of(module, "OperationalError", error):
            return bool(error.args) and error.args[0] in _MYSQL
    if isinstance(error, OSError):
        return _is_from("asyncpg.connect_utils", error)  # which raises what its socket has raised
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    for module in ("psycopg", "psycopg2", "asyncpg"):
        if _is_of(module, "OperationalError", error) or _is_of(module, "PostgresError", error):
            # Without a state it was the client library that said so: no connection, or lost.
            return state is None or str(state).startswith(_SQLSTATES)
        if _is_of(module, "InterfaceError", error) and "closed" in str(error):
            return True
    return False


def _is_from(module: str, error: BaseException) -> bool:
    """Return whether ``error`` has come out of a function of ``module``."""
    step = error.__traceback__
    while step is not None:
        if step.tb_frame.f_globals.get("__name__") == module:
            return True
        step = step.tb_next
    return False


def _is_of(module: str, name: str, error: BaseException) -> bool:
    """Return whether ``error`` is of a class of a module that may not be imported at all."""
    found: Any = getattr(sys.modules.get(module), name, None)
    return isinstance(found, type) and isinstance(error, found)
