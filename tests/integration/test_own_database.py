"""Events stored in transactions of the database that is the broker, too."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session

from outbox import Event, Publisher, configure, enqueue_event
from outbox.consumers import Consumer, ReceivedEvent, Worker
from outbox.messages.rows import UNROUTED, values_of
from outbox.sql import Relay, drain, metadata
from outbox.storage.engines import open_engine
from outbox.storage.schema import events
from outbox.storage.store import Store
from outbox.testing.databases.postgresql import PrivatePostgreSQL
from outbox.transports.database import own_tables
from tests.conftest import new_database
from tests.relaying import opened, running
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python


@pytest.fixture(autouse=True)
def drained() -> Iterator[None]:
    """The thread that publishes after commits has nothing to wait for when the test ends."""
    yield
    drain()


@pytest.fixture
def url(database_url: str) -> str:
    """The URL of a database that is the broker, and an application's: one of each kind."""
    engine = open_engine(database_url)
    Store(engine).create()
    engine.dispose()
    return database_url


class Seen(Consumer):
    """Notes what it gets."""

    queue = "orders"
    topics = ("order.*",)

    def __init__(self) -> None:
        self.ids: list[str] = []

    def process(self, event: ReceivedEvent) -> None:
        self.ids.append(event.id)


class AlsoSeen(Seen):
    """Notes it in another queue."""

    queue = "audit"
    topics = ("order.*",)


def event(number: int, target: str = "order.placed", **options: Any) -> Event:
    return Event(id=f"e{number}", target=target, exchange="outbox", body=b"1", **options)


def stored(store: Store, *events: Event) -> None:
    """Store events as a process does that dies right after the commit."""
    store.put_rows([values_of(each, queue=UNROUTED) for each in events])


def test_a_worker_routes_what_a_dead_process_has_stored(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = Store(open_engine(url))
    seen, also_seen = Seen(), AlsoSeen()
    with Publisher(url) as publisher:
        worker = Worker([seen, also_seen], publisher=publisher)
        worker.start()
        stored(store, event(1), event(2), event(3, "nobody.knows"))
        stored(store, event(4, "x", unroutable="fail"), event(5, "x", unroutable="ignore"))
        wait_until(lambda: sorted(seen.ids) == sorted(also_seen.ids) == ["e1", "e2"])
        wait_until(lambda: not worker.stats().in_flight)
        assert worker.stop()
    status = store.status()
    assert status.queues == {"outbox.unroutable": 1}
    assert [(id, reason) for _, id, _, reason in store.dead()] == [
        ("e4", "unroutable: 312 NO_ROUTE")
    ]
    logged = [(each.levelno, each.getMessage()) for each in caplog.records]
    assert logged == [
        (
            logging.WARNING,
            "1 stored event(s) parked in 'outbox.unroutable': 'e3'; no queue is bound to them",
        ),
        (logging.ERROR, "1 stored event(s) are dead: 'e4'; unroutable: 312 NO_ROUTE"),
    ]
    store.engine.dispose()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_more_than_a_worker_routes_at_once_are_all_routed(url: str) -> None:
    store = Store(open_engine(url))
    stored(store, *(event(number) for number in range(1200)))
    seen = Seen()
    with Publisher(url) as publisher:
        worker = Worker([seen], publisher=publisher)
        worker.start()
        wait_until(lambda: len(seen.ids) == 1200)
        assert worker.stop()
    assert sorted(seen.ids) == sorted(f"e{number}" for number in range(1200))
    store.engine.dispose()


# ------------------------------------------------------------------------------- storing


def rows(engine: Engine) -> list[tuple[str, str]]:
    """Return the ids and queues of all rows, in their order."""
    with engine.connect() as connection:
        found = connection.execute(select(events.c.id, events.c.queue).order_by(events.c.seq))
        return [(id, queue) for id, queue in found]


@pytest.mark.slow
def test_events_stored_in_a_transaction_reach_the_workers_of_the_same_database(url: str) -> None:
    engine = create_engine(url)
    seen = Seen()
    publisher = configure(url)
    worker = Worker([seen], publisher=publisher)
    worker.start()
    wait_until(lambda: worker.is_consuming)
    with Session(engine) as session:
        enqueue_event(1, "order.placed", session=session, id="e1")
        session.flush()
        enqueue_event(1, "order.placed", session=session, id="e2")
        session.commit()
        enqueue_event(1, "order.placed", session=session, id="no")
        session.rollback()
    with engine.begin() as connection:
        enqueue_event(1, "order.placed", connection=connection, id="e3")
    wait_until(lambda: sorted(seen.ids) == ["e1", "e2", "e3"])
    wait_until(lambda: rows(engine) == [])
    assert worker.stop()
    engine.dispose()


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
def test_an_event_whose_process_dies_right_after_the_commit_needs_no_relay(url: str) -> None:
    engine = create_engine(url)
    seen = Seen()
    with Publisher(url) as publisher:
        worker = Worker([seen], publisher=publisher)
        worker.start()
        program = f"""
import os
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from outbox import configure, enqueue_event
configure({url!r})
with Session(create_engine({url!r})) as session:
    enqueue_event(1, "order.placed", session=session, id="e1")
    session.flush()
    session.connection().connection.commit()
    os._exit(9)
"""
        assert subprocess.run([sys.executable, "-c", program], timeout=30).returncode == 9
        wait_until(lambda: seen.ids == ["e1"])
        assert worker.stop()
    assert rows(engine) == []
    engine.dispose()


DURING_AN_OUTAGE = """
import os, sys
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from outbox import configure, enqueue_event
_, broker, database, after_commit = sys.argv
configure(broker, after_commit=after_commit, connect_timeout=0.5)
with Session(create_engine(database)) as session:
    enqueue_event(1, "order.placed", session=session, id="e1")
    enqueue_event(1, "order.placed", session=session, id="e2", delay=0.1)
    session.commit()
os._exit(9)
"""


def store_during_an_outage(broker: str, database: str, after_commit: str = "publish") -> None:
    """Store two events in a process for which the broker is away, and which then dies."""
    away = make_url(broker).set(host="127.0.0.1", port=1)  # where nothing listens
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            DURING_AN_OUTAGE,
            away.render_as_string(hide_password=False),
            database,
            after_commit,
        ],
        timeout=30,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 9, done.stderr
    assert "cannot find out whether events stored with" in done.stderr


