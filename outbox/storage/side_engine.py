"""Engines beside the application's, with which outbox's threads reach its database.

A connection is made exactly as the application makes its own: by the same dialect, driver and
creator, with the same arguments, TLS included, and the same listeners. What can't be shared with
another thread, or would harm the application, is refused.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, Engine, event
from sqlalchemy.pool import AssertionPool, Pool, StaticPool

from outbox.storage.engines import names_memory
from outbox.telemetry import tracing

if TYPE_CHECKING:
    import asyncio

__all__ = ["SideEngine", "Unfit", "refusal_of", "refuse"]

T = TypeVar("T")

_SHORTEST_BUSY_TIMEOUT = 1000  # milliseconds
_LOCK_TIMEOUT = 10_000  # milliseconds
_NAME_ONE = "name another engine with outbox.sql.bind(..., engine=...)"

_refusals: weakref.WeakKeyDictionary[Pool, str] = weakref.WeakKeyDictionary()
"""Why an engine can't be used; by pool, which engines with options share."""
_harmed: weakref.WeakKeyDictionary[Pool, str] = weakref.WeakKeyDictionary()
"""Why an application's engine would suffer from a second writer, whichever engine that uses."""


class Unfit(Exception):
    """An engine's database can't be used from another thread; the text says why, and the remedy."""


