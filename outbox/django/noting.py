"""The inbox of a Django project: messages are noted through Django's connection.

Django says nothing before a commit. So the connections of the inbox's alias have their ``commit()``
overlaid: the first transaction of a handler that is about to commit changes takes the note with it.
One that has only read doesn't: it says nothing about what the handler will do.
"""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any

from django.db import DEFAULT_DB_ALIAS, DatabaseError, IntegrityError, connections, transaction
from django.db.backends.signals import connection_created

from outbox import CollectorClosed, UsageError
from outbox.django import project
from outbox.django.connecting import vendor_of
from outbox.django.moments import NOW, seconds_since
from outbox.messages.remembered import (
    FORGOTTEN_AT_ONCE,
    Deduplicating,
    Forgetting,
    Identified,
    window_of,
)
from outbox.telemetry import tracing

__all__ = ["TransactionInbox", "open_inbox"]

logger = logging.getLogger("outbox.django")

_MARK = "_outbox_notes"

# Compared with the column itself: an index can't be used on an expression of it.
_BEFORE = {
    "postgresql": f"{NOW['postgresql']} - make_interval(secs => %s)",
    "sqlite": f"{NOW['sqlite']} - %s",
    "mysql": f"{NOW['mysql']} - INTERVAL %s SECOND",
}
_ROWS_CHANGED = (
    "SELECT SUM(VARIABLE_VALUE) FROM information_schema.SESSION_STATUS WHERE VARIABLE_NAME IN "
    "('HANDLER_WRITE', 'HANDLER_UPDATE', 'HANDLER_DELETE')"
)

_current: ContextVar[_Entry | None] = ContextVar("entry", default=None)


_aliases: set[str] = set()
"""The databases in which there is an inbox."""


def open_inbox() -> TransactionInbox:
    """Return the inbox of the project, in the database ``STORE`` or, without one, the default.

    An unavailable database is not an error: messages are held until it is back.

    Raises:
        UsageError: the table is missing, or outbox can't note messages in that database.
    """
    inbox = TransactionInbox(project.current().store or DEFAULT_DB_ALIAS)
    try:
        inbox.check()
    except DatabaseError as error:
        logger.warning("the inbox is unavailable; messages are held until it is back: %s", error)
    return inbox


class TransactionInbox:
    """Remembers message ids in the table ``outbox_inbox`` of one of Django's databases.

    Thread-safe: each thread has a connection of Django's. A consumer is identified by its queue.
    """

    def __init__(self, alias: str) -> None:
        """Make the inbox of a database, which has it note messages from now on."""
        self.alias = alias
        self.vendor = vendor_of(alias)
        self._forgetting = Forgetting()
        _aliases.add(alias)
        connection_created.connect(_on_connection_created, dispatch_uid="outbox.django.noting")

    def check(self) -> None:
        """Check that the table exists.

        Raises:
            UsageError: it doesn't; the message names the migration.
            DatabaseError: the database can't be reached.
        """
        connection = connections[self.alias]
        with connection.cursor() as cursor:
            if "outbox_inbox" not in connection.introspection.table_names(cursor):
                raise UsageError(
                    "the table outbox_inbox, which deduplication needs, does not exist in the "
                    f"database {self.alias!r}; run `manage.py migrate outbox_events --database "
                    f"{self.alias}`"
                )

    def entry(self, consumer: Deduplicating, event: Identified) -> _Entry:
        """Return the entry of a message, without a look at the database yet."""
        return _Entry(self, consumer.queue, event.id, window_of(consumer).total_seconds())

    def purge_now_and_then(self, consumer: str, seconds: float) -> None:
        """Forget some older messages, unless none was left to forget within the last hour."""
        self._forgetting.now_and_then(consumer, lambda: self._purge_some(consumer, seconds))

    def _purge_some(self, consumer: str, seconds: float) -> int:
        old = (
            "SELECT message_id FROM outbox_inbox WHERE consumer = %s AND done_at < "
            f"{_BEFORE[self.vendor]} ORDER BY done_at LIMIT {FORGOTTEN_AT_ONCE}"
        )
        with tracing.hidden(), connections[self.alias].cursor() as cursor:
            cursor.execute(old, [consumer, seconds])
            ids = sorted(row[0] for row in cursor.fetchall())
            if ids:
                places = ", ".join(["%s"] * len(ids))
                cursor.execute(
                    f"DELETE FROM outbox_inbox WHERE consumer = %s AND message_id IN ({places})",
                    [consumer, *ids],
                )
        return len(ids)


