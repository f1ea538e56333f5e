"""Events stored as rows in the application's transaction.

Rows are mapped objects: the session writes them in its flush, removes them when their savepoint is
rolled back, and drops them when it is closed. So no session event decides what is stored. The
events only bring back rows that the application has expunged with its own objects, and start
publishing the rows after the commit, without waiting for a relay.
"""

from __future__ import annotations

import inspect
import logging
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, Engine, event, insert
from sqlalchemy import inspect as state_of
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Mapper, Session, SessionTransaction, registry
from sqlalchemy.orm.session import SessionTransactionOrigin

from outbox import sinks
from outbox.backlog.notifier import ids
from outbox.errors import UsageError
from outbox.event import Event
from outbox.messages.rows import UNROUTED, values_of
from outbox.observer import Observer, seam
from outbox.publisher import Publisher
from outbox.sql.commits import commits_by_itself, is_autocommit
from outbox.sql.handover import (
    Handover,
    Place,
    Row,
    doubt,
    handover_for,
    name_engine,
    options_of,
    place_of,
    queue_for,
)
from outbox.sql.open_row import OpenRow, end_rows_of, follow, roll_back_to
from outbox.storage.schema import events, events_with_grace, known_dialect
from outbox.telemetry import sources

__all__ = [
    "bind",
    "followed",
    "followed_on",
    "sink_of_connection",
    "sink_of_session",
    "uncommitted_events",
]

logger = logging.getLogger("outbox.sql")

_STORED = "outbox.sql: rows of this transaction"
_AUTOCOMMIT = (
    "the connection is in AUTOCOMMIT, so a rollback would not remove the stored event; use a "
    "connection with transactions"
)


class _Row:
    """A row of the table, as a session sees it: an object like those of the application."""

    __tablename__ = events.name  # for listeners that expect declarative classes in session.new
    __table__ = events
    stored: _Stored

    def __init__(self, values: dict[str, Any]) -> None:
        # A new object has no history to keep, and setattr() would take a third of the time.
        self.__dict__.update(values)


class _RowWithGrace(_Row):
    """A row that becomes due for relays only after :data:`GRACE`."""


_mappings = registry()
_mappings.map_imperatively(_Row, events, eager_defaults=False)
_mappings.map_imperatively(_RowWithGrace, events_with_grace, eager_defaults=False)
_mapper = state_of(_Row)


class _Rows(dict["_Row", "_Stored"]):
    """The rows of a session's open transaction.

    Attributes:
        unwritten: those that are not written yet.
        connection: the connection that has written the last ones, and may write more.
        places: where it writes, by queue.
        committing: whether the commit of the transaction has begun.
        expects_commit: whether closing the session without a commit or rollback is logged.
    """

    __slots__ = ("committing", "connection", "expects_commit", "places", "unwritten")

    def __init__(self) -> None:
        super().__init__()
        self.unwritten: dict[_Row, None] = {}
        self.connection: Connection | None = None
        self.places: dict[str, Place] = {}
        self.committing = False
        self.expects_commit = False

    def place_for(self, queue: str) -> Place | None:
        """Return where the last rows for ``queue`` were written, if any were."""
        place = self.places.get(queue)
        if place is None and self.connection is not None:
            place = self.places[queue] = place_of(self.connection, queue)
        return place


@dataclass(slots=True, eq=False)
class _Stored:
    """A row in a session's open transaction.

    Attributes:
        rows: the rows of the transaction.
        event: its event.
        queue: its queue.
        at: the ``time.monotonic()`` at which it was enqueued.
        transaction: the innermost transaction of the session then; a savepoint's is one.
        publisher: its publisher, if there is one.
        handover: what publishes it after the commit, if this process does.
        observer: the test that observes it, if any.
        is_callers: whether the session uses a connection of its caller.
        place: where; None if it was not, or through a connection of the caller.
        seq: its number, once it was written.
        open_row: what the handle of its task knows of it, if it is a task.
    """

    rows: _Rows
    event: Event
    queue: str
    at: float
    transaction: SessionTransaction | None
    publisher: Publisher | None
    handover: Handover | None
    observer: Observer | None
    is_callers: bool
    place: Place | None = None
    seq: int = 0
    open_row: OpenRow | None = None

    def end(self, *, is_dropped: bool) -> None:
        """Have the handle of its task know that the transaction is over, or the savepoint."""
        if self.open_row is not None:
            self.open_row.end(is_dropped=is_dropped)


