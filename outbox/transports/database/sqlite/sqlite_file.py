"""An SQLite file, shared by the publishers and workers of one machine."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine

from outbox.errors import Blocked, BrokerError, ConnectFailed, UsageError
from outbox.storage.engines import names_memory, open_sqlite
from outbox.storage.store import Store
from outbox.system import process
from outbox.telemetry import tracing
from outbox.transports.database.database import Database, Room
from outbox.transports.database.sqlite.disk_room import room_at
from outbox.transports.database.sqlite.location import Location
from outbox.transports.database.sqlite.shared_file import shared_file_at
from outbox.transports.database.sqlite.sqlite_errors import (
    DATABASE_ERRORS,
    is_busy,
    is_failure,
    of_database,
)

__all__ = ["SQLiteFile"]

_T = TypeVar("_T")

_PATIENCE = 10.0
"""The longest wait for transactions of other processes, in seconds."""

_SLICE = 0.25
"""The seconds after which such a wait checks whether to give up."""


class SQLiteFile(Database):
    """Opens the file when needed, and again after a failure. For one thread.

    It also reopens the file if another one has replaced it at the same path.
    """

    lease = 30.0

    def __init__(
        self,
        location: Location,
        given_up: Callable[[], bool] = lambda: False,
        on_reopened: Callable[[bool], None] = lambda _: None,
        *,
        owner: str = "",
    ) -> None:
        """Check that the file can be created; nothing is connected yet.

        Args:
            location: the location of the file.
            given_up: a function that returns whether to stop waiting for others.
            on_reopened: called when the path was opened again, with whether it is another file,
                because the old one was deleted or replaced.
            owner: the owner of the rows that are leased here; see ``Store``.

        Raises:
            UsageError: the path is a symbolic link, not a regular file, or another user's.
        """
        super().__init__(location.path, str(location))
        self.path = location.path
        self._location = location
        self._given_up = given_up
        self._on_reopened = on_reopened
        self._shared_file = shared_file_at(location.path)
        self._owner = owner
        self._engine: Engine = self._make_engine()
        self._store = Store(self._engine, owner)
        self._connection: Connection | None = None
        self._raw: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._last_identity: tuple[int, int] | None = None  # also of a file that isn't open now
        self._version: int | None = None
        self._shared_file.members.add(self)
        _made.add(self)

    @property
    def store(self) -> Store:
        """The store of the events in the file."""
        return self._store

    def open(self) -> None:
        """Open the file and create its tables, unless it is open.

        Raises:
            BrokerError: the file can't be used now; the cause is a UsageError if retrying is
                useless.
        """
        with self._turn():
            self._opened()

    def run(self, work: Callable[[Connection], _T], *, durable: bool = True) -> _T:
        """Return what ``work`` returns, called once, as the only writer.

        Raises:
            BrokerError: the file can't be written now, or stayed locked for 10 s; nothing has
                changed, unless the commit itself failed.
        """
        with self._turn():
            connection = self._opened()
            with self._patiently(connection.begin):
                return work(connection)

    def changed(self) -> bool:
        """Return whether other connections have committed since the last call (True at first)."""
        with self._turn():
            version: int = self._raw_opened().execute("PRAGMA data_version").fetchone()[0]
        before, self._version = self._version, version
        return version != before

    def room(self) -> Room:
        """Return the room for events on the disk."""
        with self._turn():
            room = room_at(self.path)
            if room.for_new <= 0:
                # The log keeps its size when it is empty, until it is truncated.
                self._raw_opened().execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                room = room_at(self.path)
        return room

    def due_in(self, queues: Sequence[str]) -> float | None:
        """Return the seconds until a row of one of ``queues`` is due; takes no write lock."""
        with self._turn():
            raw = self._raw_opened()
            found = [raw.execute(_DUE_IN, {"queue": queue}).fetchone()[0] for queue in queues]
        return min((float(seconds) for seconds in found if seconds is not None), default=None)

    def holds(self, engine: Engine, options: Mapping[str, Any]) -> bool:
        """Return whether ``engine`` uses the same file, and in it the same schema."""
        if engine.dialect.name != "sqlite" or names_memory(engine.url):
            return False
        with contextlib.suppress(OSError):  # the file was deleted
            return not options.get("schema_translate_map") and os.path.samefile(
                str(engine.url.database), self.path
            )
        return False

    def note_found(self) -> None:
        """Do nothing: workers of other processes are not woken."""

    def make_ready(self) -> None:
        """Do nothing: there are no threads."""

    def close(self) -> None:
        """Close the connection, if it is open."""
        # Holding the turn keeps the process from forking while the connection is being closed.
        has_turn = self._shared_file.turn.acquire(timeout=_SLICE)
        self.disconnect()
        if has_turn:
            self._shared_file.turn.release()

    def disconnect(self) -> None:
        """Close the connection, if it is open; the caller has the turn."""
        connection, self._connection = self._connection, None
        self._raw = self._identity = self._version = None
        with contextlib.suppress(*DATABASE_ERRORS):
            if connection is not None:
                connection.close()
        self._engine.dispose()

    def _raw_opened(self) -> sqlite3.Connection:
        self._opened()
        if self._raw is None:
            raise ConnectFailed(f"{self.path} is not open")
        return self._raw

    def _opened(self) -> Connection:
        if self._connection is not None and self._identity == self._identity_now():
            return self._connection
        self.disconnect()
        if self.path in _unsafe:
            raise UsageError(
                f"{self.path} was open when this process was forked, so it is unsafe to use here; "
                "publish nothing before the fork (uWSGI: lazy-apps = true)"
            )
        self._engine = self._make_engine()
        self._store = Store(self._engine, self._owner)
        # The first connection turns on the write-ahead log, which needs exclusive access.
        connection = self._patiently(self._engine.connect)
        try:
            with self._patiently(connection.begin):
                is_new = self._store.create(connection=connection)
                self._store.check(connection=connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        raw = connection.connection.driver_connection
        self._raw = raw if isinstance(raw, sqlite3.Connection) else None
        self._identity = self._identity_now()
        before, self._last_identity = self._last_identity, self._identity
        if before is not None:
            # A new file may get the number of one that was deleted.
            self._on_reopened(is_new or before != self._identity)
        return connection

    def _make_engine(self) -> Engine:
        return open_sqlite(self.path, synchronous=self._location.synchronous, busy_timeout=_SLICE)

    def _identity_now(self) -> tuple[int, int] | None:
        try:
            status = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return status.st_dev, status.st_ino

    def _patiently(self, function: Callable[[], _T]) -> _T:
        """Call ``function``, again and again while another process has the file locked."""
        deadline = time.monotonic() + _PATIENCE
        while True:
            begin = time.monotonic()
            try:
                return function()
            except DATABASE_ERRORS as error:
                now = time.monotonic()
                may_wait = not self._given_up() and not self._shared_file.to_fork
                if not is_busy(error) or not may_wait or now > deadline:
                    raise
                if now - begin < _SLICE:  # SQLite fails at once if waiting could be a deadlock
                    time.sleep(0.01)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Use the file while no other thread of this process does."""
        deadline = time.monotonic() + _PATIENCE
        while not self._shared_file.turn.acquire(timeout=_SLICE):
            if self._given_up() or time.monotonic() > deadline:
                raise Blocked(f"another thread has kept {self.path} locked")
        try:
            with tracing.hidden(), self._translated():
                yield
        finally:
            self._shared_file.turn.release()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except BrokerError:
            raise
        except UsageError as error:
            self.disconnect()
            raise ConnectFailed(str(error)) from error
        except DATABASE_ERRORS as error:
            if not is_failure(error):
                raise
            if not is_busy(error):
                self.disconnect()
            raise of_database(error, self.path) from error

    def _leave_to_parent(self) -> None:
        """Abandon the parent's connection in a forked child, without closing it.

        Even closing it is unsafe here (https://www.sqlite.org/howtocorrupt.html, 2.6), so the extra
        references keep it from being collected. There is one only if no hook ran before the fork
        (uWSGI), or a disk hangs.
        """
        if self._connection is None:
            return
        _unsafe.add(self.path)
        for inherited in (self._raw, self._connection, self._engine):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(inherited))
        self._connection = self._raw = None


# The earliest row of each rank, by index seeks: the cost doesn't grow with the number of rows.
_DUE_IN = """
WITH RECURSIVE ranks(rank) AS (
    SELECT max(rank) FROM outbox_events WHERE queue = :queue AND dead_at IS NULL
    UNION ALL
    SELECT (
        SELECT max(rank) FROM outbox_events
        WHERE queue = :queue AND dead_at IS NULL AND rank < ranks.rank
    ) FROM ranks WHERE ranks.rank IS NOT NULL
)
SELECT min((
    SELECT min(available_at) FROM outbox_events
    WHERE queue = :queue AND dead_at IS NULL AND rank = ranks.rank
)) - (julianday('now') - 2440587.5) * 86400.0
FROM ranks WHERE rank IS NOT NULL
"""

_made: weakref.WeakSet[SQLiteFile] = weakref.WeakSet()

_unsafe: set[str] = set()
"""Paths of files that were open when this process was forked: SQLite's locks on them don't work."""


def _leave_all_to_parent() -> None:
    for file in list(_made):
        file._leave_to_parent()


process.after_fork(_leave_all_to_parent)
