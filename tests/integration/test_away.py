"""How each driver reports a database that is away, which is not the message's failure."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import asyncpg  # type: ignore[import-untyped]
import psycopg
import psycopg2  # type: ignore[import-untyped]
import pymysql
import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

from outbox.consumers.message.databases import is_unavailable
from outbox.testing.databases.postgresql import PrivatePostgreSQL
from outbox.testing.servers import free_ports


def of_sqlalchemy(driver: str) -> Callable[[str], None]:
    def connect(url: str) -> None:
        create_engine(make_url(url).set(drivername=f"postgresql+{driver}")).connect()

    return connect


def of_sqlalchemy_and_asyncpg(url: str) -> None:
    engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"))

    async def connect() -> None:
        async with engine.connect():
            pass

    asyncio.run(connect())


def of_asyncpg(url: str) -> None:
    asyncio.run(asyncpg.connect(url))


@pytest.mark.parametrize(
    "connect",
    [
        psycopg.connect,
        psycopg2.connect,
        of_asyncpg,
        of_sqlalchemy("psycopg"),
        of_sqlalchemy("psycopg2"),
        of_sqlalchemy_and_asyncpg,
    ],
)
def test_a_database_that_refuses_connections_counts_as_away(
    connect: Callable[[str], object],
) -> None:
    with free_ports(1) as [port]:
        pass
    with pytest.raises(Exception) as raised:
        connect(f"postgresql://somebody@127.0.0.1:{port}/nothing")
    assert is_unavailable(raised.value)


@pytest.mark.parametrize("through", ["PyMySQL", "SQLAlchemy"])
def test_a_mariadb_that_refuses_connections_counts_as_away(through: str) -> None:
    with free_ports(1) as [port]:
        pass
    with pytest.raises(Exception) as raised:
        if through == "PyMySQL":
            pymysql.connect(host="127.0.0.1", port=port, user="somebody")
        else:
            create_engine(f"mysql+pymysql://somebody@127.0.0.1:{port}/nothing").connect()
    assert is_unavailable(raised.value)
    assert not is_unavailable(
        pymysql.OperationalError(1213, "a deadlock, which is a failed attempt")
    )


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_database_that_ends_a_connection_counts_as_away(
    driver: str, mortal_postgresql: PrivatePostgreSQL
) -> None:
    url = make_url(mortal_postgresql.url)
    dsn = url.set(drivername="postgresql").render_as_string(hide_password=False)
    connection = {"psycopg": psycopg, "psycopg2": psycopg2}[driver].connect(dsn)
    engine = create_engine(url, isolation_level="AUTOCOMMIT")
    with engine.connect() as admin:
        admin.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE pid <> pg_backend_pid() AND usename = current_user"
            )
        )
    engine.dispose()
    for _ in range(2):
        with pytest.raises(Exception) as raised:
            connection.cursor().execute("SELECT 1")
        assert is_unavailable(raised.value)


def test_a_wrong_statement_is_a_failure_of_the_message(postgresql_url: str) -> None:
    url = make_url(postgresql_url).set(drivername="postgresql")
    for module in (psycopg, psycopg2):
        connection = module.connect(url.render_as_string(hide_password=False))
        with pytest.raises(module.Error) as raised:
            connection.cursor().execute("SELECT nothing")
        assert not is_unavailable(raised.value)
        connection.close()


def test_a_socket_of_the_handler_is_not_taken_for_a_database() -> None:
    with pytest.raises(OSError) as raised:
        raise ConnectionRefusedError
    assert not is_unavailable(raised.value)