def bind(
    provider: Callable[[], Any] | Any | None, *, engine: Any = None, begin: bool = False
) -> None:
    """Store events in the current session's transaction if they are enqueued while it is open.

    Without a session, or before it begins a transaction, events are collected as usual, and so they
    are where its transaction can take no row any more: in a listener for the session's
    ``after_commit`` or ``after_rollback``, and after a failed flush. A session begins a transaction
    when it is first used or an object is added
    (https://docs.sqlalchemy.org/en/20/orm/session_transaction.html).

    Args:
        provider: a ``scoped_session`` or ``async_scoped_session``, in which outbox creates no
            session, and whose scope function may raise where there is none; or a callable without
            arguments that returns the current ``Session`` or ``AsyncSession``, or that returns None
            or raises ``LookupError`` or ``RuntimeError`` without one. None undoes an earlier call.
        engine: the ``Engine`` or ``AsyncEngine`` with which this process publishes stored events
            after their commit, also those that are enqueued with ``session=`` or ``connection=``.
            The default is to connect as the engine of their session does.
        begin: True to store each event in the current session, which is created, and its
            transaction begun, if need be: as by ``session.add()``. Events whose session is closed
            without a commit or rollback are named in the log at WARNING.

    Raises:
        UsageError: ``provider`` or ``engine`` is something else.
    """
    engine = getattr(engine, "sync_engine", engine)
    if not isinstance(engine, Engine | None):
        raise UsageError(f"bind(engine=) needs an SQLAlchemy engine, not {engine!r}")
    if provider is None:
        sinks.bind(None)
        name_engine(engine)
        return
    sessions = getattr(provider, "registry", None)
    current = provider
    if sessions is not None and not begin:
        current = lambda: sessions() if _has(sessions) else None  # noqa: E731
    if isinstance(provider, Session) or not callable(current):
        raise UsageError(
            "bind() needs a scoped_session or a callable that returns the current session, not "
            f"{provider!r}"
        )

    def sink() -> sinks.Sink | None:
        try:
            session = _sync_session(current())
        except (LookupError, RuntimeError) as error:  # outside an application context
            logger.debug("no session here: %r", error)
            return None
        if session is None:
            return None
        if _open_transaction(session) is None and not (begin and not session.in_transaction()):
            return None
        return _sink(session, expects_commit=begin)

    if sessions is None:
        sinks.bind(sink, current=provider)
    else:
        sinks.bind(sink, _remover(provider, sessions), lambda: _has(sessions), sessions)
    name_engine(engine)


def _has(sessions: Any) -> bool:
    """Return whether a scoped session's registry has a session in the current scope."""
    try:
        return bool(sessions.has())
    except Exception as error:  # the scope function's: there is no scope here
        logger.debug("no session here: %r", error)
        return False


def _remover(provider: Any, sessions: Any) -> Callable[[], Any] | None:
    """Return a function that removes the current session, if there is one."""
    remove = getattr(provider, "remove", None)
    if remove is None:
        return None
    if inspect.iscoroutinefunction(remove):

        async def remove_async() -> None:
            if _has(sessions):
                await remove()

        return remove_async
    return lambda: remove() if _has(sessions) else None


def sink_of_session(session: Any) -> sinks.Sink | None:
    """Return a sink that stores events in the transaction of ``session``, and begins it if needed.

    It is None where the transaction can take no row any more, as in a listener for
    ``after_commit``.

    Raises:
        UsageError: ``session`` isn't an SQLAlchemy session, or can't store events.
    """
    sync_session = _sync_session(session)
    if sync_session is None:
        raise UsageError("session is None; omit it to collect the event")
    if sync_session.in_transaction() and _open_transaction(sync_session) is None:
        return None
    return _sink(sync_session)


