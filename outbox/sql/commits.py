"""Notifications about the commits of the application's transactions in this context.

In SQLAlchemy every commit, also that of a session and under asyncio, ends in that of a
``Connection``. Its event fires just before the commit, while the transaction is still open: a
statement executed in the event is committed with the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError

from outbox.storage.schema import dialect_of

__all__ = [
    "Watcher",
    "commits_by_itself",
    "has_changes",
    "is_autocommit",
    "listen",
    "unwatched",
    "watch",
]

_CHANGES = "outbox.sql: changes before this transaction"
_IN_TRANSACTION = 1  # SERVER_STATUS_IN_TRANS, in the protocol of MariaDB
_MARIADB_CHANGES = (
    "SELECT SUM(VARIABLE_VALUE) FROM information_schema.SESSION_STATUS WHERE VARIABLE_NAME IN "
    "('HANDLER_WRITE', 'HANDLER_UPDATE', 'HANDLER_DELETE')"
)


class Watcher(Protocol):
    """An object that is notified of commits."""

    def before_commit(self, connection: Connection) -> None:
        """React to a coming commit or prepare; an exception rolls the transaction back."""
        ...

    def not_committed(self, connection: Connection) -> None:
        """React to a commit that failed, or whose result is unknown."""
        ...


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def watch(watcher: Watcher | None) -> None:
    """Notify ``watcher`` of the commits in this context from now on; None ends that."""
    _watcher.set(watcher)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Notify no watcher of commits in the block, which are outbox's."""
    token = _watcher.set(None)
    try:
        yield
    finally:
        _watcher.reset(token)


def listen() -> None:
    """Register for all commits in this process; further calls do nothing."""
    for name, function in (
        ("begin", _on_begin),
        ("commit", _on_commit),
        ("prepare_twophase", _on_prepare),
        ("commit_twophase", _on_commit_twophase),
        ("rollback_twophase", _on_rollback_twophase),
        ("handle_error", _on_error),
    ):
        if not event.contains(Engine, name, function):
            event.listen(Engine, name, function)


def is_autocommit(where: Engine | Connection) -> bool:
    """Return whether each statement is committed at once, so that a commit does nothing."""
    default = getattr(where.dialect, "_on_connect_isolation_level", None)
    level: object = where.get_execution_options().get("isolation_level", default)
    return level == "AUTOCOMMIT"


def commits_by_itself(connection: Connection) -> bool:
    """Return whether the driver commits each statement, for a connection that is in a transaction.

    SQLAlchemy doesn't know of it: it was set on the driver's connection, or in ``connect_args``.
    """
    driver_connection: Any = connection.connection.driver_connection
    if connection.dialect.name != "sqlite":
        is_open = getattr(driver_connection, "is_in_transaction", None)
        if is_open is not None:  # asyncpg; SQLAlchemy begins with the first statement
            adapted: Any = connection.connection.dbapi_connection
            return getattr(adapted, "isolation_level", None) == "autocommit"
        mode = getattr(driver_connection, "get_autocommit", None)
        if mode is not None:  # PyMySQL, mysqlclient and others: what the server has said last
            status = getattr(driver_connection, "server_status", 0)
            return bool(mode()) and not status & _IN_TRANSACTION
        return getattr(driver_connection, "autocommit", False) is True
    if driver_connection.in_transaction:
        return False
    mode = getattr(driver_connection, "_conn", driver_connection)  # of aiosqlite
    # Python 3.12 has the attribute; where it is not a bool, isolation_level decides.
    autocommit = getattr(mode, "autocommit", None)
    if isinstance(autocommit, bool):
        return autocommit
    return driver_connection.isolation_level is None


def has_changes(connection: Connection) -> bool:
    """Return whether the current transaction has written anything; True if unknown.

    On PostgreSQL also whether it has locked rows.

    A transaction that has already failed has not: it will be rolled back instead of committed.
    """
    try:
        if connection.dialect.name == "postgresql":
            # PostgreSQL assigns a number to a transaction at its first write.
            number = connection.exec_driver_sql("SELECT txid_current_if_assigned()")
            return number.scalar() is not None
        before: int | None = connection.info.get(_CHANGES)
        after = _changes(connection)
        return before is None or after is None or before != after
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        return False


def _changes(connection: Connection) -> int | None:
    """Return how many rows a connection has changed since it was opened, if known."""
    dialect = dialect_of(connection.dialect.name)
    if dialect == "mariadb":
        return int(connection.exec_driver_sql(_MARIADB_CHANGES).scalar_one())
    if dialect == "sqlite":
        count: int | None = getattr(connection.connection.driver_connection, "total_changes", None)
        return count
    return None


def _on_begin(connection: Connection) -> None:
    if _watcher.get() is not None:
        connection.info[_CHANGES] = _changes(connection)


def _on_commit(connection: Connection) -> None:
    watcher = _watcher.get()
    if watcher is None:
        return
    try:
        watcher.before_commit(connection)
    except BaseException:
        _roll_back(connection)
        raise


def _on_prepare(connection: Connection, xid: Any) -> None:
    _on_commit(connection)


def _on_commit_twophase(connection: Connection, xid: Any, is_prepared: bool) -> None:
    if not is_prepared:  # else the watcher was notified before the prepare
        _on_commit(connection)


def _on_rollback_twophase(connection: Connection, xid: Any, is_prepared: bool) -> None:
    if (watcher := _watcher.get()) is not None:
        watcher.not_committed(connection)


def _on_error(context: ExceptionContext) -> None:
    if (watcher := _watcher.get()) is not None and context.connection is not None:
        watcher.not_committed(context.connection)


def _roll_back(connection: Connection) -> None:
    """Roll back the transaction whose commit was about to begin.

    To SQLAlchemy a commit that failed ends the transaction, so it returns the connection to its
    pool with the changes still pending: the next user of the connection would commit them.
    """
    with contextlib.suppress(Exception):  # the connection may be broken already
        connection.connection.rollback()
