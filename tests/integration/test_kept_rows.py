"""Rows that are kept for a while after they were published or processed."""

from __future__ import annotations

import datetime
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event, select, text, update
from sqlalchemy.orm import Session

import outbox.sql
from outbox import Publisher, UsageError, configure, enqueue_event
from outbox.consumers import REJECT, ReceivedEvent, Worker, consumer
from outbox.messages.delivery import dead_letter_queue
from outbox.settings import Settings
from outbox.sql import Relay, Store, row_fates
from outbox.storage.schema import events
from outbox.storage.upkeep import purging
from outbox.storage.upkeep.published_rows import published
from tests.amqp import Inspector
from tests.places import (
    DatabasePlace,
    SQLitePlace,
    database_place_of,
    events_for,
    made,
    working,
)
from tests.relaying import an_event, is_empty, many, running
from tests.waiting import wait_until

HOUR = 3600.0


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def place(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> DatabasePlace:
    return database_place_of(request.param, request, name, tmp_path)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Look for rows whose time is over several times a second."""
    monkeypatch.setattr(purging, "_EVERY", 0.2)
    monkeypatch.setattr(purging, "_SPREAD", 0.2)


def kept(store: Store) -> list[Any]:
    with store.engine.connect() as connection:
        return list(connection.execute(select(published).order_by(published.c.number)))


def let_time_pass(store: Store) -> None:
    """Make the time of every row over."""
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(minutes=1)
    with store.engine.begin() as connection:
        connection.execute(update(published).values(kept_until=past))


def test_a_row_is_kept_as_it_was_and_only_if_it_is_still_leased(store: Store) -> None:
    sent = an_event(1, "shop", "order.placed", key="k", priority=4, headers={"a": [1, b"\xff"]})
    store.put([sent, an_event(2, "shop")])
    [first, second] = store.claim(2)
    with store.engine.connect() as connection:
        before = connection.execute(select(events).order_by(events.c.seq)).first()
    with store.engine.begin() as connection:  # another worker has claimed it meanwhile
        connection.execute(
            update(events).where(events.c.seq == second.seq).values(lease_token="theirs")
        )
    assert store.complete([first, second], keep=HOUR) == 1
    [row] = kept(store)
    assert before is not None
    carried = set(before._mapping) & set(row._mapping)
    assert {"id", "type", "payload", "queue", "headers", "key", "stored_at", "rank"} <= carried
    assert {name: row._mapping[name] for name in carried} == {
        name: before._mapping[name] for name in carried
    }
    assert abs((row.kept_until - row.published_at).total_seconds() - HOUR) < 0.001
    assert store.status().queues == {"": 1}
    assert store.status().kept == 1
    assert store.status(at_most=1).kept_is_complete is False


@pytest.mark.parametrize("zone", ["+05:00", "-05:00"])
def test_the_documented_statement_publishes_a_kept_row_again(store: Store, zone: str) -> None:
    dialect = store.engine.dialect.name
    page = (Path(__file__).parents[2] / "docs" / "durable.md").read_text()
    [statement] = re.findall(
        rf"On {dialect}(?:, [^:]*)?:\n\n```sql\n(INSERT .*?)```", page, re.IGNORECASE | re.DOTALL
    )
    sent = an_event(1, "shop", "order.placed", key="k", priority=4, headers={"a": [1, b"\xff"]})
    store.put([sent, an_event(2, "shop")])
    first = store.claim(2)
    assert store.complete(first, keep=HOUR) == 2
    with store.engine.begin() as connection:
        if dialect != "sqlite":
            name = "TimeZone" if dialect == "postgresql" else "time_zone"
            connection.exec_driver_sql(f"SET {name} = '{zone}'")
        connection.exec_driver_sql(statement.replace("0199f3a2-...", sent.id))
    with store.engine.connect() as connection:
        row = connection.execute(select(events)).one()
    assert abs((row.stored_at - datetime.datetime.now(datetime.UTC)).total_seconds()) < 60
    [again] = store.claim(2)
    assert again.event == next(each.event for each in first if each.event.id == sent.id)


def test_a_failed_transaction_keeps_and_deletes_nothing(store: Store) -> None:
    store.put([an_event(1, "shop")])
    rows = store.claim(1)
    with store.engine.connect() as connection, connection.begin() as transaction:
        assert store.complete(rows, keep=HOUR, connection=connection) == 1
        transaction.rollback()
    assert kept(store) == []
    assert store.complete(rows, keep=HOUR) == 1


def test_rows_are_deleted_when_their_time_is_over_so_many_at_once(store: Store) -> None:
    store.put(many(7, "shop"))
    store.complete(store.claim(5), keep=HOUR)
    let_time_pass(store)
    store.complete(store.claim(2), keep=HOUR)
    assert store.purge_published(3) == 3
    assert store.purge_published(3) == 2
    assert store.purge_published(3) == 0
    assert [row.id for row in kept(store)] == ["e5", "e6"]


def test_by_default_no_statement_is_about_kept_rows(store: Store) -> None:
    statements: list[str] = []

    @event.listens_for(store.engine, "before_cursor_execute")
    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        statements.append(statement)

    store.put(many(3, "shop"))
    store.complete(store.claim(3))
    assert statements
    assert not [each for each in statements if published.name in each]


def test_the_setting_is_a_timedelta_or_a_number_of_seconds() -> None:
    def loaded(value: Any) -> float:
        return Settings.load("memory://", {"keep_published": value}, {}).keep_published

    assert loaded(datetime.timedelta(days=2)) == 2 * 24 * HOUR
    assert loaded(90) == 90
    assert Settings.load("memory://", {}, {}).keep_published == 0
    environment = {"OUTBOX_KEEP_PUBLISHED": "86400"}
    assert Settings.load("memory://", {}, environment).keep_published == 24 * HOUR
    for wrong in (datetime.timedelta(-1), "1 day", True):
        with pytest.raises(UsageError, match=r"'keep_published' is .*, not a number from 0"):
            loaded(wrong)


# ------------------------------------------------------------------------------- durable outbox


@pytest.fixture
def keeping(amqp_url: str, name: str, inspector: Inspector) -> Iterator[Publisher]:
    inspector.queue(name, name)
    with Publisher(amqp_url, exchange=name, keep_published=HOUR) as publisher:
        yield publisher


@pytest.mark.usefixtures("impatient")
def test_a_relay_keeps_what_it_has_published_and_deletes_it_in_time(
    store: Store, keeping: Publisher, inspector: Inspector, name: str
) -> None:
    store.put(many(30, name))
    with running(Relay(store, keeping, batch=7)):
        assert len(inspector.messages(name, 30)) == 30
        wait_until(lambda: is_empty(store))
        assert [row.id for row in kept(store)] == [f"e{n}" for n in range(30)]
        let_time_pass(store)
        wait_until(lambda: kept(store) == [])  # although there is nothing else to do
    assert store.claim(100) == []


def test_a_relay_does_not_start_without_the_table_and_goes_on_if_it_is_gone(
    store: Store,
    keeping: Publisher,
    inspector: Inspector,
    name: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(row_fates, "_reported", set())
    relay = Relay(store, keeping)
    with running(relay):
        with store.engine.begin() as connection:
            connection.execute(text("DROP TABLE outbox_published"))
        for number in range(3):
            store.put([an_event(number, name)])
            assert inspector.get(name).id == f"e{number}"
            wait_until(lambda: is_empty(store))
    assert relay.stats().published == 3
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
    assert len(lines) == 1
    assert "published events are deleted, and not kept" in lines[0]
    with pytest.raises(UsageError, match=r"outbox_published does not exist.*`outbox sql upgrade`"):
        Relay(store, keeping).start()


@pytest.mark.usefixtures("impatient")
def test_the_process_that_stored_events_keeps_and_deletes_them_too(
    store: Store, amqp_url: str, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    configure(amqp_url, exchange=name, keep_published=datetime.timedelta(hours=1))

    def send() -> str:
        with Session(store.engine) as session:
            sent = enqueue_event({"n": 1}, "order.placed", session=session)
            session.commit()
        assert inspector.get(name).id == sent.id
        assert outbox.sql.drain()
        return sent.id

    first = send()
    assert [row.id for row in kept(store)] == [first]
    let_time_pass(store)
    time.sleep(0.3)
    second = send()
    assert [row.id for row in kept(store)] == [second]


# ------------------------------------------------------------------------- the database as broker


def kept_in(place: DatabasePlace) -> list[tuple[Any, ...]]:
    return [
        tuple(row)
        for row in place.execute("SELECT queue, type FROM outbox_published ORDER BY number")
    ]


@pytest.mark.usefixtures("impatient")
def test_a_worker_keeps_what_was_processed_and_deletes_it_in_time(
    place: DatabasePlace, name: str
) -> None:
    queue = made(place, name, "order.*")
    done: list[str] = []

    @consumer(queue, topics=["order.*"])
    def work(event: ReceivedEvent) -> Any:
        done.append(event.id)
        return REJECT if event.target == "order.lost" else None

    with place.publisher(keep_published=HOUR) as publisher:
        with working(publisher, work):
            sent = events_for(publisher, ["order.placed", "order.lost", "order.paid"])
            assert publisher.publish(sent).ok
            wait_until(lambda: len(kept_in(place)) == 3)
            assert sorted(kept_in(place)) == [
                (queue, "order.lost"),
                (queue, "order.paid"),
                (queue, "order.placed"),
            ]
            assert place.count(dead_letter_queue(queue)) == 1
            assert place.count(queue) == 0
            past = 1.0 if isinstance(place, SQLitePlace) else "2020-01-01 00:00:00"
            place.execute("UPDATE outbox_published SET kept_until = ?", past)
            wait_until(lambda: kept_in(place) == [])
        assert sorted(done) == sorted(each.id for each in sent)


def test_a_busy_worker_keeps_all_that_it_has_processed(place: DatabasePlace, name: str) -> None:
    queue = made(place, name, "order.*")

    @consumer(queue, topics=["order.*"])
    def work(event: ReceivedEvent) -> None:
        """Succeed."""

    with place.publisher(keep_published=HOUR) as publisher:
        for _ in range(3):
            assert publisher.publish(events_for(publisher, ["order.placed"] * 100)).ok
        with working(publisher, work, prefetch=20):
            wait_until(lambda: len(kept_in(place)) == 300)
            assert place.count(queue) == 0


@pytest.mark.parametrize("place", ["postgresql", "mariadb"], indirect=True)
def test_a_worker_does_not_start_without_the_table(place: DatabasePlace, name: str) -> None:
    @consumer(name)
    def work(event: ReceivedEvent) -> None: ...

    place.execute("ALTER TABLE outbox_published RENAME TO outbox_hidden")
    try:
        with place.publisher(keep_published=HOUR) as publisher:
            worker = Worker([work], publisher=publisher)
            worker.start()
            try:
                with pytest.raises(UsageError, match="outbox_published does not exist"):
                    worker.wait(10)
            finally:
                worker.stop()
        with place.publisher() as publisher, working(publisher, work):
            pass  # which needs no such table
    finally:
        place.execute("ALTER TABLE outbox_hidden RENAME TO outbox_published")
