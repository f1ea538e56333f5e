"""Engines that outbox creates: for relays, commands and the embedded queue."""

from __future__ import annotations

import contextlib
import importlib.util
import inspect
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
from outbox.storage.drivers.arrays import send_arrays_quickly
from outbox.storage.schema import known_dialect
from outbox.storage.transactions import READS_ONLY
from outbox.system import process

__all__ = ["dispose_with", "engine_beside", "names_memory", "open_engine", "open_sqlite"]

logger = logging.getLogger("outbox.sql")

_BUSY_TIMEOUT = 10.0  # seconds
_DRIVERS = {"postgresql": ("psycopg", "psycopg2"), "mariadb": ("pymysql", "mysqldb")}
_MODULES = {"mysqldb": "MySQLdb"}
_PACKAGES = {"mysqldb": "mysqlclient"}
# By default, a server that is gone without a word would be noticed only after hours, and one that
# takes connections without answering would be waited for without end.
_KEEPALIVE = {
    "keepalives_idle": 30,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "connect_timeout": 10,
}
# These drivers can set no interval. Nothing that outbox does takes this long.
_TIMEOUTS = {"connect_timeout": 10, "read_timeout": 120, "write_timeout": 120}
# In place of MariaDB's 50 seconds: rows of outbox are locked for much less, and after that the
# transaction is tried again.
_LOCK_WAIT = 5  # seconds
# A pooler may run each transaction on another connection, where the statement isn't prepared.
_CONNECT_ARGS: dict[str, dict[str, Any]] = {
    "psycopg": {**_KEEPALIVE, "prepare_threshold": None},
    "psycopg2": _KEEPALIVE,
    "pymysql": _TIMEOUTS,
    "mysqldb": _TIMEOUTS,
}


def open_engine(url: str | URL, *, pool: type[Pool] = QueuePool) -> Engine:
    """Return an engine for an application's database, not connected yet.

    An asyncio driver in the URL is replaced by a synchronous one; a URL without a driver gets the
    one that is installed. ``?schema=NAME`` names the schema of outbox's tables in PostgreSQL.

    Args:
        url: the URL of a PostgreSQL, MariaDB or SQLite database; white space around it is not part
            of it.
        pool: the pool class.

    Raises:
        UsageError: the URL isn't a database URL, or outbox can't store events in that database.
            The message contains no part of the URL that might be a password.
        MissingExtra: the driver isn't installed.
    """
    try:
        parsed = make_url(url.strip() if isinstance(url, str) else url)
    except (ArgumentError, ValueError):  # ValueError quotes a port, which may be a password
        raise UsageError(
            "the database URL is invalid; use postgresql://user:password@host/database "
            "or sqlite:///file.db"
        ) from None
    dialect = known_dialect(parsed.get_backend_name())
    if dialect == "sqlite":
        if parsed.query:
            raise UsageError("a sqlite:// database URL takes no options here; remove them")
        path = parsed.database or ""
        _check_names_a_file(path)
        if not Path(path).parent.is_dir():
            raise UsageError(f"{path} cannot be opened: its folder does not exist")
        return _sqlite_engine(path, pool=pool)
    schema = parsed.query.get("schema")
    parsed = parsed.difference_update_query(["schema"])
    if schema is not None and (
        dialect != "postgresql" or not isinstance(schema, str) or not schema
    ):
        raise UsageError(
            f"invalid schema={schema} in the {parsed.get_backend_name()} URL; use the name of one "
            "schema of PostgreSQL, or leave it out"
        )
    drivers = _DRIVERS[dialect]
    installed = [name for name in drivers if importlib.util.find_spec(_MODULES.get(name, name))]
    requested = parsed.get_driver_name() if "+" in parsed.drivername else ""
    driver = requested if requested in drivers else (installed or [""])[0]
    if driver not in installed:
        name = _PACKAGES.get(driver, driver) or drivers[0]
        raise MissingExtra(
            f"the database needs the driver {name}, which isn't installed: pip install '{name}'"
        )
    connect_args = {
        name: value for name, value in _CONNECT_ARGS[driver].items() if name not in parsed.query
    }
    # Here once for each connection, since MariaDB needs four statements to do it for a transaction.
    options = {"isolation_level": "READ COMMITTED"} if dialect == "mariadb" else {}
    try:
        engine = create_engine(
            parsed.set(drivername=f"{dialect}+{driver}"),
            poolclass=pool,
            pool_pre_ping=True,
            connect_args=connect_args,
            hide_parameters=True,  # in errors: they are payloads and headers
            **options,
        )
    except (ArgumentError, NoSuchModuleError) as error:
        raise UsageError(f"SQLAlchemy rejects the database URL: {error}") from error
    if dialect == "mariadb":
        event.listen(engine, "connect", _limit_lock_waits)
    if driver == "psycopg":
        send_arrays_quickly(engine)
    if schema is None:
        return engine
    # Not by search_path: a pooler refuses it at the start, and a SET would stay with its next user.
    return engine.execution_options(schema_translate_map={None: schema})


def _limit_lock_waits(connection: Any, _: object) -> None:
    with contextlib.closing(connection.cursor()) as cursor:
        cursor.execute(f"SET SESSION innodb_lock_wait_timeout = {_LOCK_WAIT}")


_beside: weakref.WeakKeyDictionary[Engine, Engine | None] = weakref.WeakKeyDictionary()


