"""How each driver reports a database that is away, which is not the message's failure."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import asyncpg  # type: ignore[import-untyped]
import psycopg
import psycopg2  # type: ignore[import-untyped]
import pymysql
import pytest
from sqlalchemy import create_engine, make_url, text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.pool import NullPool

from outbox.consumers.message.databases import could_only_read, is_conflict, is_unavailable
from outbox.testing.databases.postgresql import PrivatePostgreSQL
from outbox.testing.servers import free_ports
from tests.databases import failing_over


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
    assert not is_unavailable(
        pymysql.OperationalError(1290, "running with the --secure-file-priv option")
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


def of_sqlalchemy_and_psycopg(url: str) -> None:
    engine = create_engine(url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE new (number INTEGER)")


def of_psycopg(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE new (number INTEGER)")


def of_psycopg2(url: str) -> None:
    with contextlib.closing(psycopg2.connect(url)) as connection, connection.cursor() as cursor:
        cursor.execute("CREATE TABLE new (number INTEGER)")


def writing_of_asyncpg(url: str) -> None:
    async def write() -> None:
        connection = await asyncpg.connect(url)
        try:
            await connection.execute("CREATE TABLE new (number INTEGER)")
        finally:
            await connection.close()

    asyncio.run(write())


def writing_of_sqlalchemy_and_asyncpg(url: str) -> None:
    async def write() -> None:
        engine = create_async_engine(make_url(url).set(drivername="postgresql+asyncpg"))
        try:
            async with engine.begin() as connection:
                await connection.exec_driver_sql("CREATE TABLE new (number INTEGER)")
        finally:
            await engine.dispose()

    asyncio.run(write())


@pytest.mark.parametrize(
    "write",
    [
        of_psycopg,
        of_psycopg2,
        writing_of_asyncpg,
        of_sqlalchemy_and_psycopg,
        writing_of_sqlalchemy_and_asyncpg,
    ],
)
def test_a_postgresql_that_has_become_read_only_counts_as_away(
    write: Callable[[str], None], postgresql_url: str
) -> None:
    url = make_url(postgresql_url)
    if "sqlalchemy" not in write.__name__:
        url = url.set(drivername="postgresql")
    with failing_over(postgresql_url) as failover:
        failover.set_read_only(True)
        with pytest.raises(Exception) as raised:
            write(url.render_as_string(hide_password=False))
    assert is_unavailable(raised.value)
    assert could_only_read(raised.value)
    assert not is_conflict(raised.value)


@pytest.mark.parametrize("through", ["driver", "SQLAlchemy"])
def test_a_mariadb_that_has_become_read_only_counts_as_away(through: str, mariadb_url: str) -> None:
    with failing_over(mariadb_url) as failover:
        engine = create_engine(failover.url, poolclass=NullPool)
        failover.set_read_only(True)
        with pytest.raises(Exception) as raised, engine.begin() as connection:
            connection.exec_driver_sql("CREATE TABLE new (number INTEGER)")
    error = raised.value.orig if through == "driver" else raised.value  # type: ignore[attr-defined]
    assert is_unavailable(error)
    assert not could_only_read(error)  # MariaDB says that it is the server's mode


def test_a_read_only_transaction_on_mariadb_is_a_failure_of_the_message(mariadb_url: str) -> None:
    engine = create_engine(mariadb_url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE some (number INTEGER)")
        connection.exec_driver_sql("START TRANSACTION READ ONLY")
        with pytest.raises(OperationalError) as raised:
            connection.exec_driver_sql("INSERT INTO some VALUES (1)")
    assert not is_unavailable(raised.value)


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