class _Entry:
    """The entry of one message; see ``outbox.consumers.message.deduplication.InboxEntry``."""

    def __init__(self, inbox: TransactionInbox, consumer: str, message_id: str, window: float):
        self._inbox = inbox
        self._key = [consumer, message_id]
        self._window = window
        self._joins = False
        self._is_joined = False
        self._given_up = False
        self._lock = threading.Lock()
        self.committed = False
        self.failure: BaseException | None = None

    def is_done(self) -> bool:
        inbox = self._inbox
        inbox.purge_now_and_then(self._key[0], self._window)
        where = "WHERE consumer = %s AND message_id = %s"
        with tracing.hidden(), connections[inbox.alias].cursor() as cursor:
            age = seconds_since("done_at", inbox.vendor)
            cursor.execute(f"SELECT {age} FROM outbox_inbox {where}", self._key)
            row = cursor.fetchone()
            if row is None:
                return False
            if row[0] <= self._window:
                return True
            # It is expired, and would block a new row.
            cursor.execute(f"DELETE FROM outbox_inbox {where}", self._key)
            return False

    def accompany(self, write: Callable[[Any], None]) -> None:
        pass  # it would need a connection of SQLAlchemy

    def join(self) -> None:
        self._joins = True
        _current.set(self)
        # Those of coroutines are in another thread, and overlaid when they connect.
        _overlay(connections[self._inbox.alias])

    def leave(self) -> None:
        self._joins = False  # for tasks and threads that run on in a copy of this context
        _current.set(None)

    def give_up(self) -> bool:
        with self._lock:
            self._given_up = True
            return self._is_joined

    def note(self) -> None:
        self._joins = False
        if self.committed or self._given_up:
            return
        # IntegrityError: another worker has processed the message at the same time.
        with contextlib.suppress(IntegrityError), transaction.atomic(self._inbox.alias):
            self._insert(connections[self._inbox.alias])

    def takes_part(self, connection: Any) -> bool:
        """Return whether it is to be noted in the transaction, if that has changed something."""
        return self._joins and not self._is_joined and connection.alias == self._inbox.alias

    def add_to(self, connection: Any) -> bool:
        """Note the message in the transaction that is about to be committed.

        Returns:
            Whether it did; False if a parallel transaction was faster.

        Raises:
            CollectorClosed: the attempt was given up: its transaction must not be committed.
            IntegrityError: another worker has processed the message meanwhile.
        """
        with self._lock:
            if self._given_up:
                raise CollectorClosed(
                    f"the attempt to process {self._key[1]!r} took too long and was abandoned; its "
                    "transaction is rolled back"
                )
            if self._is_joined:
                return False
            self._is_joined = True
        try:
            self._insert(connection)
        except BaseException as error:
            self.failure = error
            self.ended(committed=False)
            raise
        return True

    def ended(self, *, committed: bool) -> None:
        """Note how the transaction has ended that it was noted in."""
        self.committed = committed
        self._is_joined = committed  # otherwise the next transaction may take the note

    def _insert(self, connection: Any) -> None:
        with tracing.hidden(), connection.cursor() as cursor:
            cursor.execute(
                "INSERT INTO outbox_inbox (consumer, message_id, done_at) VALUES (%s, %s, "
                f"{NOW[self._inbox.vendor]})",
                self._key,
            )


def _on_connection_created(*, connection: Any, **_: Any) -> None:
    if connection.alias in _aliases:
        _overlay(connection)


def _overlay(connection: Any) -> None:
    """Have the commits of ``connection`` note messages, from now on."""
    if not hasattr(connection, _MARK):
        setattr(connection, _MARK, _Commits(connection))


class _Commits:
    """The commits of one connection, with the note of the message that is processed meanwhile."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._commit = connection.commit
        self._rollback = connection.rollback
        self._set_autocommit = connection.set_autocommit
        self._before: int | None = None
        connection.commit = self.commit
        connection.rollback = self.rollback
        connection.set_autocommit = self.set_autocommit

    def commit(self) -> None:
        """Commit, with the note if the transaction has changed something."""
        entry, connection = _current.get(), self._connection
        if entry is None or not entry.takes_part(connection) or not self._has_changes():
            self._commit()
            self._begin()
            return
        try:
            is_noted = entry.add_to(connection)
        except BaseException:
            # To Django a transaction whose commit was refused is over.
            with contextlib.suppress(DatabaseError):
                self._rollback()
            raise
        try:
            self._commit()
        except BaseException:
            if is_noted:
                entry.ended(committed=False)
            raise
        if is_noted:
            entry.ended(committed=True)
        self._begin()

    def rollback(self) -> None:
        """Roll back."""
        self._rollback()
        self._begin()

    def set_autocommit(self, autocommit: bool, *arguments: Any, **options: Any) -> None:
        """Begin a transaction, or end the manual ones."""
        self._set_autocommit(autocommit, *arguments, **options)
        self._begin()

    def _begin(self) -> None:
        """Note what was changed before the transaction that begins now, if one does."""
        if _current.get() is not None and not self._connection.autocommit:
            self._before = self._changes()

    def _has_changes(self) -> bool:
        """Return whether the transaction has changed something; True if unknown."""
        if self._connection.vendor == "postgresql":
            # PostgreSQL assigns a number to a transaction at its first write.
            with tracing.hidden(), self._connection.cursor() as cursor:
                cursor.execute("SELECT txid_current_if_assigned()")
                return cursor.fetchone()[0] is not None
        before, after = self._before, self._changes()
        return before is None or after is None or before != after

    def _changes(self) -> int | None:
        """Return how many rows the connection has changed so far; None if that is unknown."""
        vendor = self._connection.vendor
        if vendor == "sqlite":
            count: int | None = getattr(self._connection.connection, "total_changes", None)
            return count
        if vendor == "mysql":
            with tracing.hidden(), self._connection.cursor() as cursor:
                cursor.execute(_ROWS_CHANGED)
                return int(cursor.fetchone()[0])
        return None
