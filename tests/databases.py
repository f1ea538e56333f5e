"""An application's database and tables, for tests of stored events and the inbox."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from sqlalchemy import ForeignKey, ForeignKeyConstraint, String, create_engine, make_url, text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool

__all__ = ["Base", "Effect", "Failover", "Line", "Order", "failing_over", "targets"]


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


class Failover:
    """A database whose server becomes read-only for new connections, like a former primary.

    Attributes:
        url: the URL for an ordinary user, whom the mode concerns.
    """

    def __init__(self, url: str) -> None:
        self._admin = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        self._database = make_url(url).database
        self.url = url
        if self._admin.dialect.name != "postgresql":
            self._execute(
                "CREATE USER IF NOT EXISTS ordinary@127.0.0.1",
                f"GRANT ALL ON {self._database}.* TO ordinary@127.0.0.1",
            )
            self.url = make_url(url).set(username="ordinary").render_as_string(hide_password=False)

    def set_read_only(self, is_read_only: bool) -> None:
        value = "on" if is_read_only else "off"
        if self._admin.dialect.name == "postgresql":
            self._execute(
                "SET default_transaction_read_only = off",
                f"ALTER DATABASE {self._database} SET default_transaction_read_only = {value}",
            )
        else:
            self._execute(f"SET GLOBAL read_only = {value}")

    def _execute(self, *statements: str) -> None:
        with self._admin.connect() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)


@contextlib.contextmanager
def failing_over(url: str) -> Iterator[Failover]:
    """Give a database that is writable again at the end of the block."""
    failover = Failover(url)
    try:
        yield failover
    finally:
        failover.set_read_only(False)
