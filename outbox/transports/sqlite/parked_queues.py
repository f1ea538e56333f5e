"""Lists, replays and deletes parked messages in the file."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from sqlalchemy import ColumnElement, Connection, and_, delete, func, or_, select

from outbox.errors import UsageError
from outbox.event import Event
from outbox.messages.dead_letters import fields_of, is_kept_on_replay, origin_headers
from outbox.messages.delivery import headers_on_the_wire
from outbox.messages.parked_message import ParkedMessage, ReplayResult
from outbox.settings import MIB, Settings
from outbox.storage.clock import now
from outbox.storage.rows import event_of
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
    """A parked message and its row.

    Attributes:
        seq: the row's number.
        event: as it is stored.
    """

    seq: int
    event: Event


def _read(row: Any) -> StoredMessage:
    """Return the message of a row."""
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
    """Return what is published when ``message`` is replayed, or why it cannot be.

    The same id, body and headers, without what parking or dying has added. A dead letter that goes
    back to one queue says in headers where it was published to first.
    """
    destination = message.destination(to_origin=to_origin)
    if isinstance(destination, str):
        return destination
    if not isinstance(message, StoredMessage):
        return "it is not of this file"
    headers = {
        name: value
        for name, value in message.event.headers.items()
        if is_kept_on_replay(message.kind, name)
    }
    origin = message.origin
    if message.kind == "dead" and origin is not None and origin != destination:
        headers |= origin_headers(origin)
    return dataclasses.replace(
        message.event, exchange=destination.exchange, target=destination.target, headers=headers
    )


class SQLiteParkedQueues:
    """The parking and dead-letter queues of one file. For one thread.

    What is looked at is not held: a message is taken out of its queue in the transaction that puts
    it elsewhere, if it is still there, and in nobody's hands.
    """

    def __init__(self, url: BrokerURL, settings: Settings) -> None:
        """Find the file; nothing is connected yet.

        Raises:
            UsageError: there is no such file, or it cannot be used.
        """
        location = Location.of(url)
        if not Path(location.path).exists():
            raise UsageError(f"there is no file {location.path}")
        self._database = Database(location)
        self._shared_file = shared_file_at(location.path)
        self._routes = Routes()
        self._moved: set[int] = set()

    def __enter__(self) -> Self:
        """Open the file.

        Raises:
            BrokerError: it cannot be used now.
        """
        self._database.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._database.close()

    def count(self, queue: str) -> int:
        """Return how many messages wait in ``queue``.

        Raises:
            UsageError: there is no such queue.
            BrokerError: the file cannot be used now.
        """
        with self._database.transaction() as connection:
            self._routes.update(routing.load(connection))
            found: int = connection.execute(
                select(func.count()).select_from(events).where(_waits_in(queue))
            ).scalar_one()
        if not self._routes.has_queue(queue):
            raise UsageError(f"{self._database.path} has no queue {queue!r}")
        return found

    @contextlib.contextmanager
    def browse(self, queue: str, bound: int) -> Iterator[_Browser]:
        """Look at up to ``bound`` messages of ``queue``: none that comes in from now on."""
        self._moved.clear()
        yield _Browser(self._database, queue, bound, self._moved)

    def obstacle(self, message: ParkedMessage, *, to_origin: bool) -> str | None:
        """Return why a replay of ``message`` would fail."""
        found = replayed(message, to_origin=to_origin)
        if isinstance(found, str):
            return found
        return None if self._routes.queues(found.exchange, found.target) else _UNROUTABLE

    def replay(self, messages: Sequence[ParkedMessage], *, to_origin: bool) -> ReplayResult:
        """Move ``messages`` in one transaction: a message is in one place or the other.

        Raises:
            BrokerError: the file cannot be used now; nothing was replayed.
        """
        done: list[ParkedMessage] = []
        left: list[tuple[ParkedMessage, str]] = []
        with self._database.transaction() as connection:
            self._routes.update(routing.load(connection))
            for message in messages:
                reason = self._move(message, connection, to_origin=to_origin)
                if reason is None:
                    done.append(message)
                else:
                    left.append((message, reason))
        self._shared_file.wake()
        self._moved.update(one.seq for one in done if isinstance(one, StoredMessage))
        return ReplayResult(tuple(done), tuple(left))

    def _move(
        self, message: ParkedMessage, connection: Connection, *, to_origin: bool
    ) -> str | None:
        """Put ``message`` where it is to go; return why not, if so."""
        event = replayed(message, to_origin=to_origin)
        if isinstance(event, str):
            return event
        queues = self._routes.queues(event.exchange, event.target)
        if not queues:
            return _UNROUTABLE
        if not connection.execute(select(events.c.seq).where(_is_still(message))).scalar():
            return "somebody else has it, or has had it"
        # The old row goes last, so that its number is not given to a new one.
        self._database.store.put_rows(rows_of(event, queues), connection=connection)
        connection.execute(delete(events).where(_is_still(message)))
        return None


class _Browser:
    """Reads messages of one queue window by window. For one thread."""

    def __init__(self, database: Database, queue: str, bound: int, moved: set[int]) -> None:
        self._database = database
        self._queue = queue
        self._bound = bound
        self._moved = moved

    def windows(self) -> Iterator[Sequence[StoredMessage]]:
        """Read the messages that were there at the beginning, each once, oldest first.

        Raises:
            BrokerError: the file cannot be used now.
        """
        row = events.c
        waits = _waits_in(self._queue)
        with self._database.transaction() as connection:
            last = connection.execute(select(func.max(row.seq)).where(waits)).scalar()
        left, after = self._bound, 0
        while left > 0 and last is not None:
            with self._database.transaction() as connection:
                sizes = connection.execute(
                    select(row.seq, func.length(row.payload))
                    .where(waits, row.seq > after, row.seq <= last)
                    .order_by(row.seq)
                    .limit(min(_WINDOW, left))
                ).all()
                if not sizes:
                    return
                after = _end_of_window([(seq, size) for seq, size in sizes])
                found = connection.execute(
                    select(events)
                    .where(waits, row.seq >= sizes[0][0], row.seq <= after)
                    .order_by(row.seq)
                ).all()
            left -= len(found)
            yield [_read(one) for one in found]

    def remove(self, messages: Sequence[ParkedMessage]) -> None:
        """Delete ``messages``, unless a replay has done so, or somebody has them now.

        Raises:
            BrokerError: the file cannot be used now; nothing was deleted.
        """
        with self._database.transaction() as connection:
            for message in messages:
                if isinstance(message, StoredMessage) and message.seq not in self._moved:
                    connection.execute(delete(events).where(_is_still(message)))


def _end_of_window(sizes: Sequence[tuple[int, int]]) -> int:
    """Return the number of the last row that fits; at least of the first."""
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
    in_no_hands = or_(row.lease_token.is_(None), row.available_at <= now())
    return and_(row.queue == queue, row.dead_at.is_(None), in_no_hands)


def _is_still(message: ParkedMessage) -> ColumnElement[bool]:
    seq = message.seq if isinstance(message, StoredMessage) else -1
    return and_(events.c.seq == seq, events.c.id == message.id, _waits_in(message.queue))