def sink_of_connection(connection: Any) -> sinks.Sink:
    """Return a sink that stores events in the transaction of ``connection`` at once.

    Raises:
        UsageError: ``connection`` isn't an SQLAlchemy connection, or can't store events.
    """
    if not isinstance(connection, Connection):
        hint = (
            "; in asyncio use await connection.run_sync(lambda c: enqueue_event(..., connection=c))"
            if hasattr(connection, "run_sync")
            else ""
        )
        raise UsageError(f"{connection!r} is not an SQLAlchemy Connection{hint}")
    _check(connection)

    def store(stored: Event, publisher: Publisher | None) -> bool:
        if not connection.in_transaction():
            connection.begin()  # as any statement would
        if commits_by_itself(connection):
            raise UsageError(_AUTOCOMMIT)
        handover = _handover(connection.engine, stored, publisher)
        queue = queue_for(stored, connection.engine, options_of(connection), publisher)
        at = time.monotonic()
        statement = insert(events_with_grace if _has_grace(handover, queue) else events)
        values = _values(stored, queue)
        number = 0
        if handover is not None and queue in ("", UNROUTED):
            key = connection.execute(statement, values).inserted_primary_key
            number = 0 if key is None else key[0]
        else:
            # Without a number, which would take the right to read the table.
            connection.execute(statement.inline(), values)
        if handover is not None:
            _hand_over_later(connection, handover, stored, queue, number, at)
        return True

    return store


def _sync_session(session: Any) -> Session | None:
    """Return the ``Session`` behind a scoped session, an ``AsyncSession``, or both."""
    if session is None or isinstance(session, Session):
        return session
    sessions = getattr(session, "registry", None)  # of a scoped session
    inner = sessions() if sessions is not None else session
    inner = getattr(inner, "sync_session", inner)  # of an AsyncSession
    if not isinstance(inner, Session):
        raise UsageError(f"{session!r} is not an SQLAlchemy Session")
    return inner


def _innermost(session: Session) -> SessionTransaction | None:
    return session.get_nested_transaction() or session.get_transaction()


def _open_transaction(session: Session) -> SessionTransaction | None:
    """Return the innermost transaction of ``session`` that can still take a row, or None.

    In a listener the innermost one may be over: behind a savepoint it is the surrounding one. After
    a failed flush there is none until the rollback.
    """
    transaction = _innermost(session)
    while transaction is not None and transaction.nested and _is_over(transaction):
        if getattr(transaction, "_rollback_exception", None) is not None:
            return None
        transaction = transaction.parent
    return None if transaction is None or _is_over(transaction) else transaction


def _is_over(transaction: SessionTransaction) -> bool:
    if transaction.is_active:
        return False
    # It isn't active either in a listener for after_begin, where it goes on.
    state = getattr(getattr(transaction, "_state", None), "name", "")
    return state in ("PREPARED", "COMMITTED", "DEACTIVE", "CLOSED")


def _handover(engine: Engine, stored: Event, publisher: Publisher | None) -> Handover | None:
    """Return what publishes ``stored`` after the commit; None if a relay does."""
    observer = seam.observer
    if stored.deliver_at is not None or (observer is not None and not observer.hands_over):
        return None
    return handover_for(engine, publisher)


def _has_grace(handover: Handover | None, queue: str) -> bool:
    """Return whether others leave the row to this process for a moment, which publishes it."""
    return handover is not None and handover.publishes and queue in ("", UNROUTED)


def _values(stored: Event, queue: str) -> dict[str, Any]:
    return values_of(stored, queue=queue, rank=(stored.priority or 0) if queue else 0)


def _sink(session: Session, *, expects_commit: bool = False) -> sinks.Sink:
    def store(stored: Event, publisher: Publisher | None) -> bool:
        _store_in_session(session, stored, publisher)
        if expects_commit:
            session.info[_STORED].expects_commit = True
        return True

    store.session = session  # type: ignore[attr-defined]  # for followed()
    return store


