"""Queues in PostgreSQL to compare, each set up as its documentation describes.

Publishers commit each chunk, with 200 bytes of JSON an event, before they send the next. Consumers
have a handler that counts; none of them keeps what is done, and none logs a line per message. Each
measurement runs in a new process, and a contender's module is imported only there.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

__all__ = ["CONSUMERS", "MAKERS", "PUBLISHERS", "TABLES", "Contender"]

MAKERS = ("outbox_", "procrastinate_", "pgqueuer_")
"""The modules with a function ``make`` that creates their tables."""

TABLES = ("outbox_events", "procrastinate_jobs", "pgqueuer", "pgqueuer_log")
"""The tables that grow, emptied before each measurement."""


@dataclass(frozen=True, slots=True)
class Contender:
    """A contender that publishes or consumes.

    Attributes:
        name: its name in the table.
        module: the module in this package.
        function: the function in the module. It takes a URL, and the sizes of a publisher's chunk
            and of the work; it returns events per second.
        options: keyword arguments of the function.
    """

    name: str
    module: str
    function: str
    options: Mapping[str, Any] = field(default_factory=dict)

    def publish(self, url: str, chunk: int, count: int) -> float:
        """Publish ``count`` events in chunks; return events per second."""
        rate: float = self._function(url, chunk, count, **self.options)
        return rate

    def consume(self, url: str, count: int) -> float:
        """Put ``count`` messages into the queue, and consume them; return messages per second."""
        rate: float = self._function(url, count, **self.options)
        return rate

    @property
    def _function(self) -> Callable[..., float]:
        function: Callable[..., float] = getattr(
            importlib.import_module(f"{__name__}.{self.module}"), self.function
        )
        return function


PUBLISHERS = {
    "outbox": Contender("**outbox, `publish()`**", "outbox_", "publish"),
    "by hand": Contender("psycopg `executemany`, the same table", "by_hand", "publish"),
    "procrastinate": Contender("Procrastinate `defer`, `batch_defer`", "procrastinate_", "publish"),
    "pgqueuer": Contender("PgQueuer `enqueue`, psycopg", "pgqueuer_", "publish"),
    "pgqueuer asyncpg": Contender("PgQueuer `enqueue`, asyncpg", "pgqueuer_", "publish_asyncpg"),
}

CONSUMERS = {
    "outbox": Contender("**outbox, 8 threads**", "outbox_", "consume"),
    "outbox asyncio": Contender("**outbox, asyncio, 100 tasks**", "outbox_", "consume_async"),
    "outbox SQLite": Contender(
        "outbox on SQLite, 8 threads, `synchronous=normal`", "outbox_", "consume_sqlite"
    ),
    "by hand": Contender(
        "psycopg, the same table: lease 100, delete 100, no handler", "by_hand", "consume"
    ),
    "procrastinate": Contender(
        "Procrastinate, `concurrency=10`, `delete_jobs=always`", "procrastinate_", "consume"
    ),
    "pgqueuer": Contender(
        "PgQueuer, psycopg, `batch_size=100`", "pgqueuer_", "consume", {"batch": 100}
    ),
    "pgqueuer asyncpg": Contender(
        "PgQueuer, asyncpg, `batch_size=10` (default)",
        "pgqueuer_",
        "consume_asyncpg",
        {"batch": 10},
    ),
    "pgqueuer asyncpg 100": Contender(
        "PgQueuer, asyncpg, `batch_size=100`", "pgqueuer_", "consume_asyncpg", {"batch": 100}
    ),
}
