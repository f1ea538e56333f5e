"""One file of events, which belongs to the process that has its lock."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self
from urllib.parse import quote

from outbox.backlog.chunk import Entry
from outbox.event import Event
from outbox.messages.rows import event_of, text_of
from outbox.spool.file_lock import FileLock
from outbox.spool.spool_folder import BAD, lock_path, new_path

__all__ = [
    "FORMAT",
    "NewerFormat",
    "SpoolFile",
    "Spooled",
    "Unreadable",
    "Unwritable",
    "is_at_rest",
    "open_file",
    "row_at",
    "rows_of",
    "size_of",
]

FORMAT = 1
"""The number of the table's form, in ``PRAGMA user_version``. Other forms are left alone."""

_TABLE = """
CREATE TABLE event (
    seq INTEGER PRIMARY KEY,
    id TEXT NOT NULL,
    exchange TEXT NOT NULL,
    type TEXT NOT NULL,
    payload BLOB NOT NULL,
    content_type TEXT NOT NULL,
    headers TEXT,
    key TEXT,
    priority INTEGER,
    deliver_at TEXT,
    occurred_at TEXT NOT NULL,
    unroutable TEXT,
    size INTEGER NOT NULL
)
"""
_COLUMNS = (
    "seq, id, exchange, type, payload, content_type, headers, key, priority, deliver_at, "
    "occurred_at, unroutable, size"
)
_VALUES = f"({', '.join('?' * len(_COLUMNS.split(', ')))})"
_INSERT = f"INSERT INTO event ({_COLUMNS}) VALUES {_VALUES}"
_UNREAD = f"SELECT {_COLUMNS} FROM event WHERE seq > ? ORDER BY seq"
_BACKWARDS = f"SELECT {_COLUMNS} FROM event WHERE seq > ? ORDER BY seq DESC"
_SINGLE = f"SELECT {_COLUMNS} FROM event WHERE seq = ?"
_THESE = "FROM event WHERE seq IN (SELECT value FROM json_each(?))"
_COUNT = f"SELECT count(*), coalesce(sum(size), 0) {_THESE}"
_DELETE = f"DELETE {_THESE}"
_AT_ONCE = 100
"""The events that one statement inserts at most; SQLite allows 32,766 values in one."""

_LOG = 64 * 1024 * 1024
"""Bytes of the write-ahead log beyond which it is cut when it has been copied into the file."""

_PATIENCE = 5.0
"""Seconds to wait for another process's lock on the file: a look at it takes far less."""


class Unreadable(Exception):
    """The file is damaged, or is no spool; the message says why."""


class Unwritable(Exception):
    """The file can't be written or opened now; the message says why."""


class NewerFormat(Exception):
    """A newer version of outbox has written the file."""


class Spooled(NamedTuple):
    """An event in a file.

    Attributes:
        seq: its number, in the order of the events.
        event: the event.
        size: the bytes that it counts for.
    """

    seq: int
    event: Event
    size: int


class _Row(NamedTuple):
    seq: int
    id: str
    exchange: str
    type: str
    payload: bytes
    content_type: str
    headers: str | None
    key: str | None
    priority: int | None
    deliver_at: str | None
    occurred_at: Any
    unroutable: Any
    size: int