def _store_in_session(session: Session, stored: Event, publisher: Publisher | None) -> None:
    where = _bind_of(session)
    _check(where)
    rows = session.info.get(_STORED)
    root = session.get_transaction()
    if root is not None and (rows is None or rows.connection is None):
        # A connection that the session has already may have been set to anything.
        present = getattr(root, "_connections", {}).get(where)
        if present is not None:
            _check_transactional(present[0])
    handover = _handover(where.engine, stored, publisher)
    options = options_of(where) if isinstance(where, Connection) else {}
    queue = queue_for(stored, where.engine, options, publisher)
    row = (_RowWithGrace if _has_grace(handover, queue) else _Row)(_values(stored, queue))
    if not getattr(session, "_warn_on_events", False):
        session.add(row)
    # else a listener while a flush executes: it takes no other objects, but the next flush does
    transaction = _open_transaction(session)
    if rows is None:
        rows = session.info[_STORED] = _Rows()
    rows.unwritten[row] = None
    rows[row] = row.stored = _Stored(
        rows,
        stored,
        queue,
        time.monotonic(),
        transaction or _innermost(session),
        publisher,
        handover,
        seam.observer,
        isinstance(where, Connection),
    )


def _bind_of(session: Session) -> Engine | Connection:
    """Return what a flush would write rows through.

    Raises:
        UsageError: there is nothing.
    """
    # A session that routes reads to other servers looks at this
    # (https://docs.sqlalchemy.org/en/20/orm/persistence_techniques.html, custom vertical
    # partitioning).
    flushing = getattr(session, "_flushing", False)
    session._flushing = True
    try:
        return session.get_bind(_mapper)
    except UnboundExecutionError as error:
        raise UsageError(
            "the session has no engine for the table outbox_events; bind one "
            "(sessionmaker(bind=engine), or binds={outbox.sql.events: engine})"
        ) from error
    finally:
        session._flushing = flushing


def _check_transactional(connection: Connection) -> None:
    if is_autocommit(connection) or commits_by_itself(connection):
        raise UsageError(_AUTOCOMMIT)


def _before_insert(_: Mapper[Any], connection: Connection, row: _Row) -> None:
    rows = row.stored.rows
    if rows.connection is not connection:
        # The last chance: what is written in AUTOCOMMIT could not be taken back.
        _check_transactional(connection)
        rows.connection = connection
        rows.places.clear()
    stored = row.stored
    options = options_of(connection)
    if stored.queue and options and not stored.is_callers:
        # The session has chosen another schema for its transaction.
        stored.queue = queue_for(stored.event, connection.engine, options, stored.publisher)
        row.__dict__.update(_values(stored.event, stored.queue))


def _after_insert(_: Mapper[Any], connection: Connection, row: _Row) -> None:
    stored = row.stored
    stored.rows.unwritten.pop(row, None)
    if stored.is_callers and stored.open_row is not None:
        stored.open_row.move_to(connection)
        _follow(connection, stored.open_row)
    if stored.handover is None:
        return
    stored.seq = row.__dict__["seq"]
    if stored.is_callers:
        # The session's commit is not that of its caller's connection.
        _hand_over_later(
            connection, stored.handover, stored.event, stored.queue, stored.seq, stored.at
        )
    else:
        stored.place = stored.rows.place_for(stored.queue)


for _class in (_Row, _RowWithGrace):
    event.listen(_class, "before_insert", _before_insert)
    event.listen(_class, "after_insert", _after_insert)


@event.listens_for(Session, "before_commit")
@event.listens_for(Session, "before_flush")
@event.listens_for(Session, "after_flush_postexec")
def _bring_back(session: Session, *_: Any) -> None:
    """Add the rows that were stored while a flush executed, or expunged with everything else."""
    rows: _Rows | None = session.info.get(_STORED)
    if rows:
        for row in rows.unwritten:
            if row not in session:
                session.add(row)


@event.listens_for(Session, "before_commit")
def _note_commit(session: Session) -> None:
    rows: _Rows | None = session.info.get(_STORED)
    if rows and not session.in_nested_transaction():
        rows.committing = True


# Before the application's listeners, which may raise.
@event.listens_for(Session, "after_commit", insert=True)
def _after_commit(session: Session) -> None:
    # SQLAlchemy also fires this when a savepoint is released: that is not the commit.
    if session.in_nested_transaction():
        return
    rows = session.info.pop(_STORED, None)
    if rows:
        # Without an identity if its savepoint was rolled back.
        written = [stored for row, stored in rows.items() if state_of(row).identity is not None]
        for stored in written:
            if not stored.is_callers:  # else its caller's commit is yet to come
                stored.end(is_dropped=False)
        sources.count("outbox_events_collected_total", (), len(written))
        sources.count("outbox_events_total", ("stored",), len(written))
        _hand_over(written)
        rows.clear()  # each row refers to them


