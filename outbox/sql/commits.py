"""The commits of the application's transactions, told to whoever watches them in this context.

All of SQLAlchemy's end in those of a ``Connection``: a session's, and those of asyncio, too. The
event is the last moment before the commit, in which the transaction is still open: what is
executed in it is committed with the rest.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, Protocol

from sqlalchemy import Connection, Engine, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError

__all__ = ["Watcher", "has_changes", "is_autocommit", "listen", "unwatched", "watch"]

_CHANGES = "outbox.sql: changes before this transaction"


class Watcher(Protocol):
    """What is told."""

    def before_commit(self, connection: Connection) -> None:
        """A transaction is about to be committed, or prepared; what this raises takes it back."""
        ...

    def not_committed(self, connection: Connection) -> None:
        """The present transaction was not committed after all, as far as anybody knows."""
        ...


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def watch(watcher: Watcher | None) -> None:
    """Tell ``watcher`` of the commits in this context from now on; None ends that."""
    _watcher.set(watcher)


@contextlib.contextmanager
def unwatched() -> Iterator[None]:
    """Tell nobody of what is committed in the block: it is our own."""
    token = _watcher.set(None)
    try:
        yield
    finally:
        _watcher.reset(token)


def listen() -> None:
    """Have SQLAlchemy tell us of all commits in this process; once is enough, and again no harm."""
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
    """Return whether each statement is committed by itself, and a commit does nothing."""
    default = getattr(where.dialect, "_on_connect_isolation_level", None)
    level: object = where.get_execution_options().get("isolation_level", default)
    return level == "AUTOCOMMIT"


def has_changes(connection: Connection) -> bool:
    """Return whether the present transaction has written, or locked, anything.

    Where that cannot be told it has. One that has failed already, and will be rolled back instead
    of committed, has not.
    """
    try:
        if connection.dialect.name == "sqlite":
            before: int | None = connection.info.get(_CHANGES)
            present = _changes(connection)
            return before is None or present is None or before != present
        # PostgreSQL numbers a transaction when it first writes.
        found = connection.exec_driver_sql("SELECT txid_current_if_assigned()")
        return found.scalar() is not None
    except DBAPIError as error:
        if error.connection_invalidated:
            raise
        return False


def _changes(connection: Connection) -> int | None:
    """Return how many rows a connection to SQLite has changed since it was opened, if known."""
    found: int | None = getattr(connection.connection.driver_connection, "total_changes", None)
    return found


def _on_begin(connection: Connection) -> None:
    if _watcher.get() is not None and connection.dialect.name == "sqlite":
        connection.info[_CHANGES] = _changes(connection)


def _on_commit(connection: Connection) -> None:
    watcher = _watcher.get()
    if watcher is None:
        return
    try:
        watcher.before_commit(connection)
    except BaseException:
        _take_back(connection)
        raise


def _on_prepare(connection: Connection, xid: Any) -> None:
    _on_commit(connection)


def _on_commit_twophase(connection: Connection, xid: Any, is_prepared: bool) -> None:
    if not is_prepared:  # else that was the last moment
        _on_commit(connection)


def _on_rollback_twophase(connection: Connection, xid: Any, is_prepared: bool) -> None:
    if (watcher := _watcher.get()) is not None:
        watcher.not_committed(connection)


def _on_error(context: ExceptionContext) -> None:
    if (watcher := _watcher.get()) is not None and context.connection is not None:
        watcher.not_committed(context.connection)


def _take_back(connection: Connection) -> None:
    """Roll back what was about to be committed.

    SQLAlchemy takes a commit that has failed for the end of the transaction, and returns the
    connection to its pool as it is: whoever gets it next would commit what is left in it.
    """
    with contextlib.suppress(Exception):  # of a connection that is broken already
        connection.connection.rollback()
