"""The databases of handlers: fresh connections for every message, and detection of lost ones.

A worker runs for months. A session left in a transaction, or a connection that the database or a
firewall has closed meanwhile, must not make the next message fail. An unavailable database is not
the message's fault either: the message is held until the database is back.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

from outbox import sinks
from outbox.consumers.raised import causes, leaves

__all__ = ["is_unavailable", "refreshers"]

# Result codes of SQLite (https://www.sqlite.org/rescode.html): busy, locked, I/O error, full,
# cannot open.
_SQLITE = {5, 6, 10, 13, 14}
# Classes and codes of SQLSTATE (PostgreSQL's documentation, appendix A): connection exceptions,
# too many connections, shutdown or recovery.
_SQLSTATES = ("08", "53300", "57P")
# Errors of MariaDB's and MySQL's servers and client libraries (mariadb.com/kb, "MariaDB Error Code
# Reference"): too many connections, shutdown, and connections that fail or are lost.
_MYSQL = {1040, 1053, 1077, 1152, 1203, 2002, 2003, 2006, 2013, 2055}


def refreshers(*, is_async: bool) -> list[Callable[[], Any]]:
    """Return the functions to call before and after a message, in its handler's thread or task.

    - Django's connections are closed if they are broken or older than ``CONN_MAX_AGE``, and forget
      the queries that they have noted, as Django does around a request; but not those that a test
      has in a transaction.
    - The session given to ``outbox.sql.bind()`` is removed, if it is a scoped one.

    Args:
        is_async: True for a coroutine handler: then the results may have to be awaited.
    """
    functions: list[Callable[[], Any]] = []
    django: Any = sys.modules.get("django.db")
    if django is not None and sys.modules["django.conf"].settings.configured:
        refresh = _refresh_django
        if is_async:
            # Connections belong to a thread: this is the one that runs the handler's ORM calls.
            refresh = sys.modules["asgiref.sync"].sync_to_async(refresh)
        functions.append(refresh)
    remove = sinks.remove
    if remove is not None and (is_async or not inspect.iscoroutinefunction(remove)):
        functions.append(remove)
    return functions


def _refresh_django() -> None:
    """Refresh Django's connections of this thread."""
    for connection in sys.modules["django.db"].connections.all(initialized_only=True):
        if connection.in_atomic_block:  # the transaction of a test, which a handler joins
            continue
        if not connection.force_debug_cursor:  # a test counts its queries
            connection.queries_log.clear()  # with DEBUG, there would be thousands in a worker
        connection.close_if_unusable_or_obsolete()


def is_unavailable(error: BaseException) -> bool:
    """Return whether ``error``, or one of its causes, says that a database is unavailable.

    It knows the exceptions of SQLAlchemy, Django, psycopg (2 and 3), asyncpg, PyMySQL, mysqlclient
    and SQLite. A group says so if all its members do.
    """
    for cause in causes(error):
        if isinstance(cause, BaseExceptionGroup):
            return all(map(is_unavailable, leaves(cause)))
        if _is_connection_failure(cause):
            return True
    return False


def _is_connection_failure(error: BaseException) -> bool:
    if _is_of("sqlite3", "OperationalError", error):
        return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _SQLITE
    if _is_of("sqlalchemy.exc", "DBAPIError", error):
        return bool(getattr(error, "connection_invalidated", False))
    for module in ("pymysql", "MySQLdb"):
        if _is_of(module, "OperationalError", error):
            return bool(error.args) and error.args[0] in _MYSQL
        if _is_of(module, "InterfaceError", error):
            return bool(error.args) and error.args[0] == 0  # the connection is closed
    if isinstance(error, OSError):
        return _is_from("asyncpg.connect_utils", error)  # asyncpg doesn't wrap its socket's errors
    state = getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    for module in ("psycopg", "psycopg2", "asyncpg"):
        if _is_of(module, "OperationalError", error) or _is_of(module, "PostgresError", error):
            # Errors without a state come from the client library: no connection, or a lost one.
            return state is None or str(state).startswith(_SQLSTATES)
        if _is_of(module, "InterfaceError", error) and "closed" in str(error):
            return True
    return False


def _is_from(module: str, error: BaseException) -> bool:
    """Return whether ``error`` was raised through a function of ``module``."""
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_globals.get("__name__") == module:
            return True
        traceback = traceback.tb_next
    return False


def _is_of(module: str, name: str, error: BaseException) -> bool:
    """Return whether ``error`` is of that class; its module need not be imported."""
    kind: Any = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(error, kind)
