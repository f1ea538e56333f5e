"""The inbox: which messages a consumer has done, so that none is done twice.

Its row is written in the handler's own transaction where there is one: whatever that has done and
the note of it are committed together, or not at all.
"""

from __future__ import annotations

import contextlib
import contextvars
import datetime
import os
import threading
import time
import weakref
from typing import Any, Protocol

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Index,
    String,
    Table,
    delete,
    event,
    insert,
    inspect,
    select,
)
from sqlalchemy.engine import URL, ExecutionContext
from sqlalchemy.exc import IntegrityError, UnboundExecutionError
from sqlalchemy.orm import Session, SessionTransaction, registry

from outbox.errors import CollectorClosed, UsageError
from outbox.sql.clock import Timestamp, now, seconds_since
from outbox.sql.engines import engine_beside, open_engine
from outbox.sql.schema import DIALECTS, metadata

__all__ = ["WINDOW", "Inbox"]

WINDOW = datetime.timedelta(days=7)
"""For which a message is remembered, unless the consumer says otherwise."""

_PURGE = 3600.0  # seconds between two looks for what is older than that

done = Table(
    "outbox_inbox",
    metadata,
    Column("consumer", String(255), primary_key=True),
    Column("message_id", String(255), primary_key=True),
    Column("done_at", Timestamp, nullable=False, default=now()),
)
Index("outbox_inbox_done", done.c.consumer, done.c.done_at)


class _Done:
    """A row of the table, as a session sees it."""

    def __init__(self, consumer: str, message_id: str) -> None:
        self.consumer = consumer
        self.message_id = message_id


registry().map_imperatively(_Done, done, eager_defaults=False)

_present: contextvars.ContextVar[_Entry | None] = contextvars.ContextVar("present", default=None)


class _Consumer(Protocol):
    @property
    def queue(self) -> str: ...

    @property
    def deduplicate(self) -> bool | datetime.timedelta: ...


class _Message(Protocol):
    @property
    def id(self) -> str: ...


class Inbox:
    """Remembers message ids in the table ``outbox_inbox`` of a database. Thread-safe.

    A consumer is known by its queue. A message that has no id of its own is never known.
    """

    def __init__(self, database: str | Engine) -> None:
        """Nothing is connected yet.

        Args:
            database: a URL or an engine, of PostgreSQL or SQLite; best the one of the handlers'
                sessions.

        Raises:
            UsageError: it is no database of that kind.
            MissingExtra: its driver is not installed.
        """
        engine = open_engine(database) if isinstance(database, str) else database
        beside = engine_beside(engine)
        if engine.dialect.name not in DIALECTS or beside is None:
            raise UsageError(f"an inbox cannot be in {engine.dialect.name}, or not in memory")
        self.url = engine.url
        self.engine = beside
        self._purged: dict[str, float] = {}
        self._lock = threading.Lock()

    def create(self) -> None:
        """Create the table, unless it is there."""
        metadata.create_all(self.engine)

    def check(self) -> None:
        """See that the table is there.

        Raises:
            UsageError: it is not; the message says how to make it.
        """
        with self.engine.connect() as connection:
            if not inspect(connection).has_table(done.name):
                raise UsageError(
                    f"there is no table {done.name}, which consumers that deduplicate need: make "
                    "it with `outbox sql create`, or with your migrations (outbox.sql.metadata)"
                )

    def entry(self, consumer: _Consumer, event: _Message) -> _Entry:
        """Return what is known of a message; asks nobody yet."""
        window = consumer.deduplicate
        if not isinstance(window, datetime.timedelta):
            window = WINDOW
        return _Entry(self, consumer.queue, event.id, window.total_seconds())

    def purge(self, consumer: str, seconds: float) -> int:
        """Forget what ``consumer`` has done more than ``seconds`` ago; return how many messages."""
        with self.engine.begin() as connection:
            return connection.execute(
                delete(done).where(
                    done.c.consumer == consumer, seconds_since(done.c.done_at) > seconds
                )
            ).rowcount

    def purge_now_and_then(self, consumer: str, seconds: float) -> None:
        """Do that, unless it was done within the last hour."""
        present = time.monotonic()
        with self._lock:
            if present - self._purged.get(consumer, -_PURGE) < _PURGE:
                return
            self._purged[consumer] = present
        self.purge(consumer, seconds)


