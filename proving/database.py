"""The application's database: what it says was committed is what was committed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self

from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from outbox.sql import metadata
from outbox.testing.postgresql import PrivatePostgreSQL
from proving.history import Journal
from proving.proxy import FaultProxy

__all__ = ["Database"]


class Database:
    """A PostgreSQL server, a proxy before it, and the tables in which applications leave rows.

    Attributes:
        server: may be killed, paused and started again.
        proxy: by way of which programs reach it.
    """

    def __init__(self) -> None:
        """Prepare; nothing runs yet."""
        self.server = PrivatePostgreSQL()
        self.proxy: FaultProxy

    def start(self) -> Self:
        """Start the server and its proxy, and make the tables."""
        self.server.start()
        self._engine = create_engine(self.server.url, poolclass=NullPool)
        metadata.create_all(self._engine)
        with self._engine.begin() as connection:
            connection.execute(text("CREATE TABLE units (name text PRIMARY KEY)"))
            connection.execute(text("CREATE TABLE effects (of text, id text)"))
        self.proxy = FaultProxy(self.server.url).start()
        return self

    def stop(self) -> None:
        """Stop both."""
        self.proxy.close()
        self.server.stop()

    def write_commits(self, history: Journal) -> None:
        """Write a ``commit`` for every unit of work that has left its row."""
        for (name,) in self._ask("SELECT name FROM units"):
            history.write("commit", unit=name)

    def write_effects(self, history: Journal) -> None:
        """Write an ``effect`` for everything that consumers have done."""
        for key, message_id in self._ask("SELECT of, id FROM effects"):
            history.write("effect", key=key, id=message_id)

    def waiting(self) -> int:
        """Return how many stored events are in the table, whatever their state."""
        [(count,)] = self._ask("SELECT count(*) FROM outbox_events")
        return int(count)

    def _ask(self, statement: str) -> list[Any]:
        def ask() -> list[Any]:
            with self._engine.connect() as connection:
                return list(connection.execute(text(statement)).all())

        return _patiently(ask)


def _patiently(ask: Callable[[], list[Any]]) -> list[Any]:
    for _ in range(50):
        try:
            return ask()
        except OperationalError:  # it is starting up
            time.sleep(0.1)
    return ask()
