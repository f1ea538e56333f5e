"""Arrays of a column's values, for inserting many rows on PostgreSQL."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Dialect, Engine, String, Text, TypeDecorator, event
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.types import TypeEngine

__all__ = ["ArrayOf", "send_arrays_quickly"]


class _Values(list[Any]):
    """Values that psycopg sends in binary if the connection is prepared for that, else as text."""


class ArrayOf(TypeDecorator[Any]):
    """The values of a column of this type, all of them fit for the driver as they are."""

    impl = ARRAY
    cache_ok = True

    def __init__(self, type_: TypeEngine[Any]) -> None:
        # A cast to VARCHAR(255)[] would cut off what is too long, which must be refused.
        self.item = Text() if isinstance(type_, String) else type_
        super().__init__(self.item)

    def bind_processor(self, dialect: Dialect) -> Any:  # noqa: D102
        # As text, psycopg would look in Python at each value for what is to be escaped.
        return _Values if dialect.driver == "psycopg" else super().bind_processor(dialect)


def send_arrays_quickly(engine: Engine) -> None:
    """Prepare the connections of ``engine``, whose driver is psycopg, for :class:`ArrayOf`."""
    from psycopg.types.array import ListBinaryDumper

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        connection.adapters.register_dumper(_Values, ListBinaryDumper)