class _Entry:
    """One message and one consumer; see ``outbox.consumers.life.InboxEntry``."""

    def __init__(self, inbox: Inbox, consumer: str, message_id: str, window: float) -> None:
        self._inbox = inbox
        self._key = (done.c.consumer == consumer) & (done.c.message_id == message_id)
        self._values = {"consumer": consumer, "message_id": message_id}
        self._window = window
        self.joined: Session | None = None
        self.committed = False
        self._given_up = False
        self._lock = threading.Lock()

    def is_done(self) -> bool:
        self._inbox.purge_now_and_then(self._values["consumer"], self._window)
        with self._inbox.engine.begin() as connection:
            found = connection.execute(select(seconds_since(done.c.done_at)).where(self._key))
            age = found.scalar()
            if age is None:
                return False
            if age <= self._window:
                return True
            connection.execute(delete(done).where(self._key))  # forgotten, and in a new row's way
            return False

    def join(self) -> None:
        _present.set(self)

    def leave(self) -> None:
        _present.set(None)

    def give_up(self) -> bool:
        with self._lock:
            self._given_up = True
            return self.committed or self.joined is not None

    def note(self) -> None:
        if self.committed or self._given_up:
            return
        # At the same time it may have been done somewhere else.
        with contextlib.suppress(IntegrityError), self._inbox.engine.begin() as connection:
            connection.execute(insert(done), self._values)

    def belongs_to(self, session: Session) -> bool:
        """Return whether the session's transaction is one of the inbox's database."""
        try:
            where = session.get_bind(inspect(_Done))
        except UnboundExecutionError:
            return False
        engine = where.engine if isinstance(where, Connection) else where
        return _place(engine.url) == _place(self._inbox.url)

    def add_to(self, session: Session) -> None:
        with self._lock:
            if self._given_up:
                raise CollectorClosed(
                    f"the attempt to process {self._values['message_id']!r} was given up, since it "
                    "takes too long: what it has done since is not committed"
                )
            self.joined = session
        session.add(_Done(**self._values))


def _place(url: URL) -> tuple[object, ...]:
    """Return which database it is, whoever connects to it and with whichever driver."""
    name, database, port = url.get_backend_name(), url.database, url.port
    if name == "sqlite":
        database = os.path.abspath(database or "")
    elif name == "postgresql":
        port = port or 5432
    return name, url.host, port, database


# Of messages that are being processed: whose transaction a connection is in.
_sessions: weakref.WeakKeyDictionary[Connection, weakref.ref[Session]] = weakref.WeakKeyDictionary()
_WRITTEN = "outbox-written"
_READING = ("SELECT", "SHOW", "SET ", "PRAGMA", "SAVEPOINT", "RELEASE")


@event.listens_for(Session, "after_begin")
def _after_begin(session: Session, _: SessionTransaction, connection: Connection) -> None:
    if _present.get() is None:
        return
    _sessions[connection] = weakref.ref(session)
    if not event.contains(connection, "before_cursor_execute", _before_statement):
        event.listen(connection, "before_cursor_execute", _before_statement)


def _before_statement(
    connection: Connection,
    _cursor: Any,
    statement: str,
    _parameters: Any,
    _context: ExecutionContext | None,
    _many: bool,
) -> None:
    session = _sessions.get(connection, lambda: None)()
    if session is not None and not _only_reads(statement):
        session.info[_WRITTEN] = True


def _only_reads(statement: str) -> bool:
    # Anything else may write: WITH, for instance, or what a comment begins.
    return statement.lstrip("( \t\r\n")[:10].upper().startswith(_READING)


def _has_written(session: Session) -> bool:
    return bool(session.info.get(_WRITTEN) or session.new or session.dirty or session.deleted)


@event.listens_for(Session, "before_commit")
def _before_commit(session: Session) -> None:
    # Also called when a savepoint is released, which is too early.
    entry = _present.get()
    if entry is None or entry.joined is not None or entry.committed:
        return
    # What has only been looked up is no effect: the message is not done yet.
    if not session.in_nested_transaction() and _has_written(session) and entry.belongs_to(session):
        entry.add_to(session)


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    entry = _present.get()
    if entry is not None and entry.joined is session and not session.in_nested_transaction():
        entry.committed = True


@event.listens_for(Session, "after_transaction_end")
def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        session.info.pop(_WRITTEN, None)
    entry = _present.get()
    if entry is not None and entry.joined is session and transaction.parent is None:
        entry.joined = None  # a rollback has taken it back; the next transaction may have it