@pytest.mark.parametrize("after_commit", ["publish", "nothing"])
@pytest.mark.slow
def test_events_of_a_process_that_starts_during_an_outage_need_no_relay(
    server_url: str, after_commit: str
) -> None:
    store_during_an_outage(server_url, server_url, after_commit)
    engine = create_engine(server_url)
    assert sorted(rows(engine)) == [("e1", UNROUTED), ("e2", UNROUTED)]
    seen = Seen()
    with Publisher(server_url) as publisher:
        worker = Worker([seen], publisher=publisher)
        worker.start()
        wait_until(lambda: sorted(seen.ids) == ["e1", "e2"])
        assert worker.stop()
    assert rows(engine) == []
    engine.dispose()


@pytest.mark.slow
def test_if_their_database_is_another_one_a_relay_publishes_them(
    server_url: str, postgresql: PrivatePostgreSQL
) -> None:
    seen = Seen()
    with new_database(postgresql) as other_url, Publisher(server_url) as publisher:
        store = opened(other_url)
        store_during_an_outage(server_url, other_url)
        assert store.status().queues == {UNROUTED: 2}
        worker = Worker([seen], publisher=publisher)
        worker.start()
        with running(Relay(store, publisher)):
            wait_until(lambda: sorted(seen.ids) == ["e1", "e2"])
        assert worker.stop()
        assert store.status().queues == {}
        store.engine.dispose()


