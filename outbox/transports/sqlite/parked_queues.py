"""Lists, replays and deletes parked messages in the file."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
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
from outbox.transports.sqlite import routing
from outbox.transports.sqlite.database import Database
from outbox.transports.sqlite.location import Location
from outbox.transports.sqlite.plan import NO_ROUTE, rows_of
from outbox.transports.sqlite.routing import Routes
from outbox.transports.sqlite.shared_file import shared_file_at
from outbox.url import BrokerURL

__all__ = ["SQLiteParkedQueues", "StoredMessage", "replayed"]

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
        return "it is not from this file"
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


class SQLiteParkedQueues:
    """The parking and dead-letter queues in one file. For one thread.

    Browsing holds no messages. A replay deletes a message in the transaction that publishes it, if
    it is still in its queue and not leased.
    """

    def __init__(self, url: BrokerURL, settings: Settings) -> None:
        """Check that the file exists; nothing is connected yet.

        Raises:
            UsageError: the file doesn't exist or can't be used.
        """
        location = Location.of(url)
        if not Path(location.path).exists():
            raise UsageError(f"no file {location.path}")
        self._database = Database(location)
        self._shared_file = shared_file_at(location.path)
        self._routes = Routes()
        self._moved: set[int] = set()

    def __enter__(self) -> Self:
        """Open the file.

        Raises:
            BrokerError: the file can't be used now.
        """
        self._database.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._database.close()

    def count(self, queue: str) -> int:
        """Return the number of messages waiting in ``queue``.

        Raises:
            UsageError: the queue doesn't exist.
            BrokerError: the file can't be used now.
        """
        with self._database.transaction() as connection:
            self._routes.update(routing.load(connection))
            count: int = connection.execute(
                select(func.count()).select_from(events).where(_waits_in(queue))
            ).scalar_one()
        if not self._routes.has_queue(queue):
            raise UsageError(f"{self._database.path} has no queue {queue!r}")
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
            BrokerError: the file can't be used now; nothing was replayed.
        """
        done: list[ParkedMessage] = []
        failed: list[tuple[ParkedMessage, str]] = []
        with self._database.transaction() as connection:
            self._routes.update(routing.load(connection))
            for message in messages:
                reason = self._move(message, connection, to_origin=to_origin)
                if reason is None:
                    done.append(message)
                else:
                    failed.append((message, reason))
        self._shared_file.wake()
        self._moved.update(message.seq for message in done if isinstance(message, StoredMessage))
        return ReplayResult(tuple(done), tuple(failed))

    def _move(
        self, message: ParkedMessage, connection: Connection, *, to_origin: bool
    ) -> str | None:
        """Move ``message`` to its destination; return None, or the reason why that failed."""
        event = replayed(message, to_origin=to_origin)
        if isinstance(event, str):
            return event
        queues = self._routes.queues(event.exchange, event.target)
        if not queues:
            return _UNROUTABLE
        if not connection.execute(select(events.c.seq).where(_is_still(message))).scalar():
            return "it is no longer in its queue, or it is leased"
        # The old row is deleted last, so that its number isn't reused for a new row.
        self._database.store.put_rows(rows_of(event, queues), connection=connection)
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
            BrokerError: the file can't be used now.
        """
        row = events.c
        waits = _waits_in(self._queue)
        with self._database.transaction() as connection:
            last = connection.execute(select(func.max(row.seq)).where(waits)).scalar()
        remaining, after = self._bound, 0
        while remaining > 0 and last is not None:
            with self._database.transaction() as connection:
                sizes = connection.execute(
                    select(row.seq, func.length(row.payload))
                    .where(waits, row.seq > after, row.seq <= last)
                    .order_by(row.seq)
                    .limit(min(_WINDOW, remaining))
                ).all()
                if not sizes:
                    return
                after = _end_of_window([(seq, size) for seq, size in sizes])
                rows = connection.execute(
                    select(events)
                    .where(waits, row.seq >= sizes[0][0], row.seq <= after)
                    .order_by(row.seq)
                ).all()
            remaining -= len(rows)
            yield [_read(row) for row in rows]

    def remove(self, messages: Sequence[ParkedMessage]) -> None:
        """Delete ``messages``, except those that a replay has moved or that are leased now.

        Raises:
            BrokerError: the file can't be used now; nothing was deleted.
        """
        with self._database.transaction() as connection:
            for message in messages:
                if isinstance(message, StoredMessage) and message.seq not in self._moved:
                    connection.execute(delete(events).where(_is_still(message)))


def _end_of_window(sizes: Sequence[tuple[int, int]]) -> int:
    """Return the number of the last row that fits into a window of bytes, at least the first."""
    total = 0
    end = sizes[0][0]
    for seq, size in sizes:
        total += size
        if total > _WINDOW_BYTES:
            break
        end = seq
    return end


def _waits_in(queue: str) -> ColumnElement[bool]:
    row = events.c
    not_leased = or_(row.lease_token.is_(None), row.available_at <= now())
    return and_(row.queue == queue, row.dead_at.is_(None), not_leased)


def _is_still(message: ParkedMessage) -> ColumnElement[bool]:
    seq = message.seq if isinstance(message, StoredMessage) else -1
    return and_(events.c.seq == seq, events.c.id == message.id, _waits_in(message.queue))