def _hand_over(stored: Iterable[_Stored], *, certain: bool = True) -> None:
    submitted: dict[tuple[Handover, Place], list[Row]] = {}
    routed: dict[Handover, set[str]] = {}
    for each in stored:
        if each.handover is None or each.place is None:
            continue
        if each.queue not in ("", UNROUTED):
            routed.setdefault(each.handover, set()).add(each.queue)
        else:
            number = Row(each.seq, each.event.id, each.at, certain)
            submitted.setdefault((each.handover, each.place), []).append(number)
    for (handover, place), numbers in submitted.items():
        handover.submit(place, numbers)
    for handover, queues in routed.items():
        handover.announce(queues)


def _hand_over_doubtful(rows: _Rows) -> None:
    """Have the rows published that are in the table after all.

    A commit that was interrupted, or whose connection was lost, may have succeeded all the same.
    """
    if rows.committing:
        rows.committing = False
        _hand_over(rows.values(), certain=False)


@event.listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None and _STORED in session.info:
        rows: _Rows = session.info.pop(_STORED)
        if rows and rows.expects_commit and not rows.committing:
            logger.warning(
                "%d event(s) dropped: the session that they were stored in was closed without a "
                "commit; call commit() on it (in Flask db.session.commit()), or enqueue with "
                "session=None what doesn't belong to its transaction: %s",
                len(rows),
                ids([stored.event for stored in rows.values()]),
            )
        is_doubtful = rows.committing
        _hand_over_doubtful(rows)
        for row, stored in rows.items():
            stored.end(is_dropped=not is_doubtful or row in rows.unwritten)
            _note_cleared(stored)
        rows.clear()


@event.listens_for(Session, "after_rollback")
def _after_rollback(session: Session) -> None:
    rows: _Rows | None = session.info.get(_STORED)
    if rows and not session.in_nested_transaction():
        rows.expects_commit = False  # it was rolled back explicitly, or its commit failed


@event.listens_for(Session, "after_soft_rollback")
def _after_soft_rollback(session: Session, transaction: SessionTransaction) -> None:
    rows: _Rows | None = session.info.get(_STORED)
    if not rows:
        return
    is_doubtful = transaction.parent is None and rows.committing
    if transaction.parent is None:
        _hand_over_doubtful(rows)
    elif not transaction.nested:
        rows.committing = False  # a flush has failed, so the commit itself hasn't begun
    for row, stored in list(rows.items()):
        if transaction in _ancestors(stored.transaction):
            stored.end(is_dropped=not is_doubtful or row in rows.unwritten)
            rows.unwritten.pop(row, None)
            del rows[row]
            _note_cleared(stored)
        elif row not in rows.unwritten and state_of(row).transient:
            # It was written in a savepoint, but enqueued before: the next flush writes it again.
            del rows[row]
            again = type(row)(_values(stored.event, stored.queue))
            again.stored = rows[again] = stored
            stored.place = None
            rows.unwritten[again] = None


def _ancestors(transaction: SessionTransaction | None) -> Iterator[SessionTransaction]:
    while transaction is not None:
        yield transaction
        transaction = transaction.parent


_begun: ContextVar[weakref.ref[SessionTransaction] | None] = ContextVar("begun", default=None)


