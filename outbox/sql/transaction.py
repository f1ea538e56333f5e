"""Events stored as rows in the application's transaction.

Rows are mapped objects: the session writes them in its flush, removes them when their savepoint is
rolled back, and drops them when it is closed. So no session event decides what is stored;
``after_commit`` only starts publishing the rows without waiting for a relay.
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
from outbox.observer import seam
from outbox.publisher import Publisher
from outbox.sql.commits import is_autocommit
from outbox.sql.handover import Handover, handover_for
from outbox.storage.rows import values_of
from outbox.storage.schema import DIALECTS, events, events_with_grace

__all__ = ["bind", "sink_of_connection", "sink_of_session"]

_PENDING = "outbox.sql: rows to hand over"
_OBSERVED = "outbox.sql: rows that a test observes"


class _Row:
    """A row of the table, as a session sees it."""

    def __init__(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            setattr(self, name, value)


class _RowWithGrace(_Row):
    """A row that becomes due for relays only after :data:`GRACE`."""


_mappings = registry()
_mappings.map_imperatively(_Row, events, eager_defaults=False)
_mappings.map_imperatively(_RowWithGrace, events_with_grace, eager_defaults=False)


def bind(provider: Callable[[], Any] | Any | None) -> None:
    """Store events in the current session's transaction if they are enqueued while it is open.

    Without a session, or before it begins a transaction, events are collected as usual. A session
    begins one when it is first used or an object is added
    (https://docs.sqlalchemy.org/en/20/orm/session_transaction.html).

    Args:
        provider: a ``scoped_session`` or ``async_scoped_session``, in which outbox creates no
            session; or a callable without arguments that returns the current ``Session`` or
            ``AsyncSession``, or None. None undoes an earlier call.

    Raises:
        UsageError: ``provider`` is something else.
    """
    if provider is None:
        sinks.bind(None)
        return
    sessions = getattr(provider, "registry", None)
    current = provider if sessions is None else lambda: sessions() if sessions.has() else None
    if isinstance(provider, Session) or not callable(current):
        raise UsageError(
            "bind() needs a scoped_session or a callable that returns the current session, not "
            f"{provider!r}"
        )

    def sink() -> sinks.Sink | None:
        session = _sync_session(current())
        if session is None or not session.in_transaction():
            return None
        return sink_of_session(session)

    sinks.bind(sink, None if sessions is None else getattr(provider, "remove", None))


def sink_of_session(session: Any) -> sinks.Sink:
    """Return a sink that stores events in the transaction of ``session``, and begins it if needed.

    Raises:
        UsageError: ``session`` isn't an SQLAlchemy session, or can't store events.
    """
    sync_session = _sync_session(session)
    if sync_session is None:
        raise UsageError("session is None; omit it to collect the event")

    def store(stored: Event, publisher: Publisher | None) -> None:
        _store_in_session(sync_session, stored, publisher)

    return store


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

    def store(stored: Event, _: Publisher | None) -> None:
        connection.execute(insert(events), values_of(stored))

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


def _store_in_session(session: Session, stored: Event, publisher: Publisher | None) -> None:
    try:
        where = session.get_bind(state_of(_Row))
    except UnboundExecutionError as error:
        raise UsageError(
            "the session has no engine for the table outbox_events; bind one "
            "(sessionmaker(bind=engine), or binds={outbox.sql.events: engine})"
        ) from error
    _check(where)
    observer = seam.observer
    handover = None
    # A session on the caller's connection is left to the relay: the caller's transaction may end
    # after the session's.
    if isinstance(where, Engine) and (observer is None or observer.hands_over):
        handover = handover_for(where, publisher)
    if handover is None or stored.deliver_at is not None:
        row = _Row(values_of(stored))
    else:
        row = _RowWithGrace(values_of(stored))
        session.info.setdefault(_PENDING, []).append((handover, where, row))
    session.add(row)
    if observer is not None:  # a test observes the event
        session.info.setdefault(_OBSERVED, []).append((observer, row, stored))


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    # SQLAlchemy also fires this when a savepoint is released: that is not the commit.
    if session.in_nested_transaction():
        return
    session.info.pop(_OBSERVED, None)
    if _PENDING not in session.info:
        return
    numbers: dict[tuple[Handover, Engine], list[int]] = {}
    for handover, engine, row in session.info.pop(_PENDING):
        identity = state_of(row).identity  # None if its savepoint was rolled back
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
    for entry in [entry for entry in observed if state_of(entry[1]).transient]:
        observed.remove(entry)
        entry[0].cleared([entry[2]])


def _check(where: Engine | Connection) -> None:
    """Raise UsageError if events can't be stored through ``where``."""
    dialect = where.dialect
    if dialect.name not in DIALECTS:
        raise UsageError(
            f"events cannot be stored in {dialect.name}, only in {' or '.join(DIALECTS)}"
        )
    if is_autocommit(where):
        raise UsageError(
            "the connection has the isolation level AUTOCOMMIT, so a rollback would not remove the "
            "stored event; use a connection with transactions"
        )
