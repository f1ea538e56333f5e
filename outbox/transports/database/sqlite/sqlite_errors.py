"""The only place where SQLite's exceptions become outbox's."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DatabaseError, DBAPIError, InternalError, OperationalError

from outbox.errors import Blocked, BrokerError, ConnectionLost

__all__ = ["DATABASE_ERRORS", "is_busy", "is_failure", "of_database"]

DATABASE_ERRORS = (DBAPIError, sqlite3.Error, OSError)
"""The exceptions that reading and writing may raise."""

_FAILURES = (
    (OperationalError, InternalError, DatabaseError),
    (sqlite3.OperationalError, sqlite3.InternalError, sqlite3.DatabaseError),
)


def is_failure(error: BaseException) -> bool:
    """Return whether the database failed, as opposed to the data or statement being bad."""
    # DatabaseError itself is a damaged file; its other subclasses are bad data and bad statements.
    return isinstance(error, OSError) or any(
        isinstance(error, (operational, internal)) or type(error) is other
        for operational, internal, other in _FAILURES
    )


def is_busy(error: BaseException) -> bool:
    """Return whether another process holds the lock."""
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)


def of_database(error: BaseException, path: str) -> BrokerError:
    """Return outbox's error for ``error``, which becomes its cause."""
    cause = getattr(error, "orig", None) or error
    broker_error: BrokerError
    if is_busy(error):
        broker_error = Blocked(f"another process has kept {path} locked: {cause}")
    elif _code(error) == sqlite3.SQLITE_FULL:
        broker_error = Blocked(f"no space left for {path}: {cause}")
    else:
        broker_error = ConnectionLost(f"{path} cannot be used: {cause}")
    broker_error.__cause__ = error
    return broker_error


def _code(error: BaseException) -> int:
    cause = getattr(error, "orig", None) or error
    code = getattr(cause, "sqlite_errorcode", 0) or 0
    return int(code) & 0xFF  # the primary result code (https://www.sqlite.org/rescode.html)
