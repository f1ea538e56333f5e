"""The one table that turns SQLite's exceptions into outbox's."""

from __future__ import annotations

import sqlite3

from sqlalchemy.exc import DatabaseError, DBAPIError, InternalError, OperationalError

from outbox.errors import Blocked, BrokerError, ConnectionLost

__all__ = ["DATABASE_ERRORS", "is_busy", "is_failure", "of_database"]

DATABASE_ERRORS = (DBAPIError, sqlite3.Error, OSError)
"""What reading and writing may raise."""

_FAILURES = (
    (OperationalError, InternalError, DatabaseError),
    (sqlite3.OperationalError, sqlite3.InternalError, sqlite3.DatabaseError),
)


def is_failure(error: BaseException) -> bool:
    """Return whether it is the database's failure, and not about what was to be written."""
    # DatabaseError itself (a damaged file), not what is derived from it: bad data, bad statements.
    return isinstance(error, OSError) or any(
        isinstance(error, (operational, internal)) or type(error) is other
        for operational, internal, other in _FAILURES
    )


def is_busy(error: BaseException) -> bool:
    """Return whether another process holds the lock."""
    return _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_PROTOCOL)


def of_database(error: BaseException, path: str) -> BrokerError:
    """Return what to tell of ``error``, with it as the cause."""
    cause = getattr(error, "orig", None) or error
    found: BrokerError
    if is_busy(error):
        found = Blocked(f"another process has kept {path} locked: {cause}")
    elif _code(error) == sqlite3.SQLITE_FULL:
        found = Blocked(f"there is no room for {path}: {cause}")
    else:
        found = ConnectionLost(f"{path} cannot be used: {cause}")
    found.__cause__ = error
    return found


def _code(error: BaseException) -> int:
    cause = getattr(error, "orig", None) or error
    code = getattr(cause, "sqlite_errorcode", 0) or 0
    return int(code) & 0xFF  # without what extends it (https://www.sqlite.org/rescode.html)
