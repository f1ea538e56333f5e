"""Places for events, behind one interface, for tests of what all transports promise."""

from __future__ import annotations

import contextlib
import itertools
import queue
import sqlite3
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias, Unpack

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.pool import NullPool

from outbox import Event, EventCollector, Publisher
from outbox.consumers import Consumer, Worker
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.messages.delivery import Delivery, QueueSpec, QueueType, dead_letter_queue
from outbox.messages.parked_message import ParkedMessage
from outbox.settings import SettingOverrides, Settings
from outbox.storage.store import Store
from outbox.testing.databases.mariadb import PrivateMariaDB
from outbox.testing.databases.postgresql import PrivatePostgreSQL
from outbox.transports.database import routing
from outbox.transports.database.routing import Binding
from outbox.transports.parked_queues import ParkedQueues
from outbox.transports.registry import open_parked_queues, open_subscription
from outbox.transports.subscription import Subscription
from tests.amqp import Inspector
from tests.waiting import wait_until

__all__ = [
    "DatabasePlace",
    "Place",
    "RabbitMQPlace",
    "Reader",
    "SQLitePlace",
    "ServerPlace",
    "database_place_of",
    "end_connections",
    "events_for",
    "made",
    "parked_in",
    "place_of",
    "reading",
    "replay",
    "selected",
    "server_place_of",
    "working",
]


class Place(Protocol):
    """A broker, or a database instead of one."""

    url: str
    exchange: str

    def publisher(self, **settings: Unpack[SettingOverrides]) -> Publisher: ...

    def bind(self, queue: str, exchange: str, *patterns: str) -> None:
        """Create a queue and bind it, as another process would."""
        ...

    def count(self, queue: str) -> int: ...

    def will_clean_up(self, queue: str) -> None: ...


class _Place:
    def __init__(self, url: str, exchange: str) -> None:
        self.url = url
        self.exchange = exchange

    def publisher(self, **settings: Unpack[SettingOverrides]) -> Publisher:
        chosen: SettingOverrides = {"exchange": self.exchange, **settings}
        return Publisher(self.url, **chosen)


class RabbitMQPlace(_Place):
    """A RabbitMQ broker, with an exchange for the test."""

    def __init__(self, url: str, exchange: str, inspector: Inspector) -> None:
        super().__init__(url, exchange)
        self._inspector = inspector
        inspector.queue(PARKING_QUEUE)
        inspector.channel.queue_purge(PARKING_QUEUE)
        inspector.clean_up(exchange=exchange)

    def bind(self, queue: str, exchange: str, *patterns: str) -> None:
        self._inspector.queue(queue, exchange, patterns, arguments={"x-queue-type": "classic"})

    def count(self, queue: str) -> int:
        return self._inspector.count(queue)

    def will_clean_up(self, queue: str) -> None:
        self._inspector.clean_up(queue=queue)


class SQLitePlace(_Place):
    """An SQLite file."""

    def __init__(self, path: str, exchange: str) -> None:
        super().__init__(f"sqlite:///{path}", exchange)
        self.path = path
        with self.publisher() as publisher:
            publisher.make_ready()
            wait_until(lambda: publisher.connected)

    def execute(self, statement: str, *parameters: Any) -> list[Any]:
        """Run a statement on a separate connection."""
        with contextlib.closing(sqlite3.connect(self.path, timeout=10)) as connection:
            with connection:
                return connection.execute(statement, parameters).fetchall()

    def bind(self, queue: str, exchange: str, *patterns: str) -> None:
        for row in ((queue, "", queue), *((queue, exchange, pattern) for pattern in patterns)):
            self.execute("INSERT OR IGNORE INTO outbox_bindings VALUES (?, ?, ?)", *row)

    def count(self, queue: str) -> int:
        statement = "SELECT count(*) FROM outbox_events WHERE queue = ? AND lease_token IS NULL"
        return int(self.execute(statement, queue)[0][0])

    def will_clean_up(self, queue: str) -> None:
        """Do nothing: the file belongs to the test alone."""


