"""Events stored in transactions of the database that is the broker, too."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, select
from sqlalchemy.orm import Session

from outbox import Event, Publisher, configure, enqueue_event
from outbox.consumers import Consumer, ReceivedEvent, Worker
from outbox.messages.rows import UNROUTED, values_of
from outbox.sql import metadata
from outbox.storage.engines import open_engine
from outbox.storage.schema import events
from outbox.storage.store import Store
from tests.waiting import wait_until


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
        wait_until(lambda: seen.ids == also_seen.ids == ["e1", "e2"])
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
    wait_until(lambda: seen.ids == ["e1", "e2", "e3"])
    assert worker.stop()
    assert rows(engine) == []
    engine.dispose()


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