@event.listens_for(Session, "after_transaction_create")
def _note_begun(_: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None and transaction.origin is SessionTransactionOrigin.BEGIN:
        _begun.set(weakref.ref(transaction))


def _is_begun() -> bool:
    begun = _begun.get()
    transaction = None if begun is None else begun()
    return transaction is not None and not _is_over(transaction)


sinks.is_begun = _is_begun


def followed(stored: Event, session: Any) -> tuple[Engine | None, OpenRow | None]:
    """Return the engine with which ``session`` writes events, and what becomes of a row.

    Args:
        stored: the event that was stored last.
        session: the session; None for the one in which an event is stored here by ``bind()``.
    """
    if session is None:
        sink = None if sinks.bound is None else sinks.bound()
        session = getattr(sink, "session", None)
    sync_session = _sync_session(session)
    if sync_session is None:
        return None, None
    engine = _bind_of(sync_session).engine
    rows: _Rows | None = sync_session.info.get(_STORED)
    last = next(reversed(rows.values())) if rows else None
    if last is None or last.event is not stored:
        return engine, None
    last.open_row = OpenRow(sync_session)
    return engine, last.open_row


def followed_on(connection: Connection) -> OpenRow:
    """Return what becomes of a row that was just written through ``connection``."""
    row = OpenRow(connection)
    _follow(connection, row)
    return row


def _follow(connection: Connection, row: OpenRow) -> None:
    _watch(connection.engine)
    follow(connection, row)


def uncommitted_events(session: Session) -> tuple[Event, ...]:
    """Return the events that are stored in the open transaction of ``session``."""
    rows: _Rows = session.info.get(_STORED) or _Rows()
    return tuple(stored.event for stored in rows.values())


def _note_cleared(stored: _Stored) -> None:
    if stored.observer is not None:
        stored.observer.cleared([stored.event])


@dataclass(slots=True)
class _Uncommitted:
    """Rows that were written in a transaction of a connection.

    Attributes:
        transaction: the ``id()`` of the transaction.
        rows: the rows by what publishes them, and where.
    """

    transaction: int
    rows: dict[tuple[Handover, Place], list[Row]]


_uncommitted: weakref.WeakKeyDictionary[Connection, _Uncommitted] = weakref.WeakKeyDictionary()
_watched: weakref.WeakSet[Engine] = weakref.WeakSet()


def _hand_over_later(
    connection: Connection, handover: Handover, stored: Event, queue: str, seq: int, at: float
) -> None:
    """Have a row published when the transaction of ``connection`` is committed."""
    _watch(connection.engine)
    transaction = id(connection.get_transaction())
    uncommitted = _uncommitted.get(connection)
    if uncommitted is None or uncommitted.transaction != transaction:
        uncommitted = _uncommitted[connection] = _Uncommitted(transaction, {})
    # The savepoint may be rolled back yet.
    row = Row(seq, stored.id, at, certain=not connection.in_nested_transaction())
    uncommitted.rows.setdefault((handover, place_of(connection, queue)), []).append(row)


def _watch(engine: Engine) -> None:
    """Be notified of what becomes of the transactions of the connections of ``engine``."""
    if engine in _watched:
        return
    event.listen(engine, "commit", _on_commit)
    event.listen(engine, "commit_twophase", _on_commit)
    event.listen(engine, "rollback", _on_rollback)
    event.listen(engine, "rollback_twophase", _on_rollback)
    event.listen(engine, "rollback_savepoint", _on_rollback_to_savepoint)
    event.listen(engine, "handle_error", _on_error)
    _watched.add(engine)


def _on_commit(connection: Connection, *_: Any) -> None:
    end_rows_of(connection, is_dropped=False)  # it may fail yet: then no one knows
    uncommitted = _uncommitted.pop(connection, None)
    transaction = connection.get_transaction()
    if uncommitted is None or uncommitted.transaction != id(transaction):
        return
    for (handover, place), rows in uncommitted.rows.items():
        # SQLAlchemy has no event behind the commit: the handover waits until it is over.
        handover.submit(place, rows, transaction)


def _on_rollback(connection: Connection, *_: Any) -> None:
    _uncommitted.pop(connection, None)  # the next transaction may have the same id()
    end_rows_of(connection, is_dropped=True)


def _on_rollback_to_savepoint(connection: Connection, name: str, _: Any) -> None:
    roll_back_to(connection, name)


def _on_error(context: ExceptionContext) -> None:
    connection = context.connection
    transaction = None if connection is None else connection.get_transaction()
    if transaction is not None:
        doubt(transaction)  # its commit fails, or is a rollback for PostgreSQL


def _check(where: Engine | Connection) -> None:
    """Raise UsageError if events can't be stored through ``where``."""
    known_dialect(where.dialect.name)
    if is_autocommit(where):
        raise UsageError(_AUTOCOMMIT)
