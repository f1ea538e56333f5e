"""A row for each process, in a database on a server.

Each look and each write opens a short connection: so whatever keeps it waiting, a lock or
a server that is gone, delays neither events nor messages, and between two announcements no process
holds a connection for this.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import ClassVar, TypeVar

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import ProgrammingError
from sqlalchemy.pool import NullPool

from outbox.errors import UsageError
from outbox.storage.clock import in_seconds, now, seconds_since
from outbox.storage.schema import exists, presence
from outbox.storage.transactions import own_transaction, try_again
from outbox.transports.database.server.server_address import ServerAddress
from outbox.transports.database.server.server_errors import DATABASE_ERRORS, of_server
from outbox.transports.presence_records import PresenceRecord
from outbox.url import BrokerURL

__all__ = ["DatabasePresenceRecords"]

_T = TypeVar("_T")

_DROP_AFTER = 300.0
"""Seconds of silence after which any process drops the row of another one."""

_MOST_DROPPED = 100


class DatabasePresenceRecords:
    """The rows of ``outbox_presence``. For one thread."""

    every: ClassVar[float] = 30.0

    def __init__(self, url: BrokerURL) -> None:
        """Create it, without connecting yet.

        Raises:
            UsageError: the URL is invalid.
            MissingExtra: the driver isn't installed.
        """
        self._name = str(url)
        self._engine = ServerAddress.of(url).open_engine(pool=NullPool)

    def write(self, process: str, announcement: str) -> None:
        """Replace the row of a process, and drop at most 100 of those silent for 5 minutes."""

        def put(connection: Connection) -> None:
            _put(connection, process, announcement)
            _drop_silent(connection)

        with self._translated():
            try_again(lambda: self._run(put))

    def read(self) -> Sequence[PresenceRecord]:
        """Return all rows."""
        columns = presence.c.announcement, seconds_since(presence.c.announced_at)
        with self._translated():
            rows = self._run(lambda connection: connection.execute(select(*columns)).all())
        return [PresenceRecord(text, max(0.0, float(ago))) for text, ago in rows]

    def _run(self, work: Callable[[Connection], _T]) -> _T:
        try:
            with own_transaction(self._engine, durable=False) as connection:
                return work(connection)
        except ProgrammingError:
            with own_transaction(self._engine) as connection:
                _check(connection)
            raise

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (UsageError, *DATABASE_ERRORS) as error:
            raise of_server(error, self._name, connecting=False) from error


def _put(connection: Connection, process: str, announcement: str) -> None:
    values = {"announcement": announcement, "announced_at": now()}
    known = update(presence).where(presence.c.process == process).values(values)
    if not connection.execute(known).rowcount:
        connection.execute(insert(presence).values(process=process, **values))


def _drop_silent(connection: Connection) -> None:
    # Only what a look without locks has found is deleted: on MariaDB a delete by the time alone
    # would wait for every row that is written meanwhile.
    silent = presence.c.announced_at < in_seconds(-_DROP_AFTER)
    found = connection.execute(
        select(presence.c.process).where(silent).order_by(presence.c.process).limit(_MOST_DROPPED)
    ).scalars()
    if processes := found.all():
        connection.execute(delete(presence).where(presence.c.process.in_(processes), silent))


def _check(connection: Connection) -> None:
    """Raise UsageError if the table is missing."""
    if not exists(connection, presence):
        raise UsageError(
            f"the table {presence.name} does not exist; add it with `outbox sql upgrade`, or with "
            "your migrations (outbox.sql.metadata, `outbox sql ddl`)"
        )
