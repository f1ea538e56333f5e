"""The databases of handlers: fresh connections for every message, and which errors are theirs.

A worker runs for months. A session that was left in a transaction, or a connection that a database
or a firewall has closed meanwhile, must not become the next message's failure. A database that is
away is not the message's fault, which is held until the database is back.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from outbox import sinks

__all__ = ["is_away", "refreshers"]

# Result codes of SQLite (https://www.sqlite.org/rescode.html): busy, locked, I/O error, full,
# cannot open.
_SQLITE = {5, 6, 10, 13, 14}
# Classes and codes of SQLSTATE (PostgreSQL's documentation, appendix A): connection exceptions,
# too many connections, shutdown and recovery.
_SQLSTATES = ("08", "53300", "57P")
# Errors of MariaDB's and MySQL's servers and client libraries (mariadb.com/kb, "MariaDB Error Code
# Reference"): too many connections, shutdown, and links that cannot be made or are lost.
_MYSQL = {1040, 1053, 1077, 1152, 1203, 2002, 2003, 2006, 2013, 2055}


def refreshers(*, is_async: bool) -> list[Callable[[], Any]]:
    """Return what is to be called before and after a message, where its handler runs.

    - Django's connections are closed that are broken or older than ``CONN_MAX_AGE``, as Django does
      it around a request.
    - The session that ``outbox.sql.bind()`` was given is removed, if it is a scoped one.

    Args:
        is_async: for a coroutine: what it returns may have to be awaited.
    """
    found: list[Callable[[], Any]] = []
    django: Any = sys.modules.get("django.db")
    if django is not None and sys.modules["django.conf"].settings.configured:
        close = django.close_old_connections
        if is_async:
            # Where sync_to_async runs what uses Django's connections.
            close = sys.modules["asgiref.sync"].sync_to_async(close)
        found.append(close)
    remove = sinks.remove
    if remove is not None and (is_async or not inspect.iscoroutinefunction(remove)):
        found.append(remove)
    return found


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