class SpoolFile:
    """A file that this process has the lock of. Used by one thread at a time.

    Attributes:
        path: the file.
        events: the number of events in it, and ``size`` their bytes.
        in_memory: the entries of events that the publisher has in memory, by number; the others
            are to be read.
        last: the number of the last event.
        is_own: whether this process has made it; otherwise an ended one has.
    """

    def __init__(self, path: Path, lock: FileLock) -> None:
        self.path = path
        self._lock = lock
        self._connection: sqlite3.Connection | None = None
        self._file: tuple[int, int] = (0, 0)  # device and inode
        self.events = self.size = self.last = 0
        self.in_memory: dict[int, Entry] = {}
        self.is_own = True
        self._read_to = 0

    @classmethod
    def create(cls, folder: Path, digest: str) -> Self:
        """Make a new file.

        Raises:
            Unwritable: it can't be made.
        """
        try:
            lock = None
            while lock is None:  # another process may take its file for a dead one's at once
                path = new_path(folder, digest)
                lock = FileLock.take(lock_path(path))
            file = cls(path, lock)
            try:
                os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600))
                file._connect()
            except BaseException:
                file.remove()
                raise
        except (OSError, Unreadable) as error:
            raise Unwritable(str(error)) from error
        return file

    @classmethod
    def adopt(cls, path: Path) -> Self | None:
        """Take over a file whose process has ended; return None if it is another's, or gone.

        Raises:
            Unreadable: it is damaged; it has been put aside, and the message names its new place.
            NewerFormat: a newer version of outbox has written it.
            Unwritable: it can't be opened.
        """
        try:
            if not path.exists():
                return None
            lock = FileLock.take(lock_path(path))
        except OSError as error:
            raise Unwritable(str(error)) from error
        if lock is None:
            return None
        file = cls(path, lock)
        file.is_own = False
        try:
            if not path.exists():
                file.remove()
                return None
            connection = file._connect()
            counts = "SELECT count(*), coalesce(sum(size), 0), coalesce(max(seq), 0) FROM event"
            with _errors_of(path):
                file.events, file.size, file.last = connection.execute(counts).fetchone()
        except Unreadable as error:
            raise Unreadable(f"{error}; it is now {file.put_aside()}") from error
        except BaseException:
            file.close()
            raise
        return file

    @property
    def unread(self) -> int:
        """The number of events that are in the file alone."""
        return self.events - len(self.in_memory)

    @property
    def stands(self) -> bool:
        """Whether the file and its lock are still where they were made."""
        try:
            status = os.stat(self.path)
        except OSError:
            return False
        return (status.st_dev, status.st_ino) == self._file and self._lock.stands

    def change(self, new: Sequence[tuple[Event, int]], settled: Iterable[int]) -> list[int]:
        """Add events and delete others, in one transaction that is on the disk afterwards.

        Args:
            new: events and their sizes, in order.
            settled: the numbers of events to delete.

        Returns:
            The numbers of the new events.

        Raises:
            Unwritable: nothing has changed.
            Unreadable: the file is damaged.
        """
        connection = self._connect()
        seqs = list(range(self.last + 1, self.last + 1 + len(new)))
        rows = [_row_of(seq, event, size) for seq, (event, size) in zip(seqs, new, strict=True)]
        gone = list(settled)
        deleted, freed = 0, 0
        # A single statement is a transaction, too. Around each, other threads may take the GIL, and
        # keep it for 5 ms: a chunk of a busy process would wait for them once an event.
        alone = not gone and len(rows) <= _AT_ONCE
        with _errors_of(self.path), contextlib.nullcontext() if alone else _transaction(connection):
            for first in range(0, len(rows), _AT_ONCE):
                _insert(connection, rows[first : first + _AT_ONCE])
            if gone:
                numbers = (json.dumps(gone),)
                deleted, freed = connection.execute(_COUNT, numbers).fetchone()
                connection.execute(_DELETE, numbers)
        self.last += len(new)
        self.events += len(new) - deleted
        self.size += sum(size for _, size in new) - freed
        for seq in gone:
            self.in_memory.pop(seq, None)
        return seqs

    def read(self, most: int, most_bytes: int, *, look: bool = False) -> list[Spooled]:
        """Return the next events that aren't in memory, at least one if there is one.

        Args:
            most: the maximum number.
            most_bytes: the maximum of their sizes.
            look: whether they are returned the next time, too.

        Raises:
            Unreadable: the file is damaged; also if an event in it is none that outbox writes.
            Unwritable: the file can't be opened.
        """
        connection = self._connect()
        events: list[Spooled] = []
        with _errors_of(self.path), contextlib.closing(connection.cursor()) as cursor:
            for values in cursor.execute(_UNREAD, (self._read_to,)):
                row = _Row(*values)
                if row.seq in self.in_memory:
                    continue
                most_bytes -= row.size
                if len(events) == most or (events and most_bytes < 0):
                    break
                events.append(_spooled(row))
        if events and not look:
            self._read_to = events[-1].seq
        return events

    def forget(self, seq: int) -> None:
        """Note that the event with this number isn't in memory any more."""
        if self.in_memory.pop(seq, None) is not None:
            self._read_to = min(self._read_to, seq - 1)

    def move(self, folder: Path, digest: str) -> None:
        """Write everything into a new file: this one was deleted under the process.

        Raises:
            Unreadable: its connection isn't open, so that its events are gone.
            Unwritable: the new file can't be made; this one stays in use.
        """
        before = self._connection
        if before is None:
            raise Unreadable("it was deleted")
        new = type(self).create(folder, digest)
        try:
            after = new._connect()
            with (
                _errors_of(new.path),
                contextlib.closing(before.cursor()) as cursor,
                _transaction(after),
            ):
                after.executemany(_INSERT, cursor.execute(_UNREAD, (0,)))
        except BaseException:
            new.remove()
            raise
        self.disconnect()
        self._lock.release(remove=False)
        self.path, self._lock = new.path, new._lock
        self._connection, self._file = new._connection, new._file

    def put_aside(self) -> Path:
        """Rename the file, which is damaged, and give it up; return its new path."""
        self.disconnect()
        stem = f"{self.path}{BAD}{datetime.datetime.now(datetime.UTC):%Y%m%dT%H%M%S}"
        bad, number = Path(stem), 1
        while bad.exists():
            number += 1
            bad = Path(f"{stem}-{number}")
        for suffix in ("", "-wal"):  # what has not been copied into the file is in its log
            with contextlib.suppress(OSError):
                os.rename(f"{self.path}{suffix}", f"{bad}{suffix}")
        with contextlib.suppress(OSError):
            os.unlink(f"{self.path}-shm")
        self._lock.release(remove=True)
        return bad

    def remove(self) -> None:
        """Delete the file, and its lock last."""
        self.disconnect()
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(OSError):
                os.unlink(f"{self.path}{suffix}")
        self._lock.release(remove=True)

    def abandon(self) -> None:
        """Leave the file to other spools; what is in memory is no longer in a file."""
        for entry in self.in_memory.values():
            entry.row = None  # or its end would be written into a file that another spool has
        self.in_memory.clear()
        self.close()

    def close(self) -> None:
        """Leave the file to other processes."""
        self.disconnect()
        self._lock.release(remove=False)

    def disconnect(self) -> None:
        """Close the connection, before a fork say; it is opened again when needed."""
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(sqlite3.Error):
                connection.close()

    def _connect(self) -> sqlite3.Connection:
        if self._connection is not None:
            return self._connection
        connection = open_file(self.path, "rw")
        try:
            with _errors_of(self.path):
                version = connection.execute("PRAGMA user_version").fetchone()[0]
                if version > FORMAT:
                    raise NewerFormat(f"{self.path} has the format {version}")
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = FULL")
                connection.execute(f"PRAGMA journal_size_limit = {_LOG}")
                if version == 0:  # new; or its process was killed before it had the table
                    with _transaction(connection):
                        connection.execute(_TABLE)
                        connection.execute(f"PRAGMA user_version = {FORMAT}")
            status = os.stat(self.path)
        except BaseException as error:
            connection.close()
            if isinstance(error, OSError):
                raise Unwritable(str(error)) from error
            raise
        self._file = (status.st_dev, status.st_ino)
        self._connection = connection
        return connection


