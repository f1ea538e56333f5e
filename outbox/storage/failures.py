"""The reasons of database failures, without the statement and its parameters: fit for a log."""

from __future__ import annotations

from sqlalchemy.exc import SQLAlchemyError

__all__ = ["DatabaseError", "reason_of"]

DatabaseError = SQLAlchemyError
"""Whatever SQLAlchemy raises about a database."""


def reason_of(error: Exception) -> str:
    """Return what the driver said, in a line."""
    return str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