_EMPTIED = (
    "outbox_events",
    "outbox_bindings",
    "outbox_presence",
    "outbox_published",
    "outbox_recurring",
)


class ServerPlace(_Place):
    """The database of a server, with empty tables."""

    def __init__(self, url: str, exchange: str) -> None:
        super().__init__(url, exchange)
        self.engine = create_engine(url, poolclass=NullPool)
        Store(self.engine).create()
        with self.engine.begin() as connection:
            for table in _EMPTIED:
                connection.execute(text(f"DELETE FROM {table}"))

    def execute(self, statement: str, *parameters: Any) -> list[Any]:
        """Run a statement on a separate connection; each ``?`` is a parameter."""
        parts = statement.split("?")
        names = [f":p{number}" for number in range(len(parameters))]
        text_ = text("".join(itertools.chain(*zip(parts, [*names, ""], strict=True))))
        values = {name[1:]: value for name, value in zip(names, parameters, strict=True)}
        with self.engine.begin() as connection:
            result = connection.execute(text_, values)
            return [tuple(row) for row in result] if result.returns_rows else []

    def bind(self, queue: str, exchange: str, *patterns: str) -> None:
        made = [routing.of_queue(queue), *(Binding(queue, exchange, each) for each in patterns)]
        with self.engine.begin() as connection:
            routing.add(connection, made)

    def count(self, queue: str) -> int:
        statement = "SELECT count(*) FROM outbox_events WHERE queue = ? AND lease_token IS NULL"
        return int(self.execute(statement, queue)[0][0])

    def will_clean_up(self, queue: str) -> None:
        """Do nothing: the next test empties the tables."""


def end_connections(place: ServerPlace) -> None:
    """End every other connection to the database, as an administrator would."""
    if place.engine.dialect.name == "postgresql":
        place.execute(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
        return
    for (number,) in place.execute(
        "SELECT id FROM information_schema.processlist "
        "WHERE db = database() AND id <> connection_id()"
    ):
        place.execute(f"KILL {number}")


def place_of(kind: str, request: pytest.FixtureRequest, name: str, folder: Path) -> Place:
    """Return a test's place: a file in ``folder``, a database on a server, or RabbitMQ."""
    if kind == "sqlite":
        return SQLitePlace(str(folder / "outbox.db"), name)
    if kind in ("postgresql", "mariadb"):
        server: PrivatePostgreSQL | PrivateMariaDB = request.getfixturevalue(kind)
        return ServerPlace(server.url, name)
    amqp_url: str = request.getfixturevalue("amqp_url")
    inspector: Inspector = request.getfixturevalue("inspector")
    return RabbitMQPlace(amqp_url, name, inspector)


DatabasePlace: TypeAlias = SQLitePlace | ServerPlace


def database_place_of(
    kind: str, request: pytest.FixtureRequest, name: str, folder: Path
) -> DatabasePlace:
    """Return a test's place in a database; see :func:`place_of`."""
    place = place_of(kind, request, name, folder)
    assert isinstance(place, SQLitePlace | ServerPlace)
    return place


def server_place_of(
    kind: str, request: pytest.FixtureRequest, name: str, folder: Path
) -> ServerPlace:
    """Return a test's place in a database on a server; see :func:`place_of`."""
    place = place_of(kind, request, name, folder)
    assert isinstance(place, ServerPlace)
    return place


class Reader:
    """Takes the messages of one queue as the broker delivers them."""

    def __init__(self, subscription: Subscription) -> None:
        self._subscription = subscription
        self._arrived: queue.SimpleQueue[Delivery] = queue.SimpleQueue()
        self.refused: list[str] = []
        subscription.start(self._arrived.put, self.refused.append)

    def take(self, count: int, *, timeout: float = 10.0) -> list[Delivery]:
        """Return the next ``count`` messages without settling them; fail if they don't arrive."""
        return self._next(count, timeout, settle=False)

    def _next(self, count: int, timeout: float, *, settle: bool) -> list[Delivery]:
        deadline = time.monotonic() + timeout
        deliveries: list[Delivery] = []
        while len(deliveries) < count:
            try:
                delivery = self._arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"{len(deliveries)} of {count} messages arrived") from None
            if settle:
                self._subscription.ack(delivery)
            deliveries.append(delivery)
        return deliveries

    def get(self, count: int = 1, *, timeout: float = 10.0) -> list[Delivery]:
        """Return the next ``count`` messages, and ack them."""
        return self._next(count, timeout, settle=True)

    def ack(self, delivery: Delivery) -> None:
        """Ack a delivery that was taken."""
        self._subscription.ack(delivery)

    def requeue(self, delivery: Delivery, delay: float = 0.0) -> None:
        """Return a delivery to its queue."""
        self._subscription.requeue(delivery, delay)

    def close(self) -> None:
        """Stop consuming; deliveries that were not settled return to the queue."""
        self._subscription.cancel()
        self._subscription.close()


