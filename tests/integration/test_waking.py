"""Workers of a PostgreSQL database are woken by what is committed for them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import psycopg
import pytest
from sqlalchemy import Engine, create_engine, make_url, select, text
from sqlalchemy.orm import Session

from outbox import Event, Publisher, UsageError, configure, enqueue_event
from outbox.consumers import Consumer, ReceivedEvent, Worker, consumer
from outbox.sql import drain
from outbox.storage.engines import open_engine
from outbox.storage.notifications import channel_of
from outbox.storage.schema import events
from outbox.storage.store import Store
from outbox.transports.database import subscription
from outbox.transports.database.server.server_address import ServerAddress
from outbox.url import BrokerURL
from proving.proxy import FaultProxy, Frame, Way
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python


class Seen(Consumer):
    """Notes when it gets events."""

    queue = "orders"
    topics = ("order.*",)

    def __init__(self) -> None:
        self.at: dict[str, float] = {}

    def process(self, event: ReceivedEvent) -> None:
        self.at[event.id] = time.monotonic()


@pytest.fixture(autouse=True)
def drained() -> Iterator[None]:
    """The thread that publishes after commits has nothing to wait for when the test ends."""
    yield
    drain()


@pytest.fixture
def url(postgresql_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a database with empty tables; workers look into it once a second."""
    monkeypatch.setattr(subscription, "_FIRST_POLL", 1.0)
    engine = open_engine(postgresql_url)
    Store(engine).create()
    engine.dispose()
    return postgresql_url


@pytest.fixture
def engine(url: str) -> Iterator[Engine]:
    """The application's engine."""
    found = create_engine(url)
    yield found
    found.dispose()


@contextlib.contextmanager
def working(url: str, seen: Seen, *, is_woken: bool = True) -> Iterator[Worker]:
    """Run a worker in the block, from when it listens."""
    with Publisher(url) as publisher:
        worker = Worker([seen], publisher=publisher, threads=2)
        worker.start()
        found: Any = worker._subscription
        wait_until(lambda: worker.is_consuming)
        wait_until(lambda: found._database._waking.is_proven or not is_woken)
        yield worker
        assert worker.stop()


def latencies(seen: Seen, sent: dict[str, float]) -> list[float]:
    wait_until(lambda: seen.at.keys() == sent.keys())
    return sorted(seen.at[id] - sent[id] for id in sent)


def stored_by_session(engine: Engine, id: str) -> None:
    with Session(engine) as session:
        enqueue_event(1, "order.placed", session=session, id=id)
        session.commit()


def stored_by_connection(engine: Engine, id: str) -> None:
    with engine.begin() as connection:
        enqueue_event(1, "order.placed", connection=connection, id=id)


def published(_: Engine, id: str) -> None:
    enqueue_event(1, "order.placed", id=id)
    from outbox import publish

    publish().raise_for_failure()


@pytest.mark.parametrize("send", [published, stored_by_session, stored_by_connection])
def test_a_commit_wakes_an_idle_worker_of_another_process(
    url: str, engine: Engine, send: Any
) -> None:
    configure(url)
    seen, sent = Seen(), {}
    # Another URL of the same database, so that nothing of this process wakes the worker.
    with working(f"{url}?application_name=worker", seen):
        for number in range(8):
            time.sleep(0.2)
            send(engine, f"e{number}")
            sent[f"e{number}"] = time.monotonic()
        found = latencies(seen, sent)
    assert found[6] < 0.25, found


def test_an_event_for_one_known_queue_is_routed_in_the_applications_transaction(
    url: str, engine: Engine
) -> None:
    configure(url, after_commit="nothing")
    with working(url, Seen()):
        pass  # it has declared its queue
    with Session(engine) as session, engine.connect() as other:
        enqueue_event(1, "order.placed", session=session, id="e1", priority=3)
        enqueue_event(1, "nobody.knows", session=session, id="e2")
        session.flush()
        found = select(events.c.id, events.c.queue, events.c.rank).order_by(events.c.seq)
        assert list(session.execute(found)) == [("e1", "orders", 3), ("e2", "outbox.unrouted", 0)]
        assert list(other.execute(found)) == []
        session.commit()


def test_a_worker_finds_messages_without_being_woken(url: str, engine: Engine) -> None:
    configure(url, after_commit="nothing")
    seen, sent = Seen(), {}
    with working(url, seen):
        for number in range(3):
            stored_by_session(engine, f"e{number}")
            sent[f"e{number}"] = time.monotonic()
            time.sleep(0.4)
        assert latencies(seen, sent)[-1] < 1.4


