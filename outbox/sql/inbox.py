"""The inbox: the messages that a consumer has processed, so that it processes none twice.

Where possible the row is written in the handler's transaction, so that the row and the handler's
changes are committed together or not at all. It joins the first transaction that is about to commit
changes; one that has only read says nothing about what the handler will do.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

from sqlalchemy import (
    Column,
    Connection,
    Engine,
    Index,
    MetaData,
    String,
    Table,
    delete,
    insert,
    literal,
    select,
)
from sqlalchemy.engine import URL, RootTransaction
from sqlalchemy.exc import IntegrityError

from outbox.errors import CollectorClosed, UsageError
from outbox.messages.remembered import (
    FORGOTTEN_AT_ONCE,
    Deduplicating,
    Forgetting,
    Identified,
    window_of,
)
from outbox.sql import commits
from outbox.storage.clock import Timestamp, in_seconds, now, seconds_since
from outbox.storage.creating import create_missing
from outbox.storage.engines import engine_beside, open_engine
from outbox.storage.schema import MARIADB_OPTIONS, dialect_of, exists, for_migrations
from outbox.storage.transactions import own_transaction, try_again
from outbox.telemetry import tracing

__all__ = ["Inbox", "place_of"]

_T = TypeVar("_T")

done = Table(
    "outbox_inbox",
    MetaData(),
    Column("consumer", String(255), primary_key=True),
    Column("message_id", String(255), primary_key=True),
    Column("done_at", Timestamp, nullable=False, default=now()),
    **MARIADB_OPTIONS,
)
Index("outbox_inbox_done", done.c.consumer, done.c.done_at)
for_migrations(done)


class Inbox:
    """Remembers message ids in the table ``outbox_inbox`` of a database. Thread-safe.

    A consumer is identified by its queue. A message without an id is never remembered.
    """

    def __init__(self, database: str | Engine) -> None:
        """Make an inbox, not connected yet.

        Args:
            database: a URL or an engine, for PostgreSQL, MariaDB or SQLite; preferably the database
                in which the handlers work.

        Raises:
            UsageError: the database can't hold an inbox.
            MissingExtra: the database's driver isn't installed.
        """
        engine = open_engine(database) if isinstance(database, str) else database
        beside = engine_beside(engine)
        if dialect_of(engine.dialect.name) is None or beside is None:
            if engine.dialect.is_async and engine.dialect.name != "sqlite":
                raise UsageError(
                    "an inbox can't connect as this asyncio engine does, since more than its URL "
                    "decides how; give it a URL or an engine with a synchronous driver"
                )
            raise UsageError(
                "an inbox needs a PostgreSQL or MariaDB database, or an SQLite file, not "
                f"{engine.dialect.name}{'' if beside else ' in memory'}"
            )
        self.url = engine.url
        self.engine = beside
        self._forgetting = Forgetting()
        commits.listen()

    def create(self) -> None:
        """Create the tables of outbox that don't exist."""
        with self._transaction() as connection:
            create_missing(connection)

    def check(self) -> None:
        """Check that the table exists.

        Raises:
            UsageError: it doesn't; the message says how to create it.
        """
        with tracing.hidden(), self.engine.connect() as connection:
            if not exists(connection, done):
                raise UsageError(
                    f"the table {done.name}, which deduplication needs, does not exist; create it "
                    "with `outbox sql create`, or with your migrations (outbox.sql.metadata)"
                )

    def entry(self, consumer: Deduplicating, event: Identified) -> _Entry:
        """Return the entry of a message, without a look at the database yet."""
        return _Entry(self, consumer.queue, event.id, window_of(consumer).total_seconds())

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[Connection]:
        # Unwatched: an entry must not join a transaction of the inbox itself.
        with commits.unwatched(), own_transaction(self.engine) as connection:
            yield connection

    def _run(self, work: Callable[[Connection], _T]) -> _T:
        """Return what ``work`` returns in a transaction of the inbox; repeated after conflicts."""

        def once() -> _T:
            with self._transaction() as connection:
                return work(connection)

        return try_again(once)

    def purge(self, consumer: str, seconds: float) -> int:
        """Forget messages that ``consumer`` processed over ``seconds`` ago; return how many."""
        count = 0
        while deleted := self._purge_some(consumer, seconds):
            count += deleted
        return count

    def purge_now_and_then(self, consumer: str, seconds: float) -> None:
        """Purge some, unless nothing was left to purge within the last hour."""
        self._forgetting.now_and_then(consumer, lambda: self._purge_some(consumer, seconds))

    def _purge_some(self, consumer: str, seconds: float) -> int:
        # Compared with the column itself: an index can't be used on an expression of it.
        old = (
            select(done.c.message_id)
            .where(done.c.consumer == consumer, done.c.done_at < in_seconds(literal(-seconds)))
            .order_by(done.c.done_at)
            .limit(FORGOTTEN_AT_ONCE)
            .with_for_update(skip_locked=True)
        )

        def purge(connection: Connection) -> int:
            ids = connection.execute(old).scalars().all()
            if ids:
                is_old = (done.c.consumer == consumer) & done.c.message_id.in_(ids)
                connection.execute(delete(done).where(is_old))
            return len(ids)

        return self._run(purge)


