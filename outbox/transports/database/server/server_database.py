"""A database on a server: PostgreSQL or MariaDB."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine, literal, literal_column, select

from outbox.errors import BrokerError, UsageError
from outbox.storage.creating import database_id
from outbox.storage.floors import Floors
from outbox.storage.schema import dialect_of, meta
from outbox.storage.side_engine import SideEngine
from outbox.storage.store import Claimed, Store
from outbox.storage.transactions import own_transaction, try_again
from outbox.system import process
from outbox.telemetry import tracing
from outbox.transports.database import routing
from outbox.transports.database.database import Database
from outbox.transports.database.routing import Binding, load
from outbox.transports.database.server.packets import in_packets
from outbox.transports.database.server.server_address import ServerAddress
from outbox.transports.database.server.server_errors import (
    DATABASE_ERRORS,
    is_failure,
    of_server,
)
from outbox.transports.database.server.waking import Waking
from outbox.url import BrokerURL

__all__ = ["ServerDatabase"]

_T = TypeVar("_T")

_POLL_WOKEN = 1.25
"""Seconds between two looks for events while commits wake workers: a notification may be lost."""

_LEVEL = "READ COMMITTED"
_DEFAULT_LEVEL = "SELECT current_setting('default_transaction_isolation')"

_PROBE_AFTER = 5.0
"""Seconds without use after which a connection may have been closed, by the server or on the way,
so that it is tried before it is used."""


class ServerDatabase(Database):
    """Connects to a server when needed, and again after a failure. For one thread.

    It never creates tables: who publishes rarely may, and several at once would disturb each other.
    """

    lease = 60.0
    idle_timeout = 60.0

    def __init__(
        self, url: BrokerURL, on_reopened: Callable[[bool], None], *, owner: str = ""
    ) -> None:
        """Check the URL; nothing is connected yet.

        Args:
            url: the URL.
            on_reopened: called with False when a connection was opened again.
            owner: the owner of the rows that are leased here; see ``Store``.

        Raises:
            UsageError: the URL has an invalid option.
            MissingExtra: the driver isn't installed.
        """
        super().__init__(str(url), str(url))
        address = ServerAddress.of(url)
        self._poll = address.poll
        self._waking = Waking(address, idle_timeout=self.idle_timeout)
        self._dialect = url.scheme
        self._on_reopened = on_reopened
        self._engine = address.open_engine()
        self._store = Store(self._engine, owner)
        self.floors: Floors = Floors()
        self._connection: Connection | None = None
        self._packet: int | None = None  # the longest statement in bytes, where there is a limit
        self._level = ""
        self._commits_alone = False
        self._used_at = 0.0
        self._was_open = False
        _made.add(self)

    @property
    def poll(self) -> float:
        """1.25 s at least where what is committed wakes workers."""
        return max(self._poll, _POLL_WOKEN) if self._waking.is_proven else self._poll

    @property
    def store(self) -> Store:
        """The store of the events in the database."""
        return self._store

    def open(self) -> None:
        """Connect, unless that has been done.

        Raises:
            BrokerError: the server can't be used now; the cause is a UsageError if a table is
                missing, or the server is too old.
        """
        with self._translated():
            self._opened()

    def run(self, work: Callable[[Connection], _T], *, durable: bool = True) -> _T:
        """Return what ``work`` returns, called again after a conflict with others.

        Raises:
            BrokerError: the server can't be used now; nothing has changed, unless the commit itself
                failed.
        """

        def once() -> _T:
            connection = self._in_level(_LEVEL)
            with connection.begin():
                if self._dialect == "postgresql" and not durable:
                    connection.exec_driver_sql("SET LOCAL synchronous_commit TO OFF")
                return work(connection)

        with self._translated():
            return try_again(once)

    def put_rows(self, rows: Sequence[dict[str, Any]], connection: Connection) -> None:
        """Store rows in their order, in as many statements as MariaDB needs.

        Raises:
            ValueError: a row is larger than the server allows.
        """
        groups = [rows] if self._packet is None else in_packets(rows, self._packet)
        for group in groups:
            self._store.put_rows(group, connection=connection)

    def put_known(self, rows: Sequence[dict[str, Any]], digest: bytes) -> bool:
        """Store rows in their order if the bindings are those with ``digest``: one statement."""
        if not self._is_quick():
            return False

        known = {"of_known": digest}
        return self._alone(
            lambda connection: self._store.put_rows_if(
                rows, routing.ARE_KNOWN, known, connection=connection
            )
        )

    def exchanges(self, queues: Sequence[str]) -> bool:
        """Return whether :meth:`exchange` does now what a claim would for all ``queues``."""
        return self._is_quick() and self._store.exchanges(queues, self.floors)

    def exchange(self, done: Sequence[Claimed], limit: int, queue: str) -> list[Claimed]:
        """Delete rows that are processed, and claim others: one statement."""

        def exchange(connection: Connection) -> list[Claimed]:
            with connection.begin():
                return self._store.exchange(
                    done,
                    limit,
                    queue=queue,
                    lease=self.lease,
                    floors=self.floors,
                    connection=connection,
                )

        return self._alone(exchange)

    def changed(self) -> bool:
        """Return True: whether that is so, only a look for rows shows."""
        return True

    def due_in(self, queues: Sequence[str]) -> float | None:
        """Return the seconds until a row of one of ``queues`` is due; one statement."""
        with self._translated():
            connection = self._in_level("AUTOCOMMIT" if self._is_quick() else _LEVEL)
            with connection.begin():
                return self._store.due_in(queues, floors=self.floors, connection=connection)

    def holds(self, engine: Engine, options: Mapping[str, Any]) -> bool:
        """Return whether the tables that ``engine`` writes to have the same identity."""
        if dialect_of(engine.dialect.name) != self._dialect:
            return False
        side = SideEngine(engine)
        try:
            theirs = side.run(_identity_at, side.with_options(options))
        finally:
            side.close()
        with self._translated():
            connection = self._in_level(_LEVEL)
            with connection.begin():
                ours = _identity_of(connection)
        if ours is None:
            raise UsageError("the tables have no identity: run `outbox sql upgrade`")
        return theirs == ours

    def bindings(self) -> list[Binding] | None:
        """Return the bindings of the moment."""
        with self._translated():
            connection = self._in_level(_LEVEL)
            with connection.begin():
                return load(connection)

    def make_ready(self) -> None:
        """Start the thread that notifies workers in other processes."""
        self._waking.make_ready()

    def published(self, queues: Collection[str]) -> None:
        """Wake those who listen to ``queues``, in all processes. Never blocks."""
        super().published(queues)
        self._waking.notify(queues)

    def listen(self, event: threading.Event, queues: Collection[str]) -> None:
        """Set ``event`` whenever events are published to ``queues``, or :attr:`poll` changes."""
        super().listen(event, queues)
        self._waking.listen(event, queues)

    def stop_listening(self, event: threading.Event) -> None:
        """Undo :meth:`listen`."""
        super().stop_listening(event)
        self._waking.stop_listening()

    def note_found(self) -> None:
        """Note that a look for rows has found some."""
        self._waking.note_found()

    def end(self) -> None:
        """Close the connections for good."""
        self.close()
        self._waking.close()

    def close(self) -> None:
        """Close the connection, if there is one. It is opened again when needed."""
        connection, self._connection = self._connection, None
        with contextlib.suppress(*DATABASE_ERRORS):
            if connection is not None:
                connection.close()
        self._engine.dispose()

    def _is_quick(self) -> bool:
        """Return whether a statement may be a transaction by itself: one round trip, not three.

        Only on a connection that needs no look: a worker that opens one has to do something first.
        """
        return (
            self._commits_alone
            and self._connection is not None
            and time.monotonic() < self._used_at + _PROBE_AFTER
        )

    def _alone(self, work: Callable[[Connection], _T]) -> _T:
        """Return what ``work`` returns, whose only statement is a transaction by itself.

        Call it if :meth:`_is_quick`.
        """
        with self._translated():
            return try_again(lambda: work(self._in_level("AUTOCOMMIT")))

    def _in_level(self, level: str) -> Connection:
        """Return the connection, opened if need be, with this isolation level."""
        connection = self._opened()
        if level != self._level:
            connection.execution_options(isolation_level=level)
            self._level = level
        return connection

    def _opened(self) -> Connection:
        connection = self._connection
        now = time.monotonic()
        if connection is not None and (
            now < self._used_at + _PROBE_AFTER or self._is_alive(connection)
        ):
            self._used_at = now
            return connection
        connection = self._engine.connect()
        try:
            self._level = _LEVEL
            connection.execution_options(isolation_level=_LEVEL)
            with connection.begin():
                self._store.check(connection=connection)
                routing.check(connection)
                if self._dialect == "mariadb":
                    packet = connection.exec_driver_sql("SELECT @@max_allowed_packet")
                    self._packet = int(packet.scalar_one())
                self._commits_alone = (
                    connection.dialect.driver == "psycopg"
                    # Otherwise the statement would have another level than a transaction.
                    and connection.exec_driver_sql(_DEFAULT_LEVEL).scalar_one() == "read committed"
                )
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        self._used_at = time.monotonic()
        if self._was_open:
            self._on_reopened(False)
        self._was_open = True
        return connection

    def _is_alive(self, connection: Connection) -> bool:
        try:
            with connection.begin():
                connection.exec_driver_sql("SELECT 1")
        except DATABASE_ERRORS:
            self._abandon()
            return False
        return True

    def _abandon(self) -> None:
        """Forget the connection: after a failover, the next one leads to another server."""
        connection, self._connection = self._connection, None
        with contextlib.suppress(*DATABASE_ERRORS):
            if connection is not None:
                connection.invalidate()
                connection.close()
        self._engine.dispose()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        was_open = self._connection is not None
        try:
            with tracing.hidden():
                yield
        except BrokerError:
            raise
        except UsageError as error:
            self._abandon()
            raise of_server(error, self.name, connecting=True) from error
        except DATABASE_ERRORS as error:
            if not is_failure(error):
                raise
            self._abandon()
            raise of_server(error, self.name, connecting=not was_open) from error

    def _leave_to_parent(self) -> None:
        """Abandon the parent's connection in a forked child, without a word to the server.

        The extra reference keeps the pool from resetting it: the child would do that over the
        connection which the parent goes on using.
        """
        if self._connection is not None:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._connection))
            self._connection = None
        self._engine.dispose(close=False)


# The id alone is the same in a copy of the database, or of the schema.
_WHERE = {
    "postgresql": (
        "SELECT oid, pg_postmaster_start_time() FROM pg_database WHERE datname = current_database()"
    ),
    "mariadb": "SELECT @@hostname, @@port, DATABASE()",
}


def _identity_at(engine: Engine) -> tuple[Any, ...] | None:
    with own_transaction(engine) as connection:
        return _identity_of(connection)


def _identity_of(connection: Connection) -> tuple[Any, ...] | None:
    """Return what no other tables have in common with those here; None if that isn't known."""
    id = database_id(connection)
    dialect = dialect_of(connection.dialect.name) or ""
    if id is None:
        return None
    where = connection.exec_driver_sql(_WHERE[dialect]).one()
    oid = literal_column("tableoid") if dialect == "postgresql" else literal(0)
    return id, *where, connection.execute(select(oid).select_from(meta).limit(1)).scalar()


_made: weakref.WeakSet[ServerDatabase] = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    for database in list(_made):
        database._leave_to_parent()


process.after_fork(_leave_all_to_parent)