def engine_beside(engine: Engine) -> Engine | None:
    """Return an engine for the database of ``engine`` that many threads can use, or None.

    It is ``engine`` itself, unless that is an asyncio engine or an SQLite engine, whose
    transactions must begin differently. A database in memory has none, nor has an asyncio engine
    that connects with more than its URL says: that could be what makes the connection secure.
    """
    dialect = engine.dialect
    if dialect.name != "sqlite" and not dialect.is_async:
        return engine
    if dialect.name != "sqlite" and not _connects_by_url_alone(engine):
        return None
    if engine not in _beside:
        try:
            # NullPool, so that no SQLite connection stays open for a forked child to inherit: its
            # locks would not be valid there.
            _beside[engine] = open_engine(engine.url, pool=NullPool)
        except UsageError as error:
            logger.warning("leaving stored events to the relay: %s", error)
            _beside[engine] = None
    return _beside[engine]


def dispose_with(owner: object, engine: Engine) -> None:
    """Dispose of ``engine`` when nothing refers to ``owner`` any more, as when a cache drops it."""
    weakref.finalize(owner, _dispose, engine, process.pid).atexit = False


def _dispose(engine: Engine, pid: int) -> None:
    # The connections that a forked child has inherited are its parent's, which goes on using them.
    engine.dispose(close=process.pid == pid)


def _connects_by_url_alone(engine: Engine) -> bool:
    """Return whether nothing but the URL decides how ``engine`` connects; False if unknown."""
    if engine.url.query or list(engine.dialect.dispatch.do_connect):
        return False
    known = inspect.getclosurevars(engine.pool._creator).nonlocals
    arguments, parameters = engine.dialect.create_connect_args(engine.url)
    used = known.get("cargs_tup", known.get("cargs")), known.get("cparams")  # since 2.1, before
    if used[0] is None or used[1] is None:
        return False
    return list(used[0]) == list(arguments) and dict(used[1]) == parameters


def _discard_inherited() -> None:
    for engine in _beside.values():
        if engine is not None:
            engine.dispose(close=False)


process.after_fork(_discard_inherited)


def open_sqlite(
    path: str, *, synchronous: str = "FULL", busy_timeout: float = _BUSY_TIMEOUT
) -> Engine:
    """Return an engine for outbox's own file; a new file is created with mode 600.

    The journal is a write-ahead log, so readers and the writer don't block each other.

    Args:
        path: the path of the file; its folder must exist.
        synchronous: ``FULL``: a committed transaction survives a power cut. ``NORMAL``: it survives
            the end of the process, but a power cut may lose the last transactions.
        busy_timeout: the seconds that a transaction waits for another one to end before it begins.

    Raises:
        UsageError: the path is empty, a symbolic link, not a regular file, or owned by another
            user.
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
    """Return an engine whose transactions begin with ``BEGIN IMMEDIATE``, unless they only read.

    ``BEGIN IMMEDIATE`` waits for other writers, at most ``busy_timeout`` seconds, so that the
    transaction can't fail later because another one wrote first: a transaction that has already
    read can't wait for the lock (https://www.sqlite.org/lang_transaction.html).
    """
    engine = create_engine(
        URL.create("sqlite", database=path),
        connect_args={
            "timeout": busy_timeout,
            "isolation_level": None,
            "check_same_thread": False,
        },
        poolclass=pool,
        hide_parameters=True,  # in errors: they are payloads and headers
    )

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        reads = connection.get_execution_options().get(READS_ONLY, False)
        connection.exec_driver_sql("BEGIN" if reads else "BEGIN IMMEDIATE")

    return engine


def names_memory(url: URL) -> bool:
    """Return whether an SQLite URL names a database in memory, which has no file."""
    path = url.database or ""
    return (
        path in ("", ":memory:") or "mode=memory" in path or "memory" in url.query.get("mode", "")
    )


def _check_names_a_file(path: str) -> None:
    if path in ("", ":memory:"):
        raise UsageError("the sqlite:// URL names no file; use sqlite:///outbox.db")


def _make_private(path: str) -> None:
    """Create ``path`` with mode 600, or check that it is a regular file of this user.

    SQLite gives the log next to it the same mode. An existing file isn't opened: closing it would
    release every lock that this process holds on it, including those of its SQLite connections
    (https://www.sqlite.org/howtocorrupt.html, 2.2).
    """
    try:
        with _making:
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
                os.close(os.open(path, flags, 0o600))
                return
            except FileExistsError:
                status = os.lstat(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be opened: {error.strerror}") from error
    if stat.S_ISLNK(status.st_mode):
        raise UsageError(
            f"{path} is a symbolic link, which any user with write access to its folder could "
            "redirect; name the file itself"
        )
    if not stat.S_ISREG(status.st_mode):
        raise UsageError(f"{path} is not a regular file")
    if status.st_uid != os.geteuid():
        raise UsageError(f"{path} belongs to another user (uid {status.st_uid})")
    if not os.access(path, os.R_OK | os.W_OK):
        raise UsageError(f"{path} is not readable and writable for this user")


_making = threading.Lock()
"""Held until a new file is closed, so that no other thread of this process opens it before."""


def _replace_lock() -> None:
    global _making
    _making = threading.Lock()


process.after_fork(_replace_lock)
