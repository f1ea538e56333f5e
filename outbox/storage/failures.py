"""Database errors as log text: without the statement and its parameters, which may be private."""

from __future__ import annotations

from sqlalchemy.exc import SQLAlchemyError

__all__ = ["DatabaseError", "reason_of"]

DatabaseError = SQLAlchemyError
"""The base class of all that SQLAlchemy raises about a database."""


def reason_of(error: Exception) -> str:
    """Return the first line of the driver's message, without the values that some add to it."""
    cause = getattr(error, "orig", None) or error
    message = getattr(getattr(cause, "diag", None), "message_primary", None)
    if message is None and len(cause.args) == 2:  # number and message: PyMySQL, mysqlclient
        message = cause.args[1]
    return str(message or cause).strip().partition("\n")[0]
