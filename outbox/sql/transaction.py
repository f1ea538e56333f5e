"""Events as rows in the application's own transaction.

Rows are mapped objects: the session's unit of work writes them, takes them back with their
savepoint, and forgets them with the session. No session event decides what is stored; the one
that is listened to only tells that a commit is over, so that the rows need not wait for a relay.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sqlalchemy import Connection, Engine, event, insert
from sqlalchemy import inspect as state_of
from sqlalchemy.exc import UnboundExecutionError
from sqlalchemy.orm import Session, SessionTransaction, registry

from outbox import sinks
from outbox.errors import UsageError
from outbox.event import Event
from outbox.observer import installed_observer
from outbox.publisher import Publisher
from outbox.sql.commits import is_autocommit
from outbox.sql.handover import Handover, handover_for
from outbox.storage.rows import values_of
from outbox.storage.schema import DIALECTS, events, events_with_grace

__all__ = ["bind", "sink_of_connection", "sink_of_session"]

_PENDING = "outbox.sql: rows to hand over"
_OBSERVED = "outbox.sql: rows of which a test is told"


class _Row:
    """A row of the table, as a session sees it."""

    def __init__(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)


class _RowWithGrace(_Row):
    """A row that relays leave alone for a moment."""


_mappings = registry()
_mappings.map_imperatively(_Row, events, eager_defaults=False)
_mappings.map_imperatively(_RowWithGrace, events_with_grace, eager_defaults=False)


def bind(provider: Callable[[], Any] | Any | None) -> None:
    """Store every event that is enqueued while a session is in a transaction, in that transaction.

    Where there is no session, or it has not begun a transaction, events are collected as without
    this. A session begins one when it is first used or given an object
    (https://docs.sqlalchemy.org/en/20/orm/session_transaction.html).

    Args:
        provider: a ``scoped_session`` or ``async_scoped_session``, none of whose sessions is made
            by asking; or a callable without arguments that returns the present ``Session`` or
            ``AsyncSession``, or None. None ends what an earlier call began.

    Raises:
        UsageError: it is none of these.
    """
    if provider is None:
        sinks.bind(None)
        return
    found = getattr(provider, "registry", None)
    present = provider if found is None else lambda: found() if found.has() else None
    if isinstance(provider, Session) or not callable(present):
        raise UsageError(
            f"bind() was given {provider!r}: not a scoped_session, nor a callable that returns "
            "the present session"
        )

    def sink() -> sinks.Sink | None:
        session = _synchronous(present())
        if session is None or not session.in_transaction():
            return None
        return sink_of_session(session)

    sinks.bind(sink, None if found is None else getattr(provider, "remove", None))


def sink_of_session(session: Any) -> sinks.Sink:
    """Return what stores events in the transaction of ``session``, which begins one if need be.

    Raises:
        UsageError: it is no session of SQLAlchemy, or events cannot be stored with it.
    """
    found = _synchronous(session)
    if found is None:
        raise UsageError("the session is None; leave it out to collect the event")

    def store(stored: Event, publisher: Publisher | None) -> None:
        _store_in_session(found, stored, publisher)

    return store


def sink_of_connection(connection: Any) -> sinks.Sink:
    """Return what stores events in the transaction of ``connection``, at once.

    Raises:
        UsageError: it is no connection of SQLAlchemy, or events cannot be stored with it.
    """
    if not isinstance(connection, Connection):
        hint = (
            "; in asyncio use await connection.run_sync(lambda c: enqueue_event(..., connection=c))"
            if hasattr(connection, "run_sync")
            else ""
        )
        raise UsageError(f"{connection!r} is not a Connection of SQLAlchemy{hint}")
    _check(connection)

    def store(stored: Event, _: Publisher | None) -> None:
        connection.execute(insert(events), values_of(stored))

    return store


def _synchronous(session: Any) -> Session | None:
    """Return the session itself of whatever stands for one: scoped, of asyncio, or both."""
    if session is None or isinstance(session, Session):
        return session
    found = getattr(session, "registry", None)  # of a scoped session
    inner = found() if found is not None else session
    inner = getattr(inner, "sync_session", inner)  # of asyncio
    if not isinstance(inner, Session):
        raise UsageError(f"{session!r} is not a Session of SQLAlchemy")
    return inner


def _store_in_session(session: Session, stored: Event, publisher: Publisher | None) -> None:
    try:
        where = session.get_bind(state_of(_Row))
    except UnboundExecutionError as error:
        raise UsageError(
            "the session has no engine for the table outbox_events: give it one "
            "(sessionmaker(bind=engine), or binds={outbox.sql.events: engine})"
        ) from error
    _check(where)
    observer = installed_observer()
    handover = None
    # Where the connection is the caller's, his transaction may outlast the session's.
    if isinstance(where, Engine) and (observer is None or observer.hands_over):
        handover = handover_for(where, publisher)
    if handover is None or stored.deliver_at is not None:
        row = _Row(values_of(stored))
    else:
        row = _RowWithGrace(values_of(stored))
        session.info.setdefault(_PENDING, []).append((handover, where, row))
    session.add(row)
    if observer is not None:  # a test asks what became of it
        session.info.setdefault(_OBSERVED, []).append((observer, row, stored))


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    # Also fired when a savepoint is released; what is rolled back later, the database forgets.
    if session.in_nested_transaction():
        return
    session.info.pop(_OBSERVED, None)
    if _PENDING not in session.info:
        return
    numbers: dict[tuple[Handover, Engine], list[int]] = {}
    for handover, engine, row in session.info.pop(_PENDING):
        identity = state_of(row).identity  # none of those that went with their savepoint
        if identity is not None:
            numbers.setdefault((handover, engine), []).append(identity[0])
    for (handover, engine), seqs in numbers.items():
        handover.submit(engine, seqs)


@event.listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.info.pop(_PENDING, None)
        for observer, _, stored in session.info.pop(_OBSERVED, ()):
            observer.cleared([stored])


@event.listens_for(Session, "after_soft_rollback")
def _after_soft_rollback(session: Session, _: SessionTransaction) -> None:
    observed = session.info.get(_OBSERVED, ())
    for one in [one for one in observed if state_of(one[1]).transient]:
        observed.remove(one)
        one[0].cleared([one[2]])


def _check(where: Engine | Connection) -> None:
    """Refuse what events cannot be stored with."""
    dialect = where.dialect
    if dialect.name not in DIALECTS:
        raise UsageError(
            f"events cannot be stored in {dialect.name}, only in {' or '.join(DIALECTS)}"
        )
    if is_autocommit(where):
        raise UsageError(
            "the connection commits each statement by itself (isolation_level AUTOCOMMIT): "
            "a rollback would not take back the stored event; use one with transactions"
        )
