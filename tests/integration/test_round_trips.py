"""On PostgreSQL, what is done all the time is one statement, which is a transaction by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from sqlalchemy import make_url, text

from outbox import Event, Publisher
from outbox.messages.rows import values_of
from outbox.sql import Store
from outbox.storage.drivers.prepared import Prepared
from outbox.storage.engines import open_engine
from outbox.storage.floors import Floors
from outbox.storage.store import Claimed
from tests.places import ServerPlace, events_for, made, reading, server_place_of


@pytest.fixture
def place(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> ServerPlace:
    return server_place_of("postgresql", request, name, tmp_path)


@pytest.fixture
def publisher(place: ServerPlace, name: str) -> Iterator[Publisher]:
    """A publisher that knows the queue ``name``."""
    made(place, name)
    with place.publisher(unroutable="fail") as found:
        assert found.publish(events_for(found, [name])).ok
        yield found


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """What is executed meanwhile: its first word, and whether it is a transaction."""
    seen: list[tuple[str, bool]] = []
    execute, execute_prepared = psycopg.Cursor.execute, Prepared.execute

    def note(cursor: Any, query: Any, *arguments: Any, **options: Any) -> Any:
        # What SQLAlchemy asks over the first connection of an engine is in lower case, or no str.
        is_ours = isinstance(query, str) and query[0].isupper()
        if is_ours and "pg_notify" not in query:
            seen.append((query.split()[0], cursor.connection.autocommit))
        return execute(cursor, query, *arguments, **options)

    def note_prepared(prepared: Any, connection: Any, query: str, values: Any) -> Any:
        seen.append((query.split()[0], connection.autocommit))
        return execute_prepared(prepared, connection, query, values)

    monkeypatch.setattr(psycopg.Cursor, "execute", note)
    monkeypatch.setattr(Prepared, "execute", note_prepared)
    return seen


@pytest.mark.parametrize("count", [1, 3, 100])
def test_a_chunk_is_one_statement(
    place: ServerPlace,
    publisher: Publisher,
    name: str,
    statements: list[tuple[str, bool]],
    count: int,
) -> None:
    assert publisher.publish(events_for(publisher, [name] * count)).ok
    assert statements == [("INSERT", True)]
    assert place.count(name) == 1 + count


def test_a_chunk_of_several_kinds_of_rows_is_a_transaction(
    place: ServerPlace, publisher: Publisher, name: str, statements: list[tuple[str, bool]]
) -> None:
    chunk = [*events_for(publisher, [name]), *events_for(publisher, [name], delay=60)]
    assert publisher.publish(chunk).ok
    assert place.count(name) == 3
    assert not any(alone for _, alone in statements)


def test_a_queue_that_is_new_gets_the_next_event(
    place: ServerPlace, publisher: Publisher, name: str
) -> None:
    place.bind(f"{name}.new", name, name)
    assert publisher.publish(events_for(publisher, [name])).ok
    assert (place.count(name), place.count(f"{name}.new")) == (2, 1)


def test_a_queue_that_is_gone_gets_no_event(
    place: ServerPlace, publisher: Publisher, name: str
) -> None:
    place.execute("DELETE FROM outbox_bindings")
    report = publisher.publish(events_for(publisher, [name]))
    assert len(report.rejected) == 1
    assert place.count(name) == 1


@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
def test_where_a_statement_would_have_another_level_it_is_in_a_transaction(
    postgresql_url: str, name: str, statements: list[tuple[str, bool]], level: str
) -> None:
    place = ServerPlace(postgresql_url, name)
    Store(place.engine).create()
    database = make_url(postgresql_url).database
    place.execute(f"ALTER DATABASE {database} SET default_transaction_isolation = '{level}'")
    place.engine.dispose()
    made(place, name)
    statements.clear()
    with place.publisher() as publisher:
        for _ in range(2):
            assert publisher.publish(events_for(publisher, [name])).ok
    assert ("INSERT", False) in statements
    assert not any(alone for _, alone in statements)


# ------------------------------------------------------------------------------------- consuming


@pytest.fixture
def store(place: ServerPlace) -> Iterator[Store]:
    engine = open_engine(place.url)
    yield Store(engine, "a" * 12)
    engine.dispose()


@pytest.fixture
def floors(store: Store, name: str) -> Floors:
    """Floors that know the rank 0 of the queue ``name``."""
    floors = Floors()
    put(store, name, 1)
    assert len(store.claim(1, queue=name, floors=floors)) == 1
    assert store.exchanges([name], floors)
    return floors


def put(store: Store, queue: str, count: int, rank: int = 0) -> None:
    events = [Event(id=str(n), target="t", exchange="x", body=b"12345678") for n in range(count)]
    store.put_rows([values_of(each, queue=queue, rank=rank) for each in events])


def exchange(
    store: Store, done: list[Claimed], limit: int, queue: str, floors: Floors, **options: Any
) -> list[Claimed]:
    with store.engine.begin() as connection:
        return store.exchange(
            done, limit, queue=queue, lease=60, floors=floors, connection=connection, **options
        )


def test_what_is_done_is_deleted_and_as_much_is_claimed_in_order(
    store: Store, place: ServerPlace, floors: Floors, name: str
) -> None:
    put(store, name, 5)
    first = exchange(store, [], 3, name, floors)
    assert [row.event.id for row in first] == ["0", "1", "2"]
    second = exchange(store, first[:2], 5, name, floors)
    assert [row.event.id for row in second] == ["3", "4"]
    assert store.leased([*first, *second]) == {row.seq for row in [first[2], *second]}
    assert place.execute(f"SELECT 1 FROM outbox_events WHERE seq = {first[0].seq}") == []


def test_a_claim_in_one_statement_stops_at_the_bytes_it_may_take(
    store: Store, floors: Floors, name: str
) -> None:
    put(store, name, 5)
    assert len(exchange(store, [], 5, name, floors, max_bytes=16)) == 2


def test_rows_whose_lease_has_ended_come_back_to_others_only(
    store: Store, place: ServerPlace, floors: Floors, name: str
) -> None:
    put(store, name, 2)
    mine = exchange(store, [], 2, name, floors)
    place.execute("UPDATE outbox_events SET available_at = stored_at")
    # What is deleted is among them: in one statement both could not happen to a row.
    assert exchange(store, mine[:1], 2, name, floors) == []
    others = Store(store.engine, "b" * 12).claim(5, queue=name)
    assert mine[1].seq in {row.seq for row in others}
    assert mine[0].seq not in {row.seq for row in others}


def test_another_rank_is_left_to_a_claim_that_looks_for_it(
    store: Store, floors: Floors, name: str
) -> None:
    put(store, name, 2)
    put(store, name, 1, rank=9)
    assert exchange(store, [], 2, name, floors) == []
    claimed = store.claim(2, queue=name, floors=floors)
    assert [row.event.id for row in claimed] == ["0", "0"]  # the urgent one, and one besides


def test_the_highest_known_rank_comes_first(store: Store, floors: Floors, name: str) -> None:
    floors.add(name, 9)
    put(store, name, 2)
    put(store, name, 1, rank=9)
    urgent = exchange(store, [], 5, name, floors)
    assert len(urgent) == 1
    assert len(exchange(store, urgent, 5, name, floors)) == 2


def test_the_commit_of_an_exchange_does_not_wait_for_the_disk(
    store: Store, floors: Floors, name: str
) -> None:
    with store.engine.begin() as connection:
        store.exchange([], 1, queue=name, lease=60, floors=floors, connection=connection)
        assert connection.execute(text("SHOW synchronous_commit")).scalar() == "off"
    with store.engine.begin() as connection:
        assert connection.execute(text("SHOW synchronous_commit")).scalar() == "on"


def test_a_busy_worker_needs_one_statement_for_what_it_acks_and_claims(
    place: ServerPlace, publisher: Publisher, name: str, statements: list[tuple[str, bool]]
) -> None:
    with reading(place, name, again=True, prefetch=10) as reader:
        reader.get(1)
        assert publisher.publish(events_for(publisher, [name] * 60)).ok
        taken = reader.take(10)
        statements.clear()
        for _ in range(5):
            for delivery in taken:
                reader.ack(delivery)
            taken = reader.take(10)
        busy = [each for each in statements if each[0] != "SELECT"]
        assert busy.count(("WITH", True)) >= len(busy) / 2 > 2
