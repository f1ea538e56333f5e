"""Which queues there are, and what they are bound to: a table beside the events."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Column, Connection, MetaData, String, Table, select
from sqlalchemy.dialects.sqlite import insert

__all__ = ["Binding", "add", "bindings", "create", "load", "of_queue"]

_metadata = MetaData()

# Every queue is bound to the exchange "" by its name, which is what makes it a queue.
bindings = Table(
    "outbox_bindings",
    _metadata,
    Column("queue", String(255), primary_key=True),
    Column("exchange", String(255), primary_key=True),
    Column("pattern", String(255), primary_key=True),
    sqlite_with_rowid=False,
)


class Binding(NamedTuple):
    """That a queue gets what is published to an exchange with targets of a pattern."""

    queue: str
    exchange: str
    pattern: str


def of_queue(name: str) -> Binding:
    """Return the binding that makes ``name`` a queue."""
    return Binding(name, "", name)


def create(connection: Connection) -> None:
    """Create the table unless it is there."""
    _metadata.create_all(connection)


def load(connection: Connection) -> list[Binding]:
    """Return all bindings."""
    return [Binding(*row) for row in connection.execute(select(bindings))]


def add(connection: Connection, found: Sequence[Binding]) -> None:
    """Add bindings; those that are there stay."""
    values = [one._asdict() for one in found]
    connection.execute(insert(bindings).on_conflict_do_nothing(), values)