def is_at_rest(path: Path) -> bool:
    """Return whether no process can have changes to the file that aren't in it yet.

    SQLite keeps them in a log beside the file, which the last connection removes when it closes.
    """
    return not os.path.lexists(f"{path}-wal")


def open_file(path: Path, mode: str, *, immutable: bool = False) -> sqlite3.Connection:
    """Return a connection to an existing file, which any thread may use, one at a time.

    Args:
        path: the file.
        mode: ``rw`` or ``ro``.
        immutable: whether nothing changes the file meanwhile. Otherwise even reading creates a log
            and an index of it, so that it needs a folder which can be written to.

    Raises:
        Unwritable: there is no such file, or it can't be opened.
    """
    with _errors_of(path):
        return sqlite3.connect(
            f"file:{quote(str(path))}?mode={mode}&immutable={immutable:d}",
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=_PATIENCE,
        )


def rows_of(connection: sqlite3.Connection, *, backwards: bool = False) -> Iterator[Spooled]:
    """Yield the events of a file, in order or from the last one back.

    Raises:
        sqlite3.Error: the file is damaged.
        ValueError: outbox writes no such row.
    """
    with contextlib.closing(connection.cursor()) as cursor:
        for values in cursor.execute(_BACKWARDS if backwards else _UNREAD, (0,)):
            yield _spooled(_Row(*values))


def row_at(connection: sqlite3.Connection, seq: int) -> Spooled | None:
    """Return the event with the number ``seq``; raise as ``rows_of`` does."""
    values = connection.execute(_SINGLE, (seq,)).fetchone()
    return None if values is None else _spooled(_Row(*values))


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    """Commit what is done meanwhile, or none of it."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


def _insert(connection: sqlite3.Connection, rows: Sequence[tuple[Any, ...]]) -> None:
    if rows:
        statement = _INSERT + f", {_VALUES}" * (len(rows) - 1)
        connection.execute(statement, list(chain.from_iterable(rows)))


def _spooled(row: _Row) -> Spooled:
    try:
        occurred_at = datetime.datetime.fromisoformat(row.occurred_at)
        event = event_of(row._replace(occurred_at=occurred_at))
        if row.deliver_at is not None:
            event = replace(event, deliver_at=datetime.datetime.fromisoformat(row.deliver_at))
    except (TypeError, AttributeError) as error:  # in a damaged file, a column has any type
        raise ValueError(str(error)) from error
    return Spooled(row.seq, event, row.size)


def size_of(entry: Entry) -> int:
    """Return the bytes that an entry counts for, as in the backlog."""
    return len(entry.frames) or len(entry.event.body)


def _row_of(seq: int, event: Event, size: int) -> tuple[Any, ...]:
    due = event.deliver_at
    return (
        seq,
        event.id,
        event.exchange,
        event.target,
        event.body,
        event.content_type,
        text_of(event.headers) if event.headers else None,
        event.key,
        event.priority,
        None if due is None else due.isoformat(),
        event.occurred_at.isoformat(),
        event.unroutable,
        size,
    )


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """Turn sqlite3's errors into those of this module."""
    try:
        yield
    except sqlite3.Error as error:
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        text = f"{path}: {error}"
        # Something else's table is as bad as a damaged one.
        if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_ERROR):
            raise Unreadable(text) from error
        raise Unwritable(text) from error
    except (ValueError, TypeError) as error:
        raise Unreadable(f"{path}: an event in it cannot be read: {error}") from error
