"""Applications whose transactions have another isolation level than outbox's."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox import configure, enqueue_event
from outbox.sql import Inbox, Relay, Store, drain
from outbox.storage.transactions import is_conflict
from tests.relaying import an_event, is_empty, many, opened, running
from tests.waiting import wait_until

LEVELS = ["SERIALIZABLE", "REPEATABLE READ"]


@pytest.fixture(params=LEVELS)
def strict(request: pytest.FixtureRequest, postgresql_url: str) -> Iterator[Engine]:
    """An application's engine."""
    engine = create_engine(postgresql_url, isolation_level=request.param, pool_size=20)
    yield engine
    engine.dispose()


def levels_of(engine: Engine) -> set[str]:
    """Return the isolation levels of the transactions that are committed from now on."""
    levels: set[str] = set()

    @event.listens_for(engine, "commit")
    def note(connection: Connection) -> None:
        levels.add(str(connection.exec_driver_sql("SHOW transaction_isolation").scalar()))

    return levels


@pytest.mark.slow
def test_nothing_is_published_twice_and_no_commit_fails_beside_a_relay(strict: Engine) -> None:
    store = Store(strict)
    store.create()
    with strict.begin() as connection:
        connection.execute(text("CREATE TABLE orders (id text PRIMARY KEY)"))
    publisher = configure("memory://")
    failed: list[DBAPIError] = []

    def place_orders(worker: int) -> None:
        for number in range(150):
            id = f"{worker}-{number}"
            with Session(strict) as session:
                session.execute(text("INSERT INTO orders VALUES (:id)"), {"id": id})
                enqueue_event({}, "order.placed", session=session, id=id)
                try:
                    session.commit()
                except DBAPIError as error:
                    failed.append(error)

    with running(Relay(strict, publisher)):
        workers = [threading.Thread(target=place_orders, args=(number,)) for number in range(6)]
        for each in workers:
            each.start()
        for each in workers:
            each.join()
        assert drain(10)
        # Sooner than any lease ends: then a row that couldn't be deleted would be published again.
        wait_until(lambda: is_empty(store), 5)
    published = Counter(event.id for event in cast(Any, publisher)._own.published)
    assert failed == []
    assert len(published) == 900
    assert set(published.values()) == {1}


def test_claims_and_fates_are_independent_of_the_servers_default(postgresql_url: str) -> None:
    store = opened(postgresql_url)
    name = make_url(postgresql_url).database
    with store.engine.begin() as connection:
        connection.exec_driver_sql(
            f"ALTER DATABASE {name} SET default_transaction_isolation = 'serializable'"
        )
    store.engine.dispose()
    levels = levels_of(store.engine)
    store.put(many(3, "x"))
    rows = store.claim(3)
    store.complete(rows[:1])
    store.release(rows[1:2])
    store.bury(rows[2:], "no")
    store.status()
    store.retry([row[0] for row in store.dead()])
    assert levels == {"read committed"}
    store.engine.dispose()


def test_an_inbox_does_not_share_the_applications_level(strict: Engine) -> None:
    inbox = Inbox(strict)
    levels = levels_of(strict)
    inbox.create()
    entry = inbox.entry(_Consumer(), _Message())
    assert not entry.is_done()
    entry.note()
    assert entry.is_done()
    assert levels == {"read committed"}


class _Consumer:
    queue = "q"
    deduplicate = True


class _Message:
    id = "m"


def test_fates_are_written_again_after_a_deadlock(postgresql_url: str) -> None:
    store = opened(postgresql_url)
    store.put(many(2, "x"))
    rows = store.claim(2)
    lock = text("SELECT 1 FROM outbox_events WHERE id = :id FOR UPDATE")
    counted: list[int] = []
    with store.engine.connect() as other:
        other.execute(lock, {"id": "e1"})
        settling = threading.Thread(target=lambda: counted.append(store.complete(rows)))
        settling.start()
        time.sleep(
            0.3
        )  # it has deleted e0, and waits for e1; in 1 s the server looks for deadlocks
        other.execute(text("SET LOCAL deadlock_timeout = '60s'"))
        other.execute(lock, {"id": "e0"})
        other.commit()
        settling.join(10)
    assert counted == [2]
    store.engine.dispose()


def test_on_mariadb_only_outboxs_own_transactions_are_read_committed(mariadb_url: str) -> None:
    opened(mariadb_url).engine.dispose()
    engine = create_engine(mariadb_url, pool_size=1, max_overflow=0)
    store = Store(engine)
    seen: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(connection: Connection, cursor: Any, statement: str, *_: object) -> None:
        if "outbox_events" in statement:
            cursor.execute("SELECT @@tx_isolation")
            seen.append(cursor.fetchone()[0])

    store.put(many(2, "x"))
    store.complete(store.claim(1))
    assert seen
    assert set(seen) == {"READ-COMMITTED"}
    with engine.connect() as connection:
        level = connection.exec_driver_sql("SELECT @@tx_isolation").scalar()
    assert level == "REPEATABLE-READ"  # the server's default, on the same connection
    engine.dispose()


def test_claims_on_mariadb_disturb_no_writer_and_no_other_claim(mariadb_url: str) -> None:
    opened(mariadb_url).engine.dispose()
    engine = create_engine(mariadb_url, pool_size=10)  # REPEATABLE READ, as applications have it
    store = Store(engine)
    writers_end = threading.Event()

    def write(first: int) -> None:
        for number in range(first, first + 400, 4):
            with engine.begin() as connection:
                store.put(
                    [an_event(n, "x", key=f"k{n % 7}") for n in range(number, number + 4)],
                    connection=connection,
                )

    def claim(ordered: bool) -> list[str]:
        found: list[str] = []
        while True:
            last = writers_end.is_set()
            rows = store.claim(20, ordered=ordered)
            found += [row.event.id for row in rows]
            assert store.complete(rows) == len(rows)
            if last and not rows and not store.status().queues:
                return found

    with ThreadPoolExecutor(5) as threads:
        claims = [threads.submit(claim, ordered) for ordered in (False, False, True)]
        writes = [threads.submit(write, first) for first in (0, 400)]
        errors = [one.exception() for one in writes]
        writers_end.set()
        found = [id for one in claims for id in one.result(60)]
    assert errors == [None, None]
    assert sorted(found) == sorted(f"e{n}" for n in range(800))
    engine.dispose()


def test_fates_are_written_again_after_a_deadlock_on_mariadb(mariadb_url: str) -> None:
    store = opened(mariadb_url)
    store.put(many(2, "x"))
    rows = store.claim(2)
    lock = text("SELECT 1 FROM outbox_events WHERE seq = :seq FOR UPDATE")
    conflicts: list[bool] = []

    @event.listens_for(store.engine, "handle_error")
    def note(context: Any) -> None:
        conflicts.append(is_conflict(context.sqlalchemy_exception))

    counted: list[int] = []
    with store.engine.connect() as other:
        # It has changed more, so it isn't the one that the server rolls back.
        store.put(many(50, "y"), connection=other)
        other.execute(lock, {"seq": rows[1].seq})
        settling = threading.Thread(target=lambda: counted.append(store.complete(rows)))
        settling.start()
        time.sleep(0.5)  # it has deleted e0, and waits for e1
        other.execute(lock, {"seq": rows[0].seq})
        other.commit()
        settling.join(10)
    assert conflicts == [True]
    assert counted == [2]
    store.engine.dispose()
