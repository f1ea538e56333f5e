"""The application's database, which decides what was committed."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Self, cast

from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import NullPool

from outbox.sql import metadata
from outbox.testing.databases.postgresql import PrivatePostgreSQL
from proving.history import Journal
from proving.proxy import FaultProxy
from tests.pgbouncer import PrivatePgBouncer

__all__ = ["TENANTS", "Database"]

TENANTS = ("tenant1", "tenant2")
"""The schemas that have tables for stored events, beside the usual one."""
_TABLES = "outbox_events", *(f"{tenant}.outbox_events" for tenant in TENANTS)


class Database:
    """A PostgreSQL server, a proxy in front of it, and the tables of the applications.

    Attributes:
        server: the server; it may be killed, paused and restarted.
        proxy: the proxy through which programs reach the server.
    """

    def __init__(self, *, pooler: bool = False) -> None:
        """Prepare the server, and PgBouncer if ``pooler``; :meth:`start` starts them."""
        self.server = PrivatePostgreSQL()
        self.proxy: FaultProxy
        self._pooled = pooler
        self._pooler: PrivatePgBouncer | None = None

    def start(self) -> Self:
        """Start the server and its proxy, and create the tables."""
        self.server.start()
        self._engine = create_engine(self.server.url, poolclass=NullPool)
        metadata.create_all(self._engine)
        with self._engine.begin() as connection:
            connection.execute(text("CREATE TABLE units (name text PRIMARY KEY)"))
            connection.execute(text("CREATE TABLE effects (of text, id text)"))
        for tenant in TENANTS:
            with self._engine.begin() as connection:
                connection.execute(text(f"CREATE SCHEMA {tenant}"))
            of_tenant = self._engine.execution_options(schema_translate_map={None: tenant})
            metadata.create_all(of_tenant)
        self.proxy = FaultProxy(self.server.url).start()
        if self._pooled:
            self._pooler = PrivatePgBouncer(cast("Any", self.proxy))  # it needs the port only
            self._pooler.start()
        return self

    @property
    def pooler_url(self) -> str | None:
        """The URL of the database behind PgBouncer, if it was asked for."""
        if self._pooler is None:
            return None
        return self.server.url.replace(f":{self.server.port}/", f":{self._pooler.port}/")

    def stop(self) -> None:
        """Stop the server, its proxy and the pooler."""
        if self._pooler is not None:
            self._pooler.stop()
        self.proxy.close()
        self.server.stop()

    def write_commits(self, history: Journal) -> None:
        """Write a ``commit`` for every unit of work whose row is in the database."""
        for (name,) in self._query("SELECT name FROM units"):
            history.write("commit", unit=name)

    def write_effects(self, history: Journal) -> None:
        """Write an ``effect`` for every row that a consumer has inserted."""
        for key, message_id in self._query("SELECT of, id FROM effects"):
            history.write("effect", key=key, id=message_id)

    def write_results(self, history: Journal) -> None:
        """Write a ``result`` for every row that is kept of a task."""
        for task_id, status, value, error in self._query(
            "SELECT id, status, value, error FROM outbox_results"
        ):
            history.write("result", id=task_id, status=status, value=value, error=error)

    def waiting(self) -> int:
        """Return the number of stored events in the tables, in any state."""
        counts = " + ".join(f"(SELECT count(*) FROM {table})" for table in _TABLES)
        [(count,)] = self._query(f"SELECT {counts}")
        return int(count)

    def _query(self, statement: str) -> list[Any]:
        def query() -> list[Any]:
            with self._engine.connect() as connection:
                return list(connection.execute(text(statement)).all())

        return _retrying(query)


def _retrying(query: Callable[[], list[Any]]) -> list[Any]:
    for _ in range(50):
        try:
            return query()
        except OperationalError:  # the server may be starting
            time.sleep(0.1)
    return query()
