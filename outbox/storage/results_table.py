"""The table of results: a row for each task that has begun, or was cancelled."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Column, Index, Integer, MetaData, SmallInteger, String, Table, Text, text
from sqlalchemy.dialects import mysql

from outbox.storage.clock import Timestamp
from outbox.storage.schema import MARIADB_OPTIONS, for_migrations

__all__ = ["results"]

_TEXT: Any = Text().with_variant(mysql.LONGTEXT(), "mariadb", "mysql")
_EMPTY = text("''")

results = Table(
    "outbox_results",
    MetaData(),
    Column("id", String(255), primary_key=True),
    Column("task", String(255), nullable=False, server_default=_EMPTY),
    Column("queue", String(255), nullable=False, server_default=_EMPTY),
    Column("status", String(10), nullable=False),
    Column("args", _TEXT),
    Column("value", _TEXT),
    Column("is_typed", SmallInteger, nullable=False, server_default=text("0")),
    Column("attempt", Integer, nullable=False, server_default=text("0")),
    Column("error_type", String(255)),
    Column("error", _TEXT),
    Column("traceback", _TEXT),
    # Made anew for each attempt, so that one which was given up can write nothing.
    Column("token", String(36)),
    Column("worker", String(255), nullable=False, server_default=_EMPTY),
    Column("enqueued_at", Timestamp),
    Column("started_at", Timestamp),
    Column("attempted_at", Timestamp),
    # The lease of the worker. Of a success: it is about to write the value.
    Column("running_until", Timestamp),
    Column("ended_at", Timestamp),
    Column("kept_until", Timestamp, nullable=False),
    **MARIADB_OPTIONS,
)
Index("outbox_results_kept", results.c.kept_until)
for_migrations(results)
