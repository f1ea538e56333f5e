"""One connection to the file of the embedded transport."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterator
from typing import TypeVar

from sqlalchemy import Connection, Engine

from outbox.errors import Blocked, BrokerError, ConnectFailed, UsageError
from outbox.storage.engines import open_sqlite
from outbox.storage.store import Store
from outbox.system import process
from outbox.transports.sqlite import routing
from outbox.transports.sqlite.location import Location
from outbox.transports.sqlite.shared_file import shared_file_at
from outbox.transports.sqlite.sqlite_errors import DATABASE_ERRORS, is_busy, is_failure, of_database

__all__ = ["Database"]

_T = TypeVar("_T")

_PATIENCE = 10.0
"""Seconds for which other processes' transactions are waited for."""

_SLICE = 0.25
"""Seconds of that between two looks whether the waiting is still wanted."""


class Database:
    """Opens the file when it is needed, and anew after a failure. For one thread.

    Another file at the same path, put there while this one was open, is noticed.
    """

    def __init__(self, location: Location, given_up: Callable[[], bool] = lambda: False) -> None:
        """See that the file can be made; nothing is connected yet.

        Args:
            location: of the file.
            given_up: whether to wait no longer for other processes.

        Raises:
            UsageError: the path is a symbolic link, no plain file, or somebody else's.
        """
        self.path = location.path
        self._location = location
        self._given_up = given_up
        self._shared_file = shared_file_at(location.path)
        self._engine: Engine = self._make_engine()
        self._store = Store(self._engine)
        self._connection: Connection | None = None
        self._raw: sqlite3.Connection | None = None
        self._identity: tuple[int, int] | None = None
        self._version: int | None = None
        self._shared_file.members.add(self)
        _made.add(self)

    @property
    def store(self) -> Store:
        """The events in it."""
        return self._store

    def open(self) -> None:
        """Open the file and make its tables, unless that is done.

        Raises:
            BrokerError: it cannot be used now; the cause is a UsageError where that will stay so.
        """
        with self._turn():
            self._opened()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[Connection]:
        """Write, alone, and commit at the end of the block.

        Raises:
            BrokerError: the file cannot be written now, or stayed locked for 10 s; nothing has
                changed, unless the failure came with the commit.
        """
        with self._turn():
            connection = self._opened()
            with self._patiently(connection.begin):
                yield connection

    def changed(self) -> bool:
        """Return whether others have committed since this was last asked (True at first).

        Raises:
            BrokerError: the file cannot be used now.
        """
        with self._turn():
            version: int = self._raw_opened().execute("PRAGMA data_version").fetchone()[0]
        before, self._version = self._version, version
        return version != before

    def due_in(self, queue: str) -> float | None:
        """Return in how many seconds something in ``queue`` is due; None if there is nothing.

        0 or less: something waits now. Leased rows count, since they are due if nobody settles
        them. Needs no lock.

        Raises:
            BrokerError: the file cannot be used now.
        """
        with self._turn():
            found = self._raw_opened().execute(_DUE_IN, {"queue": queue}).fetchone()[0]
        return None if found is None else float(found)

    def close(self) -> None:
        """Close the connection, if it is open."""
        # In turn: the process must not fork in the middle of it.
        turn = self._shared_file.turn.acquire(timeout=_SLICE)
        self.let_go()
        if turn:
            self._shared_file.turn.release()

    def let_go(self) -> None:
        """Close the connection, if it is open, it being our turn."""
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
        self.let_go()
        if self.path in _unsafe:
            raise UsageError(
                f"{self.path} was open when this process was forked, and cannot be used safely "
                "in it; publish nothing before the fork (uWSGI: lazy-apps = true)"
            )
        self._engine = self._make_engine()
        self._store = Store(self._engine)
        # The first connection turns the write-ahead log on, which needs the file for itself.
        connection = self._patiently(self._engine.connect)
        try:
            with self._patiently(connection.begin):
                self._store.create(connection=connection)
                self._store.check(connection=connection)
                routing.create(connection)
        except BaseException:
            connection.close()
            raise
        self._connection = connection
        raw = connection.connection.driver_connection
        self._raw = raw if isinstance(raw, sqlite3.Connection) else None
        self._identity = self._identity_now()
        return connection

    def _make_engine(self) -> Engine:
        return open_sqlite(self.path, synchronous=self._location.synchronous, busy_timeout=_SLICE)

    def _identity_now(self) -> tuple[int, int] | None:
        try:
            found = os.stat(self.path, follow_symlinks=False)
        except FileNotFoundError:
            return None
        return found.st_dev, found.st_ino

    def _patiently(self, function: Callable[[], _T]) -> _T:
        deadline = time.monotonic() + _PATIENCE
        while True:
            begin = time.monotonic()
            try:
                return function()
            except DATABASE_ERRORS as error:
                now = time.monotonic()
                waits = not self._given_up() and not self._shared_file.to_fork
                if not is_busy(error) or not waits or now > deadline:
                    raise
                if now - begin < _SLICE:  # SQLite did not wait where that could be a deadlock
                    time.sleep(0.01)

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Use the file while no other thread of this process does."""
        deadline = time.monotonic() + _PATIENCE
        while not self._shared_file.turn.acquire(timeout=_SLICE):
            if self._given_up() or time.monotonic() > deadline:
                raise Blocked(f"another thread has kept {self.path} locked")
        try:
            with self._translated():
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
            self.let_go()
            raise ConnectFailed(str(error)) from error
        except DATABASE_ERRORS as error:
            if not is_failure(error):
                raise
            if not is_busy(error):
                self.let_go()
            raise of_database(error, self.path) from error

    def _leave_to_parent(self) -> None:
        """In a forked child: never touch a connection of the parent's, not even to close it.

        There is one only where no hook could run before the fork (uWSGI), or a disk hangs.
        """
        if self._connection is None:
            return
        _unsafe.add(self.path)
        for one in (self._raw, self._connection, self._engine):
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(one))
        self._connection = self._raw = None


# The earliest of each rank, found by seeking in the index of what is due, however much waits.
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

_made: weakref.WeakSet[Database] = weakref.WeakSet()

_unsafe: set[str] = set()
"""Paths of files that were open when this process was forked: it would have no locks on them."""


def _leave_all_to_parent() -> None:
    for one in list(_made):
        one._leave_to_parent()


process.after_fork(_leave_all_to_parent)
