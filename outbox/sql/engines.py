"""Engines of our own: for relays, commands, and the embedded queue."""

from __future__ import annotations

import importlib.util
import os
import stat
import threading
from typing import Any

from sqlalchemy import Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError, NoSuchModuleError
from sqlalchemy.pool import QueuePool

from outbox import process
from outbox.errors import MissingExtra, UsageError
from outbox.sql.schema import DIALECTS

__all__ = ["open_engine", "open_sqlite"]

_BUSY_TIMEOUT = 10.0  # seconds a connection to SQLite waits for another one's write to end
_DRIVERS = {"postgresql": ("psycopg", "psycopg2")}


def open_engine(url: str | URL) -> Engine:
    """Return an engine for ``url``; nothing is connected yet, but a file of SQLite is made.

    A driver of asyncio is replaced by one for threads, and none is taken for the one that is there.

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
        return open_sqlite(parsed.database or "")
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


def open_sqlite(
    path: str, *, synchronous: str = "FULL", busy_timeout: float = _BUSY_TIMEOUT
) -> Engine:
    """Return an engine for the file ``path``, made readable for its owner alone if it is not there.

    Every transaction begins with ``BEGIN IMMEDIATE``: it waits for the other writers where it
    begins, for ``busy_timeout``, and cannot fail later since another one came first (that a
    transaction which has read cannot wait is SQLite's rule:
    https://www.sqlite.org/lang_transaction.html).
    The journal is a write-ahead log, beside which others can read.

    Args:
        path: of the file; its folder must exist.
        synchronous: ``FULL``: what is committed outlives a power cut. ``NORMAL``: it outlives the
            end of the process, and a power cut may take the last transactions.
        busy_timeout: seconds.

    Raises:
        UsageError: the path is empty, a symbolic link, no plain file, or somebody else's.
    """
    if path in ("", ":memory:"):
        raise UsageError("the sqlite:// URL names no file; use sqlite:///outbox.db")
    _make_private(path)
    engine = create_engine(
        URL.create("sqlite", database=path),
        connect_args={
            "timeout": busy_timeout,
            "isolation_level": None,
            "check_same_thread": False,
        },
        poolclass=QueuePool,
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: object) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute(f"PRAGMA synchronous={synchronous}")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")

    return engine


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