@pytest.mark.slow
def test_an_idle_worker_looks_once_a_second_and_ten_times_where_nothing_wakes_it(
    url: str,
) -> None:
    counts: dict[bool, int] = {}
    for is_woken in (True, False):
        statements: Counter[bytes] = Counter()

        def count(frame: Frame, statements: Counter[bytes] = statements) -> bool:
            if frame.way is Way.UP and b"RECURSIVE" in frame.data:
                statements[b"look"] += 1
            return False

        with FaultProxy(url) as proxy:
            address = proxy.url if is_woken else f"{proxy.url}?listen=no"
            with working(address, Seen(), is_woken=is_woken):
                proxy.cut_at(count)
                time.sleep(2)
                counts[is_woken] = statements[b"look"]
    assert 1 <= counts[True] <= 3
    assert 12 <= counts[False] <= 21


@pytest.mark.hazard("F18")
@pytest.mark.slow
def test_behind_a_pooler_workers_poll_and_are_woken_past_it(
    url: str, pooled_url: str, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    pooled = make_url(pooled_url).render_as_string(hide_password=False)
    publisher = configure(pooled)
    for address, is_woken in (
        (pooled, False),
        (f"{pooled}?listen={quote(url, safe='')}", True),
    ):
        seen, sent = Seen(), {}
        with working(address, seen, is_woken=is_woken):
            for number in range(20):
                time.sleep(0.05)
                stored_by_session(engine, f"e{number}")
                sent[f"e{number}"] = time.monotonic()
            found = latencies(seen, sent)
        assert found[15] < 0.25, (found, is_woken)
    publisher.close()  # before the database goes: the pooler would wait for another one


def test_the_url_to_listen_at_is_checked_without_showing_its_password() -> None:
    found = ServerAddress.of(
        BrokerURL.parse("postgresql://h/d?listen=postgresql%3A%2F%2Fu%3Apw%40direct%2Fd")
    )
    assert str(found.listen_url) == "postgresql://u:***@direct:5432/d"
    with pytest.raises(UsageError, match="is a amqp:// URL; use one of PostgreSQL") as raised:
        ServerAddress.of(BrokerURL.parse("postgresql://h/d?listen=amqp%3A%2F%2Fu%3Apw%40h%2F"))
    assert "pw" not in str(raised.value)


@pytest.mark.hazard("F18")
def test_a_message_waits_a_second_at_most_when_the_listener_was_cut(
    url: str, engine: Engine
) -> None:
    configure(url)
    seen, sent = Seen(), {}
    with working(f"{url}?application_name=worker", seen), engine.connect() as connection:
        for number in range(3):
            cut = (
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
            )
            connection.execute(text(cut))
            connection.commit()
            stored_by_session(engine, f"e{number}")
            sent[f"e{number}"] = time.monotonic()
            time.sleep(0.5)
        assert latencies(seen, sent)[-1] < 1.2


def test_nothing_is_read_or_announced_in_the_applications_transaction(
    url: str, engine: Engine
) -> None:
    statements: list[str] = []
    configure(url)
    with working(url, Seen()) as worker:
        with Session(engine) as session:
            connection: Any = session.connection().connection.driver_connection
            assert isinstance(connection, psycopg.Connection)
            from sqlalchemy import event

            @event.listens_for(session.connection(), "before_cursor_execute")
            def note(*arguments: Any) -> None:
                statements.append(arguments[2])

            enqueue_event(1, "order.placed", session=session)
            session.commit()
        assert worker.is_consuming
    assert [statement.split()[0:3] for statement in statements] == [
        ["INSERT", "INTO", "outbox_events"]
    ]


def test_what_a_stopping_worker_returns_is_announced_to_others(url: str) -> None:
    begun, may_end = threading.Event(), threading.Event()

    @consumer("orders", topics=["order.*"])
    def slow(event: ReceivedEvent) -> None:
        begun.set()
        may_end.wait(5)

    address = make_url(url).set(drivername="postgresql").render_as_string(False)
    with Publisher(url) as publisher, psycopg.connect(address, autocommit=True) as listener:
        worker = Worker([slow], publisher=publisher, threads=1)
        worker.start()
        wait_until(lambda: worker.is_consuming)
        publisher.publish(
            [Event(id=f"e{n}", target="order.x", exchange="outbox", body=b"1") for n in range(5)]
        )
        assert begun.wait(5)
        time.sleep(0.2)  # what was published has been announced
        listener.execute(f'LISTEN "{channel_of("orders")}"')
        threading.Timer(0.3, may_end.set).start()
        assert worker.stop()
        [_] = list(listener.notifies(timeout=5, stop_after=1))