class _Entry:
    """The entry of one message; see ``outbox.consumers.message.deduplication.InboxEntry``."""

    def __init__(self, inbox: Inbox, consumer: str, message_id: str, window: float) -> None:
        self._inbox = inbox
        self._key = (done.c.consumer == consumer) & (done.c.message_id == message_id)
        self._values = {"consumer": consumer, "message_id": message_id}
        self._window = window
        self._joins = False
        self._joined: RootTransaction | None = None
        self._given_up = False
        self.failure: BaseException | None = None
        self._accompanying: Callable[[Connection], None] | None = None
        self._lock = threading.Lock()

    @property
    def committed(self) -> bool:
        joined = self._joined
        # While the transaction is still the connection's, its commit isn't over.
        return joined is not None and joined.connection.get_transaction() is not joined

    def is_done(self) -> bool:
        self._inbox.purge_now_and_then(self._values["consumer"], self._window)
        return self._inbox._run(self._is_done)

    def _is_done(self, connection: Connection) -> bool:
        result = connection.execute(select(seconds_since(done.c.done_at)).where(self._key))
        age = result.scalar()
        if age is None:
            return False
        if age <= self._window:
            return True
        connection.execute(delete(done).where(self._key))  # expired, and would block a new row
        return False

    def join(self) -> None:
        self._joins = True
        commits.watch(self)

    def accompany(self, write: Callable[[Connection], None]) -> None:
        self._accompanying = write

    def leave(self) -> None:
        self._joins = False  # for tasks and threads that run on in a copy of this context
        commits.watch(None)

    def give_up(self) -> bool:
        with self._lock:
            self._given_up = True
            return self._joined is not None

    def note(self) -> None:
        self._joins = False
        if self.committed or self._given_up:
            return
        # IntegrityError: another worker has processed the message at the same time.
        with contextlib.suppress(IntegrityError):
            self._inbox._run(self._insert)

    def before_commit(self, connection: Connection) -> None:
        if (
            self._joins
            and self._joined is None
            and place_of(connection.engine.url) == place_of(self._inbox.url)
            and not commits.is_autocommit(connection)
            and commits.has_changes(connection)
        ):
            self.add_to(connection)

    def not_committed(self, connection: Connection) -> None:
        joined = self._joined
        if joined is not None and connection.get_transaction() is joined:
            self._joined = None  # the next transaction may take the row

    def add_to(self, connection: Connection) -> None:
        with self._lock:
            if self._given_up:
                raise CollectorClosed(
                    f"the attempt to process {self._values['message_id']!r} took too long and was "
                    "abandoned; its transaction is rolled back"
                )
            if self._joined is not None:  # a parallel transaction was faster
                return
            self._joined = connection.get_transaction()
        try:
            with tracing.hidden():
                self._insert(connection)
        except BaseException as error:
            self.failure = error
            raise

    def _insert(self, connection: Connection) -> None:
        connection.execute(insert(done), self._values)
        if self._accompanying is not None:
            self._accompanying(connection)


def place_of(url: URL) -> tuple[object, ...]:
    """Return the identity of a database, whatever the user and the driver."""
    name, database, port = url.get_backend_name(), url.database, url.port
    name = dialect_of(name) or name
    if name == "sqlite":
        database = os.path.abspath(database or "")
    elif name == "postgresql":
        port = port or 5432
    elif name == "mariadb":
        port = port or 3306
    return name, url.host, port, database
