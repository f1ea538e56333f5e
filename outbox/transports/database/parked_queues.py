"""Lists, replays and deletes parked messages in a database."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, Self

from sqlalchemy import ColumnElement, Connection, and_, delete, func, or_, select

from outbox.errors import UsageError
from outbox.event import Event, headers_on_the_wire
from outbox.messages.dead_letters import (
    fields_of,
    is_kept_on_replay,
    origin_headers,
    replay_headers,
)
from outbox.messages.headers import TRACEPARENT
from outbox.messages.parked_message import ParkedMessage, ReplayResult
from outbox.messages.rows import event_of
from outbox.settings import MIB, Settings
from outbox.storage.clock import now
from outbox.storage.schema import events
from outbox.transports.database import routing
from outbox.transports.database.database import Database
from outbox.transports.database.kinds import database_at
from outbox.transports.database.plan import NO_ROUTE, rows_of
from outbox.transports.database.routing import Routes
from outbox.url import BrokerURL

__all__ = ["DatabaseParkedQueues", "StoredMessage", "end_of_window", "replayed", "waits_in"]

_UNROUTABLE = f"unroutable: {NO_ROUTE}"

_WINDOW = 1000
_WINDOW_BYTES = 16 * MIB


@dataclasses.dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StoredMessage(ParkedMessage):
    """A parked message with its row.

    Attributes:
        seq: the row's number.
        event: the event in the row.
    """

    seq: int
    event: Event


def _read(row: Any) -> StoredMessage:
    """Return the message in a row."""
    event = event_of(row)
    return StoredMessage(
        queue=row.queue,
        id=event.id,
        body=event.body,
        content_type=event.content_type,
        seq=row.seq,
        event=event,
        **(fields_of(row.queue, headers_on_the_wire(event).get) or {"kind": "foreign"}),
    )


def replayed(message: ParkedMessage, *, to_origin: bool = False) -> Event | str:
    """Return the event to publish for a replay of ``message``, or why it can't be replayed.

    It has the same id, body and headers, without the headers of parking or dead-lettering. A dead
    letter that goes back to a single queue has its original address in headers, and a message with
    a trace the time of the replay.
    """
    destination = message.destination(to_origin=to_origin)
    if isinstance(destination, str):
        return destination
    if not isinstance(message, StoredMessage):
        return "it is not from this database"
    headers = {
        name: value
        for name, value in message.event.headers.items()
        if is_kept_on_replay(message.kind, name)
    }
    headers |= replay_headers(is_traced=TRACEPARENT in headers)
    origin = message.origin
    if message.kind == "dead" and origin is not None and origin != destination:
        headers |= origin_headers(origin)
    return dataclasses.replace(
        message.event, exchange=destination.exchange, target=destination.target, headers=headers
    )


class DatabaseParkedQueues:
    """The parking and dead-letter queues in one database. For one thread.

    Browsing holds no messages. A replay deletes a message in the transaction that publishes it, if
    it is still in its queue and not leased.
    """

    def __init__(self, url: BrokerURL, settings: Settings) -> None:
        """Check the URL, and that a file exists; nothing is connected yet.

        Raises:
            UsageError: the file doesn't exist, or the database can't be used.
        """
        self._database = database_at(url, must_exist=True)
        self._routes = Routes()
        self._moved: set[int] = set()

    def __enter__(self) -> Self:
        """Connect to the database.

        Raises:
            BrokerError: the database can't be used now.
        """
        self._database.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._database.end()

    def count(self, queue: str) -> int:
        """Return the number of messages waiting in ``queue``.

        Raises:
            UsageError: the queue doesn't exist.
            BrokerError: the database can't be used now.
        """

        def counted(connection: Connection) -> int:
            self._routes.update(routing.load(connection))
            waiting = select(func.count()).select_from(events).where(waits_in(queue))
            return int(connection.execute(waiting).scalar_one())

        count = self._database.run(counted)
        if not self._routes.has_queue(queue):
            raise UsageError(f"{self._database.name} has no queue {queue!r}")
        return count

    @contextlib.contextmanager
    def browse(self, queue: str, bound: int) -> Iterator[_Browser]:
        """Browse up to ``bound`` messages of ``queue``, without those that arrive meanwhile."""
        self._moved.clear()
        yield _Browser(self._database, queue, bound, self._moved)

    def obstacle(self, message: ParkedMessage, *, to_origin: bool) -> str | None:
        """Return why a replay of ``message`` would fail, or None."""
        event = replayed(message, to_origin=to_origin)
        if isinstance(event, str):
            return event
        return None if self._routes.queues(event.exchange, event.target) else _UNROUTABLE

    def replay(self, messages: Sequence[ParkedMessage], *, to_origin: bool) -> ReplayResult:
        """Publish and delete ``messages`` in one transaction.

        Raises:
            BrokerError: the database can't be used now; nothing was replayed.
        """
        queues: set[str] = set()

        def moved(connection: Connection) -> ReplayResult:
            done: list[ParkedMessage] = []
            failed: list[tuple[ParkedMessage, str]] = []
            self._routes.update(routing.load(connection))
            for message in messages:
                reason = self._move(message, connection, queues, to_origin=to_origin)
                if reason is None:
                    done.append(message)
                else:
                    failed.append((message, reason))
            return ReplayResult(tuple(done), tuple(failed))

        result = self._database.run(moved)
        self._database.published(queues)
        self._moved.update(each.seq for each in result.done if isinstance(each, StoredMessage))
        return result

    def _move(
        self, message: ParkedMessage, connection: Connection, to: set[str], *, to_origin: bool
    ) -> str | None:
        """Move ``message``, and add its queues to ``to``; return None, or why that failed."""
        event = replayed(message, to_origin=to_origin)
        if isinstance(event, str):
            return event
        queues = self._routes.queues(event.exchange, event.target)
        if not queues:
            return _UNROUTABLE
        # Locked on a server, where another process may be replaying it, too.
        found = select(events.c.seq).where(_is_still(message)).with_for_update()
        if connection.execute(found).scalar() is None:
            return "it is no longer in its queue, or it is leased"
        # The old row is deleted last, so that its number isn't reused for a new row.
        self._database.put_rows(rows_of(event, queues), connection)
        to.update(queues)
        connection.execute(delete(events).where(_is_still(message)))
        return None


class _Browser:
    """Reads the messages of one queue window by window. For one thread."""

    def __init__(self, database: Database, queue: str, bound: int, moved: set[int]) -> None:
        self._database = database
        self._queue = queue
        self._bound = bound
        self._moved = moved

    def windows(self) -> Iterator[Sequence[StoredMessage]]:
        """Yield the messages that were in the queue at the start, each once, oldest first.

        Raises:
            BrokerError: the database can't be used now.
        """
        newest = select(func.max(events.c.seq)).where(waits_in(self._queue))
        last = self._database.run(lambda connection: connection.execute(newest).scalar())
        remaining, after = self._bound, 0
        while remaining > 0 and last is not None and after < last:
            window = functools.partial(self._window, after, last, min(_WINDOW, remaining))
            after, messages = self._database.run(window)
            remaining -= len(messages)
            if messages:
                yield messages

    def _window(
        self, after: int, last: int, limit: int, connection: Connection
    ) -> tuple[int, list[StoredMessage]]:
        """Return the messages behind the row ``after``, as many as fit, and where they end."""
        row = events.c
        waits = waits_in(self._queue)
        sizes = connection.execute(
            select(row.seq, func.length(row.payload))
            .where(waits, row.seq > after, row.seq <= last)
            .order_by(row.seq)
            .limit(limit)
        ).all()
        if not sizes:
            return last, []
        end = end_of_window([(seq, size) for seq, size in sizes])
        rows = connection.execute(
            select(events).where(waits, row.seq > after, row.seq <= end).order_by(row.seq)
        )
        return end, [_read(row) for row in rows]

    def remove(self, messages: Sequence[ParkedMessage]) -> None:
        """Delete ``messages``, except those that a replay has moved or that are leased now.

        Raises:
            BrokerError: the database can't be used now; nothing was deleted.
        """

        def deleted(connection: Connection) -> None:
            for message in messages:
                if isinstance(message, StoredMessage) and message.seq not in self._moved:
                    connection.execute(delete(events).where(_is_still(message)))

        self._database.run(deleted)


def end_of_window(sizes: Sequence[tuple[int, int]]) -> int:
    """Return the number of the last row that fits into a window of bytes, at least the first."""
    total = 0
    end = sizes[0][0]
    for seq, size in sizes:
        total += size
        if total > _WINDOW_BYTES:
            break
        end = seq
    return end


def waits_in(queue: str) -> ColumnElement[bool]:
    """Return the condition that a row is in ``queue``, alive and not leased; due or not."""
    row = events.c
    not_leased = or_(row.lease_token.is_(None), row.available_at <= now())
    return and_(row.queue == queue, row.dead_at.is_(None), not_leased)


def _is_still(message: ParkedMessage) -> ColumnElement[bool]:
    seq = message.seq if isinstance(message, StoredMessage) else -1
    return and_(events.c.seq == seq, events.c.id == message.id, waits_in(message.queue))
