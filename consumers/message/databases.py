"""The databases of handlers: fresh connections for every message, and detection of lost ones.

A worker runs for months. A session left in a transaction, or a connection that the database or a
firewall has closed meanwhile, must not make the next message fail. An unavailable database is not
the message's fault either: the message is held until the database is back.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable
from typing import Any

from outbox import sinks
from outbox.consumers.raised import causes, leaves

__all__ = ["could_only_read", "is_conflict", "is_unavailable", "refreshers"]

# Result codes of SQLite (https://www.sqlite.org/rescode.html): busy, locked, I/O error, full,
# cannot open.
_SQLITE = {5, 6, 10, 13, 14}
# Classes and codes of SQLSTATE (PostgreSQL's documentation, appendix A): connection exceptions,
# too many connections, shutdown or recovery.
_SQLSTATES = ("08", "53300", "57P")
# Errors of MariaDB's and MySQL's servers and client libraries (mariadb.com/kb, "MariaDB Error Code
# Reference"): too many connections, shutdown, and connections that fail or are lost.
_MYSQL = {1040, 1053, 1077, 1152, 1203, 2002, 2003, 2006, 2013, 2055}
# ... and a read-only mode, as of a primary that has become a replica. The first number stands for
# any option that prevents a statement, so its text decides. A transaction that was begun READ ONLY
# has another number, 1792.
_MYSQL_OPTION, _MYSQL_READ_ONLY = 1290, 1836
_READ_ONLY_OPTION = re.compile("read[-_]only")
_ONLY_READ = "25006"  # read_only_sql_transaction
_CONFLICTS = ("40001", "40P01")  # serialization_failure, deadlock_detected
_MYSQL_CONFLICTS = (1205, 1213)  # ER_LOCK_WAIT_TIMEOUT, ER_LOCK_DEADLOCK
_POSTGRESQL_DRIVERS = ("psycopg", "psycopg2", "asyncpg")
_MYSQL_DRIVERS = ("pymysql", "MySQLdb")


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

    A server that is read-only is unavailable, too: a failover has made it a replica. Of PostgreSQL
    that isn't certain; see :func:`could_only_read`.
    """
    for cause in causes(error):
        if isinstance(cause, BaseExceptionGroup):
            return all(map(is_unavailable, leaves(cause)))
        if _is_connection_failure(cause) or _says_only_read(cause):
            return True
    return False


def could_only_read(error: BaseException) -> bool:
    """Return whether ``error``, or one of its causes, says that a transaction could only read.

    PostgreSQL says this of every transaction on a standby, or on a server whose disk is full, and
    in the same words of one that the application itself has begun READ ONLY.
    """
    for cause in causes(error):
        if isinstance(cause, BaseExceptionGroup):
            return any(map(could_only_read, leaves(cause)))
        if _says_only_read(cause):
            return True
    return False


def is_conflict(error: BaseException) -> bool:
    """Return whether the database has undone a statement so that others could go on.

    It was a deadlock, a lock wait that took too long, or a serialization failure.
    """
    for cause in causes(error):
        if _state_of(cause) in _CONFLICTS:
            return True
        if any(_is_of(module, "OperationalError", cause) for module in _MYSQL_DRIVERS):
            return bool(cause.args) and cause.args[0] in _MYSQL_CONFLICTS
    return False


def _says_only_read(error: BaseException) -> bool:
    return _state_of(error) == _ONLY_READ


def _state_of(error: BaseException) -> str | None:
    """Return the SQLSTATE of an exception of one of PostgreSQL's drivers."""
    for module in _POSTGRESQL_DRIVERS:
        if _is_of(module, "Error", error) or _is_of(module, "PostgresError", error):
            return getattr(error, "sqlstate", None) or getattr(error, "pgcode", None)
    return None


def _is_connection_failure(error: BaseException) -> bool:
    if _is_of("sqlite3", "OperationalError", error):
        return (getattr(error, "sqlite_errorcode", 0) & 0xFF) in _SQLITE
    if _is_of("sqlalchemy.exc", "DBAPIError", error):
        return bool(getattr(error, "connection_invalidated", False))
    for module in _MYSQL_DRIVERS:
        if _is_of(module, "OperationalError", error):
            return bool(error.args) and _is_away(*error.args[:2])
        if _is_of(module, "InterfaceError", error):
            return bool(error.args) and error.args[0] == 0  # the connection is closed
    if isinstance(error, OSError):
        return _is_from("asyncpg.connect_utils", error)  # asyncpg doesn't wrap its socket's errors
    state = _state_of(error)
    for module in _POSTGRESQL_DRIVERS:
        if _is_of(module, "OperationalError", error) or _is_of(module, "PostgresError", error):
            # Errors without a state come from the client library: no connection, or a lost one.
            return state is None or state.startswith(_SQLSTATES)
        if _is_of(module, "InterfaceError", error) and "closed" in str(error):
            return True
    return False


def _is_away(number: object, text: object = "") -> bool:
    """Return whether MariaDB or MySQL says so by an error's number and text."""
    if number == _MYSQL_OPTION:
        return _READ_ONLY_OPTION.search(str(text)) is not None
    return number == _MYSQL_READ_ONLY or number in _MYSQL


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
