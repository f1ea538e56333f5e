"""The channels on which rows are announced."""

from __future__ import annotations

import hashlib
from typing import Any

from sqlalchemy import Engine

__all__ = ["RELAY_CHANNEL", "RESULTS_CHANNEL", "can_listen", "channel_of"]

RELAY_CHANNEL = "outbox_events"
"""The channel on which new rows for relays are announced."""

RESULTS_CHANNEL = "outbox_results"
"""The channel on which results of tasks are announced, whatever the schema of their table."""

_DRIVERS = ("psycopg", "psycopg2")


def channel_of(queue: str, schema: str | None = None) -> str:
    """Return the channel on which new rows of ``queue`` are announced.

    A channel for each queue, so that a message wakes only the workers that may take it.

    Args:
        queue: the name of the queue; not ``""``, the relay's.
        schema: the schema of the table, if it was chosen.
    """
    # A channel's name has at most 63 bytes.
    digest = hashlib.blake2b(f"{schema or ''}\0{queue}".encode(), digest_size=10).hexdigest()
    return f"{RELAY_CHANNEL}_{digest}"


def can_listen(engine: Engine) -> bool:
    """Return whether ``engine`` supports notifications: PostgreSQL, with a driver known here."""
    return engine.dialect.name == "postgresql" and engine.driver in _DRIVERS


def connected(engine: Engine) -> Any:
    """Return a new connection of the driver in autocommit mode, which no pool knows.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the database can't be reached.
    """
    connection = engine.raw_connection()
    driver: Any = connection.driver_connection
    connection.detach()
    driver.autocommit = True
    return driver
