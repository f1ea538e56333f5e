"""A database that messages are moved from."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any, Self

from sqlalchemy import ColumnElement, Connection, and_, delete, func, select, text

from outbox.event import Event
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.messages.delivery import QueueSpec, dead_letter_queue
from outbox.messages.rows import UNROUTED, event_of
from outbox.storage.clock import now
from outbox.storage.schema import events
from outbox.transports.database import routing
from outbox.transports.database.kinds import database_at
from outbox.transports.database.parked_queues import end_of_window, waits_in
from outbox.transports.database.routing import Binding
from outbox.transports.database.server.server_address import ServerAddress
from outbox.transports.database.sqlite.location import Location
from outbox.transports.message_source import Chosen, Moved, Publish, for_queue, published
from outbox.url import BrokerURL

__all__ = ["RowSource"]

_WINDOW = 1000

_IS_OPEN = """
import fcntl, sys
try:
    with open(sys.argv[1], "r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 128)
except FileNotFoundError:
    pass
except OSError:
    sys.exit(1)
"""
"""Exits with 1 if an SQLite connection has the file open.

Each holds a lock on that byte of the index of the write-ahead log (SQLite's ``os_unix.c``). In
another process, since closing the file would end the locks of this one's connections.
"""

_NAMED = text(
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
    "AND application_name = :name AND pid <> pg_backend_pid()"
)


class RowSource:
    """Rows of a database, locked in the transaction that deletes them when they are published.

    A lock, not a lease: it leaves the row as it is, with the time at which it is due, and ends with
    this process.
    """

    def __init__(self, url: BrokerURL, chosen: Chosen) -> None:
        """Check the URL, and that a file exists; nothing is connected yet."""
        self._url = url
        self._chosen = chosen
        self._database = database_at(url, must_exist=True)
        self._has_open_file = False
        self._bindings: list[Binding] = []
        self._queues: list[str] = []

    def __enter__(self) -> Self:
        """Connect, and read the bindings."""
        if self._url.scheme == "sqlite":
            index = f"{Location.of(self._url).path}-shm"
            command = [sys.executable, "-I", "-S", "-c", _IS_OPEN, index]
            self._has_open_file = subprocess.run(command, check=False, timeout=60).returncode == 1
        self._database.open()
        self._database.run(self._read)
        return self

    def _read(self, connection: Connection) -> None:
        self._bindings = routing.load(connection)
        alive = select(events.c.queue).where(events.c.dead_at.is_(None)).distinct()
        self._queues = sorted(connection.execute(alive).scalars())

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._database.end()

    def users(self) -> str | None:
        """Return who has an SQLite file open, is connected to PostgreSQL, or has leases."""
        if self._has_open_file:
            return "another process has the file open"
        if self._url.scheme == "postgresql":
            name = ServerAddress.of(self._url).connection_name
            found = self._database.run(
                lambda connection: int(connection.execute(_NAMED, {"name": name}).scalar_one())
            )
            if found:
                return f"{found} connection(s) of workers or publishers"
        return self.in_hand()

    def specs(self) -> list[QueueSpec]:
        """Return the consumers' queues that are chosen: those of modules, then as they are bound.

        A queue that is bound to several exchanges is in it several times.
        """
        specs = list(self._chosen.specs)
        declared = {spec.name for spec in specs if spec.topics}
        topics: dict[tuple[str, str], list[str]] = {}
        for queue, exchange, pattern in sorted(self._bindings):
            if queue not in declared and self._is_chosen(queue) and queue != PARKING_QUEUE:
                topics.setdefault((queue, exchange), []).append(pattern)
        queues = {queue for queue, _ in topics}
        for (queue, exchange), patterns in topics.items():
            base = queue.removesuffix(dead_letter_queue(""))
            if exchange or base == queue or base not in queues | declared:
                specs.append(QueueSpec(queue, tuple(patterns) if exchange else (), exchange))
        return specs

    def places(self) -> list[str]:
        """Return the queues with messages that are chosen; not the relay's."""
        return [queue for queue in self._queues if queue and self._is_chosen(queue)]

    def _is_chosen(self, queue: str) -> bool:
        if not self._chosen.specs:
            return True
        return queue in self._chosen.names() or (queue == UNROUTED and self._chosen.with_parked)

    def count(self, place: str) -> int:
        """Return the number of rows in ``place`` that are not leased."""
        return self._count(waits_in(place))

    def in_hand(self) -> str | None:
        """Return a text about the rows that are leased."""
        row = events.c
        is_leased = and_(
            row.lease_token.is_not(None), row.available_at > now(), row.dead_at.is_(None)
        )
        leased = sum(self._count(and_(row.queue == queue, is_leased)) for queue in self.places())
        return f"{leased} message(s) are leased by workers" if leased else None

    def _count(self, condition: ColumnElement[bool]) -> int:
        counted = select(func.count()).select_from(events).where(condition)
        return self._database.run(lambda connection: int(connection.execute(counted).scalar_one()))

    def move(self, place: str, publish: Publish) -> Iterator[Moved]:
        """Move the rows that are in ``place`` now, oldest first."""
        newest = select(func.max(events.c.seq)).where(waits_in(place))
        last = self._database.run(lambda connection: connection.execute(newest).scalar())
        after = 0
        while last is not None and after < last:
            window = functools.partial(self._move_window, place, after, last, publish)
            after, moved = self._database.run(window)
            yield moved

    def _move_window(
        self, place: str, after: int, last: int, publish: Publish, connection: Connection
    ) -> tuple[int, Moved]:
        """Move some rows behind the row ``after``; return the last of them as well."""
        row = events.c
        sizes = connection.execute(
            select(row.seq, func.length(row.payload))
            .where(waits_in(place), row.seq > after, row.seq <= last)
            .order_by(row.seq)
            .limit(_WINDOW)
        ).all()
        if not sizes:
            return last, Moved(0, [])
        end = end_of_window([(seq, size) for seq, size in sizes])
        rows = connection.execute(
            select(events, (row.available_at > now()).label("is_scheduled"))
            .where(waits_in(place), row.seq > after, row.seq <= end)
            .order_by(row.seq)
            .with_for_update(skip_locked=True)
        ).all()
        left: list[tuple[str, str]] = []
        readable: list[tuple[int, Event]] = []
        for each in rows:
            try:
                readable.append((each.seq, _event_of(each, place)))
            except ValueError as error:
                left.append((str(each.id), f"no event: {error}"))
        done = published(readable, publish, left)
        self._delete(done, connection)
        return end, Moved(len(done), left)

    def _delete(self, numbers: Sequence[int], connection: Connection) -> None:
        if numbers:
            connection.execute(delete(events).where(events.c.seq.in_(list(numbers))))


def _event_of(row: Any, place: str) -> Event:
    """Return the event to publish for a row.

    Raises:
        ValueError: the row isn't an event.
    """
    event = event_of(row)
    if row.is_scheduled:
        event = dataclasses.replace(event, deliver_at=row.available_at)
    return event if place == UNROUTED else for_queue(event, place)