class SideEngine:
    """Connections to the database of an application's engine, for one thread. Not thread-safe.

    Attributes:
        engine: the engine; call everything that uses it by :meth:`run`.
    """

    engine: Engine

    def __init__(self, engine: Engine, named: Engine | None = None) -> None:
        """Prepare to connect.

        Args:
            engine: the application's engine.
            named: the engine to connect with instead, if the application named one.

        Raises:
            Unfit: see the class.
            sqlalchemy.exc.SQLAlchemyError: an SQLite database can't be examined.
        """
        source = engine if named is None else named
        refusal = refusal_of(engine, named)
        if refusal is not None:
            raise Unfit(refusal)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_sqlite = source.dialect.name == "sqlite"
        self._is_async = source.dialect.is_async or (self._is_sqlite and engine.dialect.is_async)
        if self._is_sqlite:
            self.engine = _Copy(source, with_events=False)
            try:
                self.run(_examine, engine)
                busy_timeout = _checked(engine)
            except BaseException:
                self.close()
                raise
            _begin_immediately(self.engine, busy_timeout // 4)
        else:
            # Not with a connection of the application's pool: a thread that is interrupted there,
            # by a signal handler that raises, leaves the pool's lock taken to all others.
            self.engine = _Copy(source)

    def with_options(self, options: Mapping[str, Any]) -> Engine:
        """Return the engine with these execution options."""
        return self.engine.execution_options(**options) if options else self.engine

    def run(self, function: Callable[..., T], *args: Any, **options: Any) -> T:
        """Call ``function``, which may use the engine, and return its result."""
        if not self._is_async:
            with tracing.hidden():
                return function(*args, **options)
        import asyncio

        from sqlalchemy.util import greenlet_spawn

        # The application's event loop may be busy, or gone: its connections can't be used here.
        if self._loop is None:
            self._loop = asyncio.new_event_loop()
        with tracing.hidden():
            return self._loop.run_until_complete(greenlet_spawn(function, *args, **options))

    def rest(self) -> None:
        """Close what must not stay open while nothing is done.

        A forked child would inherit an SQLite connection, whose locks are not valid there.
        """
        if self._is_sqlite:
            self.run(self.engine.dispose)

    def close(self) -> None:
        """Close the connections."""
        self.run(self.engine.dispose)
        if self._loop is not None:
            self._loop.close()
            self._loop = None


class _Copy(Engine):
    """An engine that connects like another one, with a separate pool."""

    def __init__(self, source: Engine, *, with_events: bool = True) -> None:
        super().__init__(
            source.pool.recreate(),
            source.dialect,
            source.url,
            execution_options=source.get_execution_options(),
            hide_parameters=True,
        )
        if with_events:  # as SQLAlchemy does for Engine.execution_options()
            self.dispatch = self.dispatch._join(source.dispatch)
            self._has_events = source._has_events


def refusal_of(engine: Engine, named: Engine | None = None) -> str | None:
    """Return why stored events of ``engine`` can't be published from a thread, as far as is known.

    This does no I/O.
    """
    source = engine if named is None else named
    known = _harmed.get(engine.pool) or _refusals.get(source.pool)
    if known is not None:
        return known
    if isinstance(source.pool, StaticPool | AssertionPool):
        return f"its {type(source.pool).__name__} has one connection for all threads; {_NAME_ONE}"
    if engine.dialect.name == "sqlite" and names_memory(engine.url):
        return "no other thread or process can reach a database in memory"
    return None


def refuse(engine: Engine, reason: str) -> None:
    """Have :func:`refusal_of` return ``reason`` for ``engine`` from now on."""
    _refusals[engine.pool] = f"{reason}; {_NAME_ONE}"


def _examine(engine: Engine) -> None:
    """Find out how the application's transactions begin in an SQLite file, in one of its kind.

    A transaction that has read can't wait for the lock when it comes to write: if another
    connection has written meanwhile, it fails. So a second writer is harmless only to transactions
    that take the lock when they begin, or begin with their first write, as Python's driver has them
    do by default (https://www.sqlite.org/lang_transaction.html).
    """
    if engine.pool in _busy_timeouts:
        return
    statements: list[str] = []
    copy = _Copy(engine)
    try:
        with copy.connect() as connection:
            _trace(connection, statements.append)
            # The first statement begins the transaction.
            busy_timeout = connection.exec_driver_sql("PRAGMA busy_timeout").scalar_one()
            is_open = connection.connection.driver_connection.in_transaction  # type: ignore[union-attr]
            locking = connection.exec_driver_sql("PRAGMA locking_mode").scalar_one()
            connection.rollback()
    finally:
        copy.dispose()
    takes_lock = any("IMMEDIATE" in each or "EXCLUSIVE" in each for each in statements)
    if str(locking).lower() == "exclusive":
        _harmed[engine.pool] = (
            "its connections keep the file to themselves (PRAGMA locking_mode=EXCLUSIVE), so they "
            "and outbox's would lock each other out"
        )
    elif is_open and not takes_lock:
        _harmed[engine.pool] = (
            "its transactions begin without the lock, so those that read before they write would "
            "fail with 'database is locked' whenever outbox has written in between; have them "
            "begin with BEGIN IMMEDIATE"
        )
    elif busy_timeout < _SHORTEST_BUSY_TIMEOUT:
        _harmed[engine.pool] = (
            f"its connections wait only {busy_timeout} ms for the lock, and would fail while "
            "outbox has it; set connect_args={'timeout': 5}"
        )
    _busy_timeouts[engine.pool] = busy_timeout


_busy_timeouts: weakref.WeakKeyDictionary[Pool, int] = weakref.WeakKeyDictionary()


def _checked(engine: Engine) -> int:
    """Return the busy timeout in milliseconds of an examined engine.

    Raises:
        Unfit: see :class:`SideEngine`.
    """
    refusal = _harmed.get(engine.pool)
    if refusal is not None:
        raise Unfit(refusal)
    return _busy_timeouts[engine.pool]


def _trace(connection: Connection, note: Callable[[str], None]) -> None:
    """Call ``note`` with each statement that SQLite executes, as far as the driver can."""
    driver_connection: Any = connection.connection.driver_connection
    if not hasattr(driver_connection, "set_trace_callback"):
        return
    if connection.dialect.is_async:
        adapted: Any = connection.connection.dbapi_connection
        adapted.run_async(lambda driver: driver.set_trace_callback(note))
    else:
        driver_connection.set_trace_callback(note)


def _begin_immediately(engine: Engine, commit_timeout: int) -> None:
    """Have transactions take the lock when they begin, and wait for readers only a short time.

    Waiting for the lock is harmless to others. But while a commit waits for readers, at most
    ``commit_timeout`` ms, no new reader can begin, and the application's must not wait too long.
    """

    @event.listens_for(engine, "connect")
    def leave_transactions(connection: Any, _: object) -> None:
        connection.isolation_level = None

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(f"PRAGMA busy_timeout={_LOCK_TIMEOUT}")
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        connection.exec_driver_sql(f"PRAGMA busy_timeout={commit_timeout}")
