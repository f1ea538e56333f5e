"""An application's database and tables, for tests of stored events and the inbox."""

from __future__ import annotations

from typing import Any

from sqlalchemy import ForeignKey, ForeignKeyConstraint, String, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

__all__ = ["Base", "Effect", "Line", "Order", "targets"]


class Base(DeclarativeBase):
    """The tables of the application."""


class Order(Base):
    """A row that the application commits together with its events."""

    __tablename__ = "orders"
    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)


class Line(Base):
    """A line of an order, with a foreign key that is checked at the commit."""

    __tablename__ = "lines"
    id: Mapped[int] = mapped_column(primary_key=True)
    order_id: Mapped[int] = mapped_column(
        ForeignKey("orders.id", deferrable=True, initially="DEFERRED")
    )


class Effect(Base):
    """The effect of a handler: a row for each message handled."""

    __tablename__ = "effects"
    id: Mapped[int] = mapped_column(primary_key=True)
    of: Mapped[str] = mapped_column(String(100))


@compiles(ForeignKeyConstraint, "mariadb")
def _without_deferring(constraint: ForeignKeyConstraint, compiler: Any, **options: Any) -> str:
    """MariaDB checks each statement."""
    clause: str = compiler.visit_foreign_key_constraint(constraint, **options)
    return clause.replace(" DEFERRABLE INITIALLY DEFERRED", "")


def targets(connection: Any) -> list[str]:
    """Return the targets of all stored events, in the order of their rows."""
    rows = connection.execute(text("SELECT type FROM outbox_events ORDER BY seq"))
    return [row[0] for row in rows]
