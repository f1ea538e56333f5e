"""The only place where the exceptions of servers' drivers become outbox's."""

from __future__ import annotations

from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    IntegrityError,
    SQLAlchemyError,
    StatementError,
)

from outbox.errors import BrokerError, ConnectFailed, ConnectionLost, UsageError
from outbox.storage.failures import reason_of

__all__ = ["DATABASE_ERRORS", "is_failure", "of_server"]

DATABASE_ERRORS = (SQLAlchemyError, OSError)
"""The exceptions that connecting, reading and writing may raise."""


def is_failure(error: BaseException) -> bool:
    """Return whether the database failed, as opposed to an event not fitting its table."""
    if isinstance(error, DataError | IntegrityError):
        return False
    return isinstance(error, DBAPIError) or not isinstance(error, StatementError)


def of_server(error: Exception, name: str, *, connecting: bool) -> BrokerError:
    """Return outbox's error for ``error``, which becomes its cause.

    Args:
        error: a UsageError about the tables or the server, or the driver's error.
        name: the database, without a password.
        connecting: whether there was no connection yet.
    """
    broker_error: BrokerError
    if isinstance(error, UsageError):
        broker_error = ConnectFailed(str(error))
    elif connecting:
        broker_error = ConnectFailed(f"{name} cannot be reached: {reason_of(error)}")
    else:
        broker_error = ConnectionLost(f"{name} cannot be used: {reason_of(error)}")
    broker_error.__cause__ = error
    return broker_error