def test_a_relay_to_another_broker_leaves_them_alone(tmp_path: Path) -> None:
    store = opened(f"sqlite:///{tmp_path}/other.db")
    stored(store, event(1))
    with Publisher("memory://") as publisher:
        assert Relay(store, publisher).run_once() == 0
    assert store.status().queues == {UNROUTED: 1}
    store.engine.dispose()


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
def test_events_stored_in_another_database_wait_for_a_relay(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/other.db")
    metadata.create_all(engine)
    configure(url, after_commit="nothing")
    with Session(engine) as session:
        for number in range(2):
            enqueue_event(1, "order.placed", session=session, id=f"e{number}")
            session.commit()
    assert rows(engine) == [("e0", ""), ("e1", "")]
    [warning] = caplog.messages
    assert "are in other tables than the queues of" in warning
    engine.dispose()


# ---------------------------------------------------------------------- when queues are made


@pytest.mark.parametrize(
    ("database_url", "level"),
    [
        ("postgresql", "READ COMMITTED"),
        ("postgresql", "SERIALIZABLE"),
        ("mariadb", "REPEATABLE READ"),
    ],
    indirect=["database_url"],
)
def test_a_queue_made_during_the_transaction_gets_its_events(url: str, level: Any) -> None:
    engine = create_engine(url, isolation_level=level)
    publisher = configure(url)
    seen, also_seen = Seen(), AlsoSeen()
    workers = [Worker([each], publisher=publisher) for each in (seen, also_seen)]
    with Session(engine) as session:
        session.execute(select(1))  # its snapshot is from now
        workers[0].start()
        wait_until(lambda: workers[0].is_consuming)
        enqueue_event(1, "order.placed", session=session, id="e1")
        session.flush()
        workers[1].start()
        wait_until(lambda: workers[1].is_consuming)
        session.commit()
    wait_until(lambda: seen.ids == ["e1"])
    wait_until(lambda: rows(engine) == [])
    assert all(worker.stop() for worker in workers)
    engine.dispose()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_an_event_whose_queue_is_made_after_it_was_stored_is_routed_there(url: str) -> None:
    engine = create_engine(url, isolation_level="REPEATABLE READ")
    publisher = configure(url)
    seen = Seen()
    worker = Worker([seen], publisher=publisher)
    with Session(engine) as session:
        enqueue_event(1, "order.placed", session=session, id="e1")
        session.flush()
        worker.start()
        wait_until(lambda: worker.is_consuming)
        session.commit()
    wait_until(lambda: seen.ids == ["e1"])
    assert worker.stop()
    engine.dispose()


@pytest.mark.parametrize("database_url", ["sqlite", "postgresql"], indirect=True)
def test_an_event_for_several_queues_reaches_each(url: str) -> None:
    engine = create_engine(url)
    publisher = configure(url)
    seen, also_seen = Seen(), AlsoSeen()
    worker = Worker([seen, also_seen], publisher=publisher)
    worker.start()
    wait_until(lambda: worker.is_consuming)
    with Session(engine) as session:
        for number in range(5):
            enqueue_event(1, "order.placed", session=session, id=f"e{number}")
        session.commit()
    wait_until(lambda: len(seen.ids) == len(also_seen.ids) == 5)
    wait_until(lambda: rows(engine) == [])
    assert worker.stop()
    engine.dispose()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_savepoint_that_is_rolled_back_takes_its_events_along(url: str) -> None:
    engine = create_engine(url)
    publisher = configure(url)
    seen = Seen()
    worker = Worker([seen], publisher=publisher)
    worker.start()
    wait_until(lambda: worker.is_consuming)
    with Session(engine) as session:
        enqueue_event(1, "order.placed", session=session, id="e1")
        with contextlib.suppress(ZeroDivisionError), session.begin_nested():
            enqueue_event(1, "order.placed", session=session, id="no")
            session.flush()
            raise ZeroDivisionError
        enqueue_event(1, "order.placed", session=session, id="e2")
        session.commit()
    wait_until(lambda: sorted(seen.ids) == ["e1", "e2"])
    wait_until(lambda: rows(engine) == [])
    assert worker.stop()
    engine.dispose()


# ------------------------------------------------------------------------------- PostgreSQL


@pytest.fixture
def server_url(postgresql_url: str) -> str:
    """The URL of a PostgreSQL database with empty tables."""
    engine = open_engine(postgresql_url)
    Store(engine).create()
    engine.dispose()
    return postgresql_url


def declared(url: str) -> None:
    """Have the queues made."""
    with Publisher(url) as publisher:
        worker = Worker([Seen()], publisher=publisher)
        worker.start()
        wait_until(lambda: worker.is_consuming)
        assert worker.stop()


def test_events_are_routed_at_once_from_an_event_loop(server_url: str) -> None:
    declared(server_url)
    configure(server_url, after_commit="nothing")

    async def store() -> None:
        engine = create_async_engine(make_url(server_url).set(drivername="postgresql+asyncpg"))
        async with AsyncSession(engine) as session:
            enqueue_event(1, "order.placed", session=session, id="e1")
            await session.commit()
        await engine.dispose()

    asyncio.run(store())
    engine = create_engine(server_url)
    assert rows(engine) == [("e1", "orders")]
    engine.dispose()


def test_a_role_that_may_only_insert_stores_events(
    server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    declared(server_url)
    owner = create_engine(server_url)
    with owner.begin() as connection:
        name = f"app_{uuid.uuid4().hex[:8]}"
        connection.execute(text(f"CREATE ROLE {name} LOGIN"))
        connection.execute(text(f"GRANT INSERT ON outbox_events TO {name}"))
        connection.execute(text(f"GRANT SELECT ON outbox_bindings, outbox_meta TO {name}"))
    url = make_url(server_url).set(username=name)
    engine = create_engine(url)
    configure(url.render_as_string(False))
    with engine.begin() as connection:
        enqueue_event(1, "order.placed", connection=connection, id="e1")
    with owner.begin() as connection:
        connection.execute(text(f"GRANT SELECT ON outbox_events TO {name}"))  # for RETURNING
    with engine.begin() as connection:
        enqueue_event(1, "nobody.knows", connection=connection, id="e2")
    assert drain()
    # A worker routes it, which may do that.
    assert rows(owner) == [("e1", "orders"), ("e2", UNROUTED)]
    assert caplog.messages == []
    engine.dispose()
    with owner.begin() as connection:
        connection.execute(text(f"DROP OWNED BY {name}"))
        connection.execute(text(f"DROP ROLE {name}"))
    owner.dispose()


def test_events_of_another_schema_wait_for_a_relay(
    server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    declared(server_url)
    configure(server_url, after_commit="nothing")
    engine = create_engine(server_url)
    other = engine.execution_options(schema_translate_map={None: "tenant"})
    with engine.begin() as connection:
        connection.execute(text("CREATE SCHEMA tenant"))
    Store(other).create()
    with Session(other) as session:
        enqueue_event(1, "order.placed", session=session, id="e1")
        session.commit()
    with Session(engine) as session:
        # Chosen for this transaction only, after it was known where the engine writes.
        enqueue_event(1, "order.placed", session=session, id="e2")
        session.flush()
        session.rollback()
        session.connection(execution_options={"schema_translate_map": {None: "tenant"}})
        enqueue_event(1, "order.placed", session=session, id="e3")
        session.commit()
    assert rows(other) == [("e1", ""), ("e3", "")]
    assert rows(engine) == []
    [warning] = [each for each in caplog.messages if "relay" in each]
    assert "are in other tables than the queues of" in warning
    engine.dispose()


def test_tables_of_an_earlier_version_are_named_with_the_remedy(
    server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    configure(server_url, after_commit="nothing")
    engine = create_engine(server_url)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE outbox_meta"))
    with Session(engine) as session:
        enqueue_event(1, "order.placed", session=session, id="e1")
        session.commit()
    assert rows(engine) == [("e1", UNROUTED)]
    assert caplog.messages[-1].endswith(": the tables have no identity: run `outbox sql upgrade`")
    engine.dispose()


def test_a_copy_of_the_database_is_another_one(
    postgresql: PrivatePostgreSQL, server_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    declared(server_url)
    template = make_url(server_url).database or ""
    with new_database(postgresql, template=template) as copy:
        configure(server_url, after_commit="nothing")
        engine = create_engine(copy)
        with Session(engine) as session:
            enqueue_event(1, "order.placed", session=session, id="e1")
            session.commit()
        assert rows(engine) == [("e1", "")]
        engine.dispose()
    assert "are in other tables than the queues of" in caplog.text


def test_a_copy_of_the_bindings_that_is_too_old_is_not_used(
    server_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_tables, "_REFRESH", 0.3)
    monkeypatch.setattr(own_tables, "_OUTDATED", 0.3)
    configure(server_url, after_commit="nothing")
    engine = create_engine(server_url)
    with Session(engine) as session:
        enqueue_event(1, "order.placed", session=session, id="e1")  # the copy is made
        session.commit()
        declared(server_url)
        time.sleep(0.4)
        enqueue_event(1, "order.placed", session=session, id="e2")  # it is read again
        session.commit()
        time.sleep(0.2)
        enqueue_event(1, "order.placed", session=session, id="e3")
        session.commit()
    assert rows(engine)[-2:] == [("e2", UNROUTED), ("e3", "orders")]
    engine.dispose()
