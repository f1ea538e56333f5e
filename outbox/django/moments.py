"""The times in outbox's tables, which Django's own fields would write in other ways.

PostgreSQL has aware times, MariaDB times in UTC without saying so, and SQLite seconds since the
epoch, all to the microsecond, whatever ``USE_TZ`` and ``TIME_ZONE`` say.
"""

from __future__ import annotations

import datetime
import zoneinfo
from typing import Any

from django.db import models

__all__ = ["NOW", "MomentField", "in_column", "seconds_since"]

_UTC = datetime.UTC
_TYPES = {"postgresql": "timestamp with time zone", "sqlite": "real", "mysql": "datetime(6)"}


_SQLITE_NOW = "((julianday('now') - 2440587.5) * 86400.0)"
NOW = {
    "postgresql": "statement_timestamp()",
    "sqlite": _SQLITE_NOW,
    "mysql": "UTC_TIMESTAMP(6)",
}
"""The SQL of the present, by the database's clock, for each vendor."""


def seconds_since(column: str, vendor: str) -> str:
    """Return the SQL of the seconds since the time in a column, by the database's clock."""
    if vendor == "postgresql":
        return f"EXTRACT(EPOCH FROM ({NOW[vendor]} - {column}))"
    if vendor == "mysql":
        return f"(TIMESTAMPDIFF(MICROSECOND, {column}, {NOW[vendor]}) / 1000000)"
    return f"({NOW[vendor]} - {column})"


def in_column(moment: datetime.datetime, vendor: str) -> Any:
    """Return an aware datetime as the database's driver takes it."""
    if vendor == "sqlite":
        return moment.timestamp()
    if vendor == "mysql":
        return moment.astimezone(_UTC).replace(tzinfo=None)
    return moment


class MomentField(models.Field):
    """An instant, always an aware datetime in UTC."""

    def db_type(self, connection: Any) -> str | None:
        """Return the column's type, as in outbox's own schema."""
        return _TYPES.get(connection.vendor)

    def from_db_value(self, value: Any, _expression: Any, connection: Any) -> Any:
        """Return an aware datetime in UTC."""
        if value is None:
            return None
        if connection.vendor == "sqlite":
            return datetime.datetime.fromtimestamp(value, _UTC)
        if (
            value.tzinfo is None
        ):  # with USE_TZ=False PostgreSQL's times are in the connection's zone
            name = connection.timezone_name if connection.vendor == "postgresql" else "UTC"
            value = value.replace(tzinfo=zoneinfo.ZoneInfo(name))
        return value.astimezone(_UTC)

    def get_db_prep_value(self, value: Any, connection: Any, prepared: bool = False) -> Any:
        """Return ``value``, an aware datetime, for the driver."""
        if not isinstance(value, datetime.datetime):
            return value
        return in_column(value, connection.vendor)
