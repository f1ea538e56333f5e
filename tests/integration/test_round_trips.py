"""On PostgreSQL, what is done all the time is one statement, which is a transaction by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, event, make_url

from outbox import Publisher
from outbox.sql import Store
from tests.places import ServerPlace, events_for, made, place_of


@pytest.fixture
def place(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> ServerPlace:
    found = place_of("postgresql", request, name, tmp_path)
    assert isinstance(found, ServerPlace)
    return found


@pytest.fixture
def publisher(place: ServerPlace, name: str) -> Iterator[Publisher]:
    """A publisher that knows the queue ``name``."""
    made(place, name)
    with place.publisher(unroutable="fail") as found:
        assert found.publish(events_for(found, [name])).ok
        yield found


@pytest.fixture
def statements() -> Iterator[list[tuple[str, bool]]]:
    """What psycopg executes meanwhile: its first word, and whether it is a transaction."""
    seen: list[tuple[str, bool]] = []

    def note(connection: Connection, cursor: Any, statement: str, *_: Any) -> None:
        alone = getattr(cursor.connection, "autocommit", False)
        if not statement.startswith(("NOTIFY", "SELECT pg_notify")):
            seen.append((statement.split()[0], alone))

    event.listen(Engine, "before_cursor_execute", note)
    yield seen
    event.remove(Engine, "before_cursor_execute", note)


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
