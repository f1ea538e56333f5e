"""Database errors as log text: without the statement and its parameters, which may be private."""

from __future__ import annotations

from sqlalchemy.exc import SQLAlchemyError

__all__ = ["DatabaseError", "reason_of"]

DatabaseError = SQLAlchemyError
"""The base class of all that SQLAlchemy raises about a database."""


def reason_of(error: Exception) -> str:
    """Return the first line of the driver's message."""
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
