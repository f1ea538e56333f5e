"""Engines of our own: for relays, commands, and the embedded queue."""

from __future__ import annotations

import importlib.util
import logging
import os
import stat
import threading
import weakref
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.pool import NullPool, Pool, QueuePool

from outbox.errors import MissingExtra, UsageError
from outbox.storage.schema import DIALECTS
from outbox.system import process

__all__ = ["engine_beside", "open_engine", "open_sqlite"]

logger = logging.getLogger("outbox.sql")

_BUSY_TIMEOUT = 10.0  # seconds
_DRIVERS = {"postgresql": ("psycopg", "psycopg2")}


def open_engine(url: str | URL, *, pool: type[Pool] = QueuePool) -> Engine:
    """Return an engine for an application's database; nothing is connected yet.

    A driver of asyncio is replaced by one for threads, and none is taken for the one that is there.

    Args:
        url: of PostgreSQL or SQLite.
        pool: for SQLite.

    Raises:
        UsageError: it is no database URL, or of a database for which there is no store. The message
            holds no part of the URL that might be a password.
        MissingExtra: the driver is not installed.
    """
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise UsageError(
            "the database URL has none of the forms postgresql://user:password@host/database "
            "and sqlite:///file.db"
        ) from None
    dialect = parsed.get_backend_name()
    if dialect not in DIALECTS:
        raise UsageError(f"events cannot be stored in {dialect}, only in {' or '.join(DIALECTS)}")
    if dialect == "sqlite":
        if parsed.query:
            raise UsageError("the options of a sqlite:// URL are not understood here")
        path = parsed.database or ""
        _check_names_a_file(path)
        if not Path(path).parent.is_dir():
            raise UsageError(f"{path} cannot be opened: its folder is not there")
        return _sqlite_engine(path, pool=pool)
    found = [one for one in _DRIVERS[dialect] if importlib.util.find_spec(one)]
    named = parsed.get_driver_name() if "+" in parsed.drivername else ""
    driver = named if named in _DRIVERS[dialect] else (found or [""])[0]
    if driver not in found:
        raise MissingExtra(
            f"the driver {driver or _DRIVERS[dialect][0]} is not installed, which the database "
            f"needs: pip install '{(driver or _DRIVERS[dialect][0])}'"
        )
    try:
        return create_engine(parsed.set(drivername=f"{dialect}+{driver}"), pool_pre_ping=True)
    except (ArgumentError, NoSuchModuleError) as error:
        raise UsageError(f"the database URL cannot be used: {error}") from error


_beside: weakref.WeakKeyDictionary[Engine, Engine | None] = weakref.WeakKeyDictionary()


def engine_beside(engine: Engine) -> Engine | None:
    """Return an engine for the database of ``engine`` to be used in a thread of ours, or None.

    It is ``engine`` itself, unless that is of asyncio, or of SQLite, whose transactions must begin
    otherwise for a claim. There is none for a database in memory.
    """
    dialect = engine.dialect
    if dialect.name != "sqlite" and not dialect.is_async:
        return engine
    if engine not in _beside:
        try:
            # Of SQLite no connection is left open: a child of a fork would have its locks' shadow.
            _beside[engine] = open_engine(engine.url, pool=NullPool)
        except UsageError as error:
            logger.warning("stored events are left to the relay: %s", error)
            _beside[engine] = None
    return _beside[engine]


def _leave_to_parent() -> None:
    for engine in _beside.values():
        if engine is not None:
            engine.dispose(close=False)


process.after_fork(_leave_to_parent)


def open_sqlite(
    path: str, *, synchronous: str = "FULL", busy_timeout: float = _BUSY_TIMEOUT
) -> Engine:
    """Return an engine for a file of our own, made readable for its owner alone if it is not there.

    The journal is a write-ahead log, beside which others can read.

    Args:
        path: of the file; its folder must exist.
        synchronous: ``FULL``: what is committed outlives a power cut. ``NORMAL``: it outlives the
            end of the process, and a power cut may take the last transactions.
        busy_timeout: seconds that a transaction waits for another one's end before it begins.

    Raises:
        UsageError: the path is empty, a symbolic link, no plain file, or somebody else's.
    """
    _check_names_a_file(path)
    _make_private(path)
    engine = _sqlite_engine(path, busy_timeout)

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")

    return engine


def _sqlite_engine(
    path: str, busy_timeout: float = _BUSY_TIMEOUT, pool: type[Pool] = QueuePool
) -> Engine:
    """Return an engine whose transactions begin with ``BEGIN IMMEDIATE``.

    That waits for other writers at the beginning, at most ``busy_timeout`` seconds, and cannot fail
    later since another one came first: a transaction that has read cannot wait for the lock
    (https://www.sqlite.org/lang_transaction.html).
    """
    engine = create_engine(
        URL.create("sqlite", database=path),
        connect_args={
            "timeout": busy_timeout,
            "isolation_level": None,
            "check_same_thread": False,
        },
        poolclass=pool,
    )

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


def _check_names_a_file(path: str) -> None:
    if path in ("", ":memory:"):
        raise UsageError("the sqlite:// URL names no file; use sqlite:///outbox.db")


def _make_private(path: str) -> None:
    """See that ``path`` is a plain file of ours; the log beside it gets the same mode.

    A file that is there is not opened: closing it would take away all locks that this process has
    on it, those of its connections, too (https://www.sqlite.org/howtocorrupt.html, 2.2).
    """
    try:
        with _making:
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                os.close(os.open(path, flags, 0o600))
                return
            except FileExistsError:
                found = os.lstat(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be opened: {error.strerror}") from error
    if stat.S_ISLNK(found.st_mode):
        raise UsageError(
            f"{path} is a symbolic link, which anybody who may write its folder could turn "
            "elsewhere; name the file itself"
        )
    if not stat.S_ISREG(found.st_mode):
        raise UsageError(f"{path} is no plain file")
    if found.st_uid != os.geteuid():
        raise UsageError(f"{path} belongs to another user (uid {found.st_uid})")
    if not os.access(path, os.R_OK | os.W_OK):
        raise UsageError(f"{path} may not be read and written")


_making = threading.Lock()
"""Held until a new file is closed: no other thread of this process has it open before that."""


def _begin_anew() -> None:
    global _making
    _making = threading.Lock()


process.after_fork(_begin_anew)
