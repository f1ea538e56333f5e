"""Statements that the driver executes itself do what SQLAlchemy would have them do."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Iterator

import pytest
from sqlalchemy import (
    Column,
    Connection,
    Integer,
    MetaData,
    String,
    Table,
    bindparam,
    event,
    insert,
    literal,
    select,
    text,
    update,
)
from sqlalchemy.exc import DBAPIError, IntegrityError, ProgrammingError

from outbox.storage.clock import Timestamp
from outbox.storage.drivers.direct import execute_alone
from outbox.storage.engines import open_engine
from tests.places import ServerPlace, end_connections

_THINGS = Table(
    "things",
    MetaData(),
    Column("id", Integer, primary_key=True),
    Column("name", String(50)),
    Column("at", Timestamp),
)
_AT = datetime.datetime(2030, 1, 2, 3, 4, 5, 678901, tzinfo=datetime.UTC)
_PUT = insert(_THINGS).from_select(
    ["id", "name", "at"],
    select(
        bindparam("id", type_=Integer), bindparam("name", type_=String), literal(_AT, Timestamp)
    ),
)
_RENAME = update(_THINGS).values(name="100 %").where(_THINGS.c.id <= bindparam("most"))


@contextlib.contextmanager
def connected(url: str) -> Iterator[Connection]:
    engine = open_engine(url)
    _THINGS.metadata.create_all(engine)
    with engine.connect() as found:
        yield found.execution_options(isolation_level="AUTOCOMMIT")
    engine.dispose()


@pytest.fixture
def connection(database_url: str) -> Iterator[Connection]:
    with connected(database_url) as found:
        yield found


@pytest.fixture
def at_postgresql(postgresql_url: str) -> Iterator[Connection]:
    with connected(postgresql_url) as found:
        yield found


def by_sqlalchemy(connection: Connection) -> list[str]:
    """Return the statements that SQLAlchemy executes from now on."""
    seen: list[str] = []
    event.listen(connection, "before_cursor_execute", lambda *call: seen.append(call[2]))
    return seen


def put(connection: Connection, id_: int) -> int:
    return execute_alone(connection, _PUT, {"id": id_, "name": "é 'quoted' %s %(id)s"})


def test_parameters_arrive_and_rows_are_counted(connection: Connection) -> None:
    seen = by_sqlalchemy(connection)
    assert [put(connection, id_) for id_ in (1, 2, 3)] == [1, 1, 1]
    assert execute_alone(connection, _RENAME, {"most": 2}) == 2
    assert bool(seen) == (connection.dialect.name == "sqlite")
    with connection.begin():
        rows = connection.execute(select(_THINGS).order_by(_THINGS.c.id)).all()
    names = ["100 %", "100 %", "é 'quoted' %s %(id)s"]
    assert [tuple(row) for row in rows] == [(id_, names[id_ - 1], _AT) for id_ in (1, 2, 3)]


def prepared(connection: Connection) -> int:
    """Return how many statements of outbox the server keeps prepared for the connection."""
    with connection.begin():
        count = "SELECT count(*) FROM pg_prepared_statements WHERE name LIKE 'outbox%'"
        return int(connection.execute(text(count)).scalar_one())


def test_postgresql_prepares_each_statement_once(at_postgresql: Connection) -> None:
    assert [put(at_postgresql, id_) for id_ in range(10)] == [1] * 10
    assert prepared(at_postgresql) == 1
    assert execute_alone(at_postgresql, _RENAME, {"most": 2}) == 3
    assert prepared(at_postgresql) == 2


def test_nothing_is_prepared_again_where_it_does_not_last(at_postgresql: Connection) -> None:
    put(at_postgresql, 1)
    with at_postgresql.begin():
        at_postgresql.execute(text("DEALLOCATE ALL"))
    assert put(at_postgresql, 2) == 1
    seen = by_sqlalchemy(at_postgresql)
    assert put(at_postgresql, 3) == 1
    assert not seen
    assert not prepared(at_postgresql)


def test_a_pooler_that_swaps_connections_changes_nothing(pooled_url: str) -> None:
    with contextlib.ExitStack() as stack:
        first, second = (stack.enter_context(connected(pooled_url)) for _ in range(2))
        assert put(first, 1) == 1
        with second.begin():
            # On the connection of the server that has the statement: the other one gets another.
            second.execute(text("SELECT 1"))
            assert put(first, 2) == 1
        assert put(second, 3) == 1  # where the name is taken
        assert [put(first, 4), put(second, 5)] == [1, 1]
        with first.begin():
            assert first.execute(text("SELECT count(*) FROM things")).scalar_one() == 5


def test_errors_are_those_of_sqlalchemy_and_change_nothing(connection: Connection) -> None:
    put(connection, 1)
    for _ in range(2):
        with pytest.raises(IntegrityError):
            put(connection, 1)
    with connection.begin():
        connection.execute(text("DROP TABLE things"))
    with pytest.raises(DBAPIError) as caught:
        put(connection, 2)
    assert not caught.value.connection_invalidated


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_lost_connection_is_noticed_and_replaced(
    kind: str, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue(f"{kind}_url")
    engine = open_engine(url)
    _THINGS.metadata.create_all(engine)
    with engine.connect() as found:
        connection = found.execution_options(isolation_level="AUTOCOMMIT")
        put(connection, 1)
        end_connections(ServerPlace(url, ""))
        with pytest.raises(DBAPIError) as caught:
            put(connection, 2)
        assert caught.value.connection_invalidated
        assert put(connection, 2) == 1
    engine.dispose()


def test_a_schema_of_the_engine_is_kept_to(postgresql_url: str) -> None:
    engine = open_engine(postgresql_url)
    with engine.begin() as setup:
        setup.execute(text("CREATE SCHEMA apart"))
    apart = engine.execution_options(schema_translate_map={None: "apart"})
    _THINGS.metadata.create_all(apart)
    with apart.connect() as connection:
        assert put(connection.execution_options(isolation_level="AUTOCOMMIT"), 1) == 1
    with engine.connect() as plain, pytest.raises(ProgrammingError):
        put(plain.execution_options(isolation_level="AUTOCOMMIT"), 1)
    engine.dispose()
