"""Claims that a worker repeats: past the remains of what was claimed, and of all ranks at once."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Connection, event, text

from outbox.event import Event
from outbox.messages.rows import values_of
from outbox.sql import Store
from outbox.storage.floors import Floors
from outbox.storage.store import Claimed

REMAINS = 20_000


def put(store: Store, *names: str, queue: str = "q", rank: int = 0, **options: Any) -> None:
    events = [Event(name, "a", "shop", b"", **options) for name in names]
    store.put_rows([values_of(each, queue=queue, rank=rank) for each in events])


def ids(rows: list[Claimed]) -> list[str]:
    return [row.event.id for row in rows]


@pytest.fixture(params=["postgresql", "mariadb"])
def servers_store(request: pytest.FixtureRequest) -> Store:
    store: Store = request.getfixturevalue(f"{request.param}_store")
    return store


@pytest.fixture
def held(postgresql_store: Store) -> Iterator[None]:
    """A transaction that sees the table as it is now, until the test ends."""
    with postgresql_store.engine.connect() as connection:
        connection.execution_options(isolation_level="REPEATABLE READ")
        connection.execute(text("SELECT count(*) FROM outbox_events"))
        yield


def leave_remains(store: Store) -> None:
    """Have as many rows stored, claimed and deleted."""
    columns = "id, aggregatetype, aggregateid, type, payload, queue, exchange, content_type"
    values = "'1', 'a', 'a', 'a', '', 'q', 'shop', 'x'"
    past = "now() - interval '1 hour' + interval '1 ms' * n"
    with store.engine.begin() as connection:
        connection.execute(
            text(
                f"INSERT INTO outbox_events ({columns}, occurred_at, stored_at, available_at) "
                f"SELECT {values}, {past}, {past}, {past} FROM generate_series(1, {REMAINS}) AS n"
            )
        )
    with store.engine.begin() as connection:
        connection.execute(text("DELETE FROM outbox_events"))


def blocks_read(store: Store, floors: Floors | None) -> int:
    """Return how many blocks of the index a claim looks at."""
    blocks = text(
        "SELECT pg_stat_get_xact_blocks_fetched(indexrelid) FROM pg_index "
        "WHERE indexrelid = 'outbox_events_due'::regclass"
    )
    with store.engine.begin() as connection:
        before = int(connection.execute(blocks).scalar_one())
        assert len(store.claim(1, queue="q", floors=floors, connection=connection)) == 1
        read = int(connection.execute(blocks).scalar_one()) - before
        connection.rollback()
    return read


def test_a_repeated_claim_does_not_read_what_was_claimed_before_it(
    postgresql_store: Store, held: Connection
) -> None:
    store = postgresql_store
    leave_remains(store)
    put(store, *(str(number) for number in range(60)))
    floors = Floors()
    assert store.claim(1, queue="q", floors=floors)  # the first one looks everywhere
    assert blocks_read(store, floors) * 5 < blocks_read(store, None)


def test_rows_below_the_floor_are_found_soon(servers_store: Store) -> None:
    store, floors = servers_store, Floors()
    put(store, "a", "b", "c")
    [first] = store.claim(1, queue="q", floors=floors)
    assert ids(store.claim(1, queue="q", floors=floors)) == ["b"]
    with store.engine.connect() as connection:
        transaction = connection.begin()
        rows = [values_of(Event("late", "a", "shop", b""), queue="q")]
        store.put_rows(rows, connection=connection)
        time.sleep(0.3)  # its place is below the floor then
        put(store, "d", "e", "f")
        assert ids(store.claim(1, queue="q", floors=floors)) == ["c"]
        transaction.commit()
    store.release([first], in_place=True)
    began = time.monotonic()
    found: list[str] = []
    while len(found) < 5:
        found += ids(store.claim(1, queue="q", floors=floors))
        assert time.monotonic() < began + 3
    assert sorted(found) == ["a", "d", "e", "f", "late"]
    assert time.monotonic() < began + 1.5


def test_a_claim_that_gets_less_than_it_wants_looks_everywhere(
    servers_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox.storage.floors._SHARE", 0)
    store, floors = servers_store, Floors()
    put(store, "a", "b")
    assert ids(store.claim(2, queue="q", floors=floors)) == ["a", "b"]
    past = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=1)
    put(store, "past", deliver_at=past)
    put(store, "c")
    assert sorted(ids(store.claim(2, queue="q", floors=floors))) == ["c", "past"]
    put(store, "past", deliver_at=past)
    assert store.due_in(["q"], floors=floors) < -3000  # type: ignore[operator]


def test_higher_ranks_come_first_also_if_they_are_new(postgresql_store: Store) -> None:
    store, floors = postgresql_store, Floors()
    put(store, "low1", "low2", "low3", "low4")
    assert ids(store.claim(1, queue="q", floors=floors)) == ["low1"]
    put(store, "high", rank=9)
    put(store, "middle1", "middle2", rank=5)
    put(store, "highest", rank=255)
    claimed = [ids(store.claim(1, queue="q", floors=floors)) for _ in range(4)]
    assert claimed == [["highest"], ["high"], ["middle1"], ["middle2"]]
    put(store, "between", rank=7)
    assert ids(store.claim(2, queue="q", floors=floors)) == ["between", "low2"]


@pytest.mark.slow
def test_ten_ranks_of_scheduled_rows_take_one_statement(store: Store) -> None:
    floors = Floors()
    now = datetime.datetime.now(datetime.UTC)
    soon, later = now + datetime.timedelta(seconds=60), now + datetime.timedelta(hours=1)
    for rank in range(10):
        put(store, *(f"{rank}-{n}" for n in range(20)), rank=rank, deliver_at=later)
        put(store, f"other-{rank}", queue="other", rank=rank, deliver_at=soon)
    put(store, "due", rank=3)
    for _ in range(2):
        statements: list[str] = []

        @event.listens_for(store.engine, "before_cursor_execute")
        def note(_: Any, __: Any, statement: str, *___: Any, to: list[str] = statements) -> None:
            to.append(statement)

        rows = store.claim(10, queue="q", floors=floors)
        assert ids(rows) == ["due"]
        store.release(rows)
        if store.engine.dialect.name != "sqlite":  # where a statement isn't a round trip
            lookups = [each for each in statements if "firsts" in each]
            assert len(lookups) <= 2, lookups
    assert store.claim(10, queue="q", floors=floors)
    assert store.due_in(["q"], floors=floors) == pytest.approx(60, abs=30)
    assert store.due_in(["other"]) == pytest.approx(60, abs=5)
    assert store.due_in(["other", "q", "empty"], floors=floors) == pytest.approx(60, abs=5)
    assert store.due_in(["empty"], floors=floors) is None