@contextlib.contextmanager
def reading(
    place: Place,
    name: str,
    topics: Sequence[str] = (),
    *,
    prefetch: int = 1000,
    again: bool = False,
    max_priority: int | None = None,
) -> Iterator[Reader]:
    """Consume from a queue bound to the place's exchange; create it unless ``again``."""
    for queue_name in (name, dead_letter_queue(name)):
        place.will_clean_up(queue_name)
    declare = "never" if again else "create"
    settings = Settings.load(place.url, {"exchange": place.exchange, "declare": declare})
    kind: QueueType = "quorum" if max_priority is None else "classic"
    spec = QueueSpec(
        name, tuple(topics), place.exchange, max_priority=max_priority, queue_type=kind
    )
    reader = Reader(open_subscription(settings, [spec], prefetch))
    try:
        if not again:
            # It is bound once it is consumed from, as an event to it alone shows.
            with place.publisher(unroutable="ignore") as publisher:
                greeting = events_for(publisher, [name], exchange="")
                # A queue still being declared may nack it; kept, it would be sent again later.
                wait_until(lambda: publisher.publish(greeting, keep=False).published)
            reader.get(1)
        yield reader
    finally:
        reader.close()


def events_for(publisher: Publisher, targets: Sequence[str], **options: Any) -> list[Event]:
    """Return an unpublished event for each target; its payload has its number ``n``, from 0."""
    collector = EventCollector(publisher=publisher)
    return [
        collector.enqueue_event({"n": n}, target, **options) for n, target in enumerate(targets)
    ]


def parked_in(place: Place) -> ParkedQueues:
    """Return the parked queues as ``outbox parked`` opens them."""
    return open_parked_queues(Settings.load(place.url, {"exchange": place.exchange}))


def selected(place: Place, queue: str) -> list[ParkedMessage]:
    with parked_in(place) as parked, parked.browse(queue, parked.count(queue)) as browsing:
        return [message for window in browsing.windows() for message in window]


def replay(place: Place, queue: str, *, to_origin: bool = False) -> list[str]:
    """Replay all messages of a queue, as the command does; return the reasons of failures."""
    reasons: list[str] = []
    with parked_in(place) as parked, parked.browse(queue, parked.count(queue)) as browsing:
        for window in browsing.windows():
            outcome = parked.replay(window, to_origin=to_origin)
            browsing.remove(outcome.done)
            reasons += [reason for _, reason in outcome.left]
    return reasons


@contextlib.contextmanager
def working(
    publisher: Publisher, *consumers: Consumer | type[Consumer], **options: Any
) -> Iterator[Worker]:
    """Run a worker on queues that exist already."""
    worker = Worker(consumers, publisher=publisher, **{"threads": 2, **options})
    worker.start()
    try:
        yield worker
    finally:
        assert worker.stop(10)


def made(place: Place, queue: str, *topics: str, max_priority: int | None = None) -> str:
    """Create a consumer's queue and its dead-letter queue, both empty; return its name."""
    with reading(place, queue, topics, max_priority=max_priority):
        return queue
