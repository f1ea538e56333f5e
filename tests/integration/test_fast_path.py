"""Which connection the fast path uses, and what it does when it can't publish at once."""

from __future__ import annotations

import contextlib
import datetime
import gc
import logging
import os
import pwd
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, event, make_url, text
from sqlalchemy.exc import IntegrityError, ProgrammingError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import AssertionPool, NullPool, QueuePool, StaticPool

import outbox.sql
from outbox import Publisher, UsageError, auto_publishing, configure, enqueue_event
from outbox.event import make_event
from outbox.serializer import JSONSerializer
from outbox.sql import Store
from outbox.storage.engines import open_engine
from outbox.testing.databases.postgresql import PrivatePostgreSQL
from proving.proxy import FaultProxy
from tests.amqp import Inspector
from tests.conftest import database_of_kind
from tests.databases import Base, Order, targets
from tests.waiting import wait_until


@pytest.fixture(params=["postgresql", "sqlite"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The kinds that differ in what SQLAlchemy does: MariaDB adds nothing."""
    return database_of_kind(request, tmp_path)


@pytest.fixture(autouse=True)
def unbound() -> Iterator[None]:
    yield
    assert outbox.sql.drain()
    outbox.sql.bind(None)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(database_url)
    Base.metadata.create_all(engine)
    outbox.sql.metadata.create_all(engine)
    yield engine
    assert outbox.sql.drain()
    engine.dispose()


def stored(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return targets(connection)


def asynchronous(url: str) -> str:
    return url.replace("+psycopg", "+asyncpg").replace("sqlite:", "sqlite+aiosqlite:")


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


# --------------------------------------------------------------------- the connection's context


@pytest.fixture
def tenants(postgresql_url: str) -> Iterator[Engine]:
    """A database with the table in the schemas ``public``, ``a`` and ``b``."""
    engine = create_engine(postgresql_url)
    with engine.begin() as connection:
        for schema in ("public", "a", "b"):
            connection.execute(text(f"CREATE SCHEMA IF NOT EXISTS {schema}"))
            connection.execute(text(f"SET LOCAL search_path TO {schema}"))
            outbox.sql.metadata.create_all(connection)
    yield engine
    assert outbox.sql.drain()
    engine.dispose()


def rows_of(engine: Engine, schema: str) -> list[str]:
    with engine.connect() as connection:
        found = connection.execute(text(f"SELECT type FROM {schema}.outbox_events ORDER BY seq"))
        return list(found.scalars())


@pytest.mark.parametrize("where", ["engine", "session", "core"])
def test_a_schema_translate_map_is_carried_over(tenants: Engine, where: str) -> None:
    publisher = configure("memory://")
    with Session(tenants) as session:
        enqueue_event(1, "tomorrow", session=session, delay=86400)  # row 1 of public
        session.commit()
    options = {"schema_translate_map": {None: "a"}}
    if where == "core":
        with tenants.connect().execution_options(**options) as connection:
            enqueue_event(1, "a", connection=connection)
            connection.commit()
    else:
        with Session(tenants.execution_options(**options) if where == "engine" else tenants) as s:
            s.connection(execution_options=options)
            enqueue_event(1, "a", session=s)
            s.commit()
    assert outbox.sql.drain()
    wait_until(lambda: rows_of(tenants, "a") == [])
    assert rows_of(tenants, "public") == ["tomorrow"]
    assert publisher.stats().published == 1


@pytest.mark.parametrize("how", ["session", "core"])
def test_a_row_in_another_schema_is_never_taken_for_one_of_the_same_number(
    tenants: Engine, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = configure("memory://")
    for schema in ("public", "b"):
        with Session(tenants.execution_options(schema_translate_map={None: schema})) as session:
            enqueue_event(1, "tomorrow", session=session, delay=86400, id="same")
            session.commit()
    for _ in range(3):
        if how == "session":
            with Session(tenants) as session:
                session.execute(text("SET LOCAL search_path TO a"))
                enqueue_event(1, "a", session=session)
                session.commit()
        else:
            with tenants.begin() as connection:
                connection.execute(text("SET LOCAL search_path TO a"))
                enqueue_event(1, "a", connection=connection)
        assert outbox.sql.drain()
    assert rows_of(tenants, "public") == rows_of(tenants, "b") == ["tomorrow"]
    assert rows_of(tenants, "a") == ["a", "a", "a"]
    assert publisher.stats().published == 0
    [warning] = warnings_of(caplog)
    assert "search_path" in warning
    assert "bind(..., engine=" in warning
    relay = open_engine(tenants.url)  # which connects where the rows are
    event.listen(relay, "begin", lambda c: c.exec_driver_sql("SET LOCAL search_path TO a"))
    assert len(Store(relay).claim(10)) in (0, 1, 2, 3)
    relay.dispose()


def test_what_the_engines_role_may_not_do_is_left_to_the_relay(
    postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = configure("memory://")
    owner = create_engine(postgresql_url)
    outbox.sql.metadata.create_all(owner)
    role = f"writer_{os.getpid()}_{threading.get_native_id()}"
    with owner.begin() as connection:
        for statement in (
            f"CREATE ROLE {role} LOGIN",
            f"GRANT INSERT, SELECT ON outbox_events TO {role}",
            f"GRANT USAGE ON ALL SEQUENCES IN SCHEMA public TO {role}",
        ):
            connection.exec_driver_sql(statement)
    engine = create_engine(make_url(postgresql_url).set(username=role))
    for _ in range(3):
        with Session(engine) as session:
            enqueue_event(1, "a", session=session)
            session.commit()
        assert outbox.sql.drain()
    assert publisher.stats().published == 0
    [warning] = warnings_of(caplog)
    assert "permission denied" in warning
    outbox.sql.bind(None, engine=owner)
    with Session(engine) as session:
        enqueue_event(1, "b", session=session)
        session.commit()
    assert outbox.sql.drain()
    assert stored(owner) == ["a", "a", "a"]
    engine.dispose()
    with owner.begin() as connection:
        connection.exec_driver_sql(f"DROP OWNED BY {role}")
        connection.exec_driver_sql(f"DROP ROLE {role}")
    owner.dispose()


def test_rows_are_found_where_the_engines_listeners_look(tenants: Engine) -> None:
    publisher = configure("memory://")
    engine = create_engine(tenants.url)

    @event.listens_for(engine, "begin")
    def choose(connection: Connection) -> None:
        connection.exec_driver_sql("SET LOCAL search_path TO b")

    for _ in range(2):
        with Session(engine) as session:
            enqueue_event(1, "b", session=session)
            session.commit()
        assert outbox.sql.drain()
    assert rows_of(tenants, "b") == []
    assert publisher.stats().published == 2
    engine.dispose()


def test_the_engine_that_the_application_names_is_used(
    tenants: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = configure("memory://")
    named = create_engine(tenants.url, connect_args={"options": "-c search_path=a"})
    outbox.sql.bind(None, engine=named)
    with Session(tenants) as session:
        session.execute(text("SET LOCAL search_path TO a"))
        enqueue_event(1, "a", session=session)
        session.commit()
    assert outbox.sql.drain()
    assert rows_of(tenants, "a") == []
    assert publisher.stats().published == 1
    assert warnings_of(caplog) == []
    named.dispose()


def test_only_an_engine_can_be_named() -> None:
    with pytest.raises(UsageError, match="needs an SQLAlchemy engine"):
        outbox.sql.bind(None, engine="postgresql://")


@pytest.fixture(scope="module")
def encrypted() -> Iterator[tuple[PrivatePostgreSQL, Path]]:
    """A server that speaks TLS, and its certificate."""
    with PrivatePostgreSQL() as server:
        assert server._folder is not None
        data = server._folder / "data"
        subprocess.run(
            [
                "openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2",
                "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
                "-keyout", data / "server.key", "-out", data / "server.crt",
            ],
            check=True, capture_output=True,
        )  # fmt: skip
        for file in ("server.key", "server.crt"):
            if os.geteuid() == 0:
                owner = pwd.getpwnam("postgres")
                os.chown(data / file, owner.pw_uid, owner.pw_gid)
            (data / file).chmod(0o600)
        with (data / "postgresql.conf").open("a") as config:
            config.write("\nssl = on\n")
        server.restart()
        yield server, data / "server.crt"


@pytest.mark.asyncio
@pytest.mark.parametrize("how", ["query", "connect_args", "async_creator", "do_connect"])
async def test_an_asyncio_engine_is_connected_to_as_the_application_does(
    encrypted: tuple[PrivatePostgreSQL, Path], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    server, certificate = encrypted
    url = make_url(asynchronous(server.url))
    context = ssl.create_default_context(cafile=str(certificate))
    connections: list[str] = []
    options: dict[str, Any] = {}
    if how == "query":
        url = url.update_query_dict({"ssl": "require"})
    elif how == "connect_args":
        options["connect_args"] = {"ssl": context}
    elif how == "async_creator":
        import asyncpg  # type: ignore[import-untyped]

        async def connect() -> Any:
            connections.append(threading.current_thread().name)
            return await asyncpg.connect(
                host=url.host, port=url.port, user="postgres", database="postgres", ssl=context
            )

        options["async_creator"] = connect
    engine = create_async_engine(url, **options)
    if how == "do_connect":

        @event.listens_for(engine.sync_engine, "do_connect")
        def encrypt(_: Any, __: Any, ___: Any, parameters: dict[str, Any]) -> None:
            parameters["ssl"] = context

    seen: list[Any] = []

    @event.listens_for(engine.sync_engine, "begin")
    def note(connection: Connection) -> None:
        found = connection.exec_driver_sql(
            "SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        )
        seen.append((threading.current_thread().name, found.scalar()))

    async with engine.begin() as connection:
        await connection.run_sync(outbox.sql.metadata.create_all)
    publisher = configure("memory://")
    async with AsyncSession(engine) as session:
        enqueue_event(1, "a", session=session)
        await session.commit()
    assert outbox.sql.drain()
    async with engine.connect() as connection:
        assert await connection.run_sync(targets) == []
    assert publisher.stats().published == 1
    assert warnings_of(caplog) == []
    assert ("outbox-handover", True) in seen
    assert {encrypted for _, encrypted in seen} == {True}
    await engine.dispose()


@pytest.mark.asyncio
async def test_a_server_that_the_application_refuses_is_refused(
    encrypted: tuple[PrivatePostgreSQL, Path], caplog: pytest.LogCaptureFixture
) -> None:
    server, _ = encrypted
    publisher = configure("memory://")
    plain = create_async_engine(asynchronous(server.url))
    untrusting = create_async_engine(
        asynchronous(server.url), connect_args={"ssl": ssl.create_default_context()}
    )
    async with plain.begin() as connection:
        await connection.run_sync(outbox.sql.metadata.create_all)
        await connection.run_sync(lambda c: c.execute(outbox.sql.events.delete()))
    outbox.sql.bind(None, engine=untrusting)
    async with AsyncSession(plain) as session:
        enqueue_event(1, "a", session=session)
        await session.commit()
    assert outbox.sql.drain()
    assert publisher.stats().published == 0
    publisher.close()
    async with plain.connect() as connection:
        assert await connection.run_sync(targets) == ["a"]
        await connection.execute(outbox.sql.events.delete())
        await connection.commit()
    assert "CERTIFICATE_VERIFY_FAILED" in caplog.text
    await plain.dispose()
    await untrusting.dispose()


@pytest.mark.asyncio
async def test_a_connection_of_another_event_loop_is_refused_once(
    postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    import asyncio

    import asyncpg

    url = make_url(asynchronous(postgresql_url))
    loop_lock = asyncio.Lock()
    loop = asyncio.get_running_loop()

    async def connect() -> Any:
        if asyncio.get_running_loop() is not loop:
            raise RuntimeError("attached to a different loop")
        async with loop_lock:
            return await asyncpg.connect(
                host=url.host, port=url.port, user="postgres", database=url.database
            )

    engine = create_async_engine(url, async_creator=connect)
    async with engine.begin() as connection:
        await connection.run_sync(outbox.sql.metadata.create_all)
    publisher = configure("memory://")
    for _ in range(3):
        async with AsyncSession(engine) as session:
            enqueue_event(1, "a", session=session)
            await session.commit()
        assert outbox.sql.drain()
    [warning] = warnings_of(caplog)
    assert "different loop" in warning
    assert "bind(..., engine=" in warning
    assert publisher.stats().published == 0
    named = create_engine(postgresql_url)
    outbox.sql.bind(None, engine=named)
    async with AsyncSession(engine) as session:
        enqueue_event(1, "b", session=session)
        await session.commit()
    assert outbox.sql.drain()
    async with engine.connect() as connection:
        assert await connection.run_sync(targets) == ["a", "a", "a"]
    await engine.dispose()
    named.dispose()


# -------------------------------------------------------------------------------------- pools


@pytest.mark.parametrize("pool", [NullPool, QueuePool])
def test_pools_with_a_connection_for_each_user(database_url: str, pool: Any) -> None:
    options = {"pool_size": 1, "max_overflow": 0} if pool is QueuePool else {}
    engine = create_engine(database_url, poolclass=pool, pool_pre_ping=True, **options)
    outbox.sql.metadata.create_all(engine)
    publisher = configure("memory://")
    for _ in range(3):
        with Session(engine) as session:
            enqueue_event(1, "a", session=session)
            session.commit()
    assert outbox.sql.drain()
    assert stored(engine) == []
    assert publisher.stats().published == 3
    engine.dispose()


def test_a_lock_that_an_interrupted_thread_has_left_taken_stops_nothing(engine: Engine) -> None:
    publisher = configure("memory://")
    engine.connect().close()
    pool: Any = engine.pool
    with pool._pool.mutex:  # re-entrant, so this thread goes on
        with Session(engine) as session:
            enqueue_event(1, "a", session=session)
            session.commit()
        assert outbox.sql.drain()
        assert publisher.stats().published == 1


@pytest.mark.parametrize("pool", [StaticPool, AssertionPool])
def test_a_pool_with_one_connection_is_left_alone(
    database_url: str, pool: Any, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"connect_args": {"check_same_thread": False}} if "sqlite" in database_url else {}
    engine = create_engine(database_url, poolclass=pool, **options)
    Base.metadata.create_all(engine)
    outbox.sql.metadata.create_all(engine)
    publisher = configure("memory://")
    for _ in range(2):
        with Session(engine) as session:
            enqueue_event(1, "a", session=session)
            session.commit()
            session.add(Order(name="rolled back"))
            session.flush()
            assert outbox.sql.drain()
            time.sleep(0.05)
            session.rollback()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM orders")).scalar() == 0
    assert len(Store(engine).claim(10)) == 2 or "sqlite" in database_url  # due for relays at once
    assert publisher.stats().published == 0
    [warning] = warnings_of(caplog)
    assert pool.__name__ in warning
    engine.dispose()


def test_a_database_in_memory_is_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    engine = create_engine("sqlite://")
    outbox.sql.metadata.create_all(engine)
    configure("memory://")
    for _ in range(2):
        with Session(engine) as session:
            enqueue_event(1, "a", session=session)
            session.commit()
    assert outbox.sql.drain()
    assert stored(engine) == ["a", "a"]
    assert len(warnings_of(caplog)) == 1
    engine.dispose()


# -------------------------------------------------------------------- the application's own file


def begins_with(engine: Engine, statement: str, *, wal: bool = False) -> None:
    @event.listens_for(engine, "connect")
    def leave_alone(connection: Any, _: object) -> None:
        connection.isolation_level = None
        if wal:
            connection.execute("PRAGMA journal_mode=WAL")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(statement)


@pytest.mark.parametrize(
    ("begin", "wal"),
    [(None, False), ("BEGIN IMMEDIATE", False), ("BEGIN IMMEDIATE", True), ("BEGIN", False),
     ("BEGIN", True), ("BEGIN DEFERRED", False)],
)  # fmt: skip
def test_the_application_never_fails_because_of_the_second_writer(
    tmp_path: Path, begin: str | None, wal: bool, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/shop.db")
    if begin is not None:
        begins_with(engine, begin, wal=wal)
    Base.metadata.create_all(engine)
    outbox.sql.metadata.create_all(engine)
    publisher = configure("memory://")
    for n in range(100):
        with Session(engine) as session:
            session.execute(text("SELECT * FROM orders LIMIT 5")).all()  # reads before it writes
            time.sleep(0.002)
            session.add(Order(name=str(n)))
            enqueue_event(n, "placed", session=session)
            session.commit()
    assert outbox.sql.drain()
    if begin in (None, "BEGIN IMMEDIATE"):
        assert publisher.stats().published == 100
        assert warnings_of(caplog) == []
    else:
        assert publisher.stats().published == 0
        [warning] = warnings_of(caplog)
        assert "BEGIN IMMEDIATE" in warning
    engine.dispose()


def test_connections_that_do_not_wait_for_the_lock_are_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/shop.db", connect_args={"timeout": 0})
    outbox.sql.metadata.create_all(engine)
    configure("memory://")
    with Session(engine) as session:
        enqueue_event(1, "a", session=session)
        session.commit()
    assert outbox.sql.drain()
    assert stored(engine) == ["a"]
    [warning] = warnings_of(caplog)
    assert "timeout" in warning
    engine.dispose()


def test_connections_that_keep_the_file_to_themselves_are_left_alone(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/shop.db", poolclass=NullPool)

    @event.listens_for(engine, "connect")
    def keep(connection: Any, _: object) -> None:
        connection.execute("PRAGMA locking_mode=EXCLUSIVE")

    outbox.sql.metadata.create_all(engine)
    configure("memory://")
    with Session(engine) as session:
        enqueue_event(1, "a", session=session)
        session.commit()
    assert outbox.sql.drain()
    assert stored(engine) == ["a"]
    [warning] = warnings_of(caplog)
    assert "locking_mode=EXCLUSIVE" in warning


def test_an_sqlite_file_is_opened_as_the_application_opens_it(tmp_path: Path) -> None:
    opened: list[str] = []
    engine = create_engine(f"sqlite:///file:{tmp_path}/shop.db?uri=true")

    @event.listens_for(engine, "connect")
    def attach(connection: Any, _: object) -> None:
        opened.append(threading.current_thread().name)
        connection.execute(f"ATTACH '{tmp_path}/events.db' AS attached")

    engine = engine.execution_options(schema_translate_map={None: "attached"})
    outbox.sql.metadata.create_all(engine)
    publisher = configure("memory://")
    with Session(engine) as session:
        enqueue_event(1, "a", session=session)
        session.commit()
    assert outbox.sql.drain()
    assert publisher.stats().published == 1
    assert "outbox-handover" in opened
    engine.dispose()


@pytest.mark.asyncio
async def test_an_asyncio_engine_of_an_sqlite_file(tmp_path: Path) -> None:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/shop.db")
    async with engine.begin() as connection:
        await connection.run_sync(outbox.sql.metadata.create_all)
    publisher = configure("memory://")
    for _ in range(3):
        async with AsyncSession(engine) as session:
            enqueue_event(1, "a", session=session)
            await session.commit()
        async with engine.begin() as connection:
            await connection.run_sync(lambda c: enqueue_event(1, "b", connection=c))
    assert outbox.sql.drain()
    assert publisher.stats().published == 6
    await engine.dispose()


# -------------------------------------------------------------------------- Core connections


def test_events_of_a_connection_are_published_after_its_commit(engine: Engine) -> None:
    publisher = configure("memory://")
    connection = engine.connect()
    for n in range(3):  # without closing it
        enqueue_event(n, "a", connection=connection)
        with contextlib.suppress(RuntimeError), connection.begin_nested():
            enqueue_event(n, "lost", connection=connection)
            raise RuntimeError
        with connection.begin_nested():
            enqueue_event(n, "b", connection=connection)
        time.sleep(0.02)
        assert publisher.stats().published == 2 * n
        connection.commit()
        assert outbox.sql.drain()
        assert publisher.stats().published == 2 * n + 2
    enqueue_event(3, "lost", connection=connection)
    connection.rollback()
    connection.commit()
    connection.close()
    assert outbox.sql.drain()
    assert publisher.stats().published == 6
    assert stored(engine) == []


def test_rolled_back_events_are_not_looked_for_after_the_next_commit(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = configure("memory://")
    with engine.connect() as connection:
        for n in range(5):
            enqueue_event(n, "rolled.back", connection=connection)
            connection.rollback()
            enqueue_event(n, "kept", connection=connection)
            connection.commit()
    assert outbox.sql.drain()
    assert publisher.stats().published == 5
    assert warnings_of(caplog) == []


def test_a_commit_that_fails_is_not_taken_for_rows_that_cannot_be_seen(
    postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = configure("memory://")
    engine = create_engine(postgresql_url)
    Base.metadata.create_all(engine)
    outbox.sql.metadata.create_all(engine)
    with pytest.raises(IntegrityError), engine.begin() as connection:
        connection.execute(text("INSERT INTO lines VALUES (1, 999)"))
        enqueue_event(1, "lost", connection=connection)
    with engine.connect() as connection:
        enqueue_event(1, "lost", connection=connection)
        with pytest.raises(ProgrammingError):
            connection.execute(text("SELECT * FROM missing"))
        connection.commit()  # to PostgreSQL it is a rollback
    assert outbox.sql.drain()
    assert publisher.stats().published == 0
    assert warnings_of(caplog) == []
    engine.dispose()


# ------------------------------------------------------------- commits whose end is not noticed


@pytest.mark.parametrize("end", ["close", "rollback"])
@pytest.mark.parametrize("succeeds", [True, False])
def test_a_commit_that_is_interrupted_may_have_succeeded(
    engine: Engine, end: str, succeeds: bool, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    publisher = configure("memory://")
    commit = engine.dialect.do_commit

    def interrupted(connection: Any) -> None:
        if succeeds:
            commit(connection)
        raise KeyboardInterrupt

    with Session(engine) as session:
        enqueue_event(1, "a", session=session)
        with contextlib.suppress(RuntimeError), session.begin_nested():
            enqueue_event(1, "lost", session=session)
            session.flush()
            raise RuntimeError
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(engine.dialect, "do_commit", interrupted)
            session.commit()
        if end == "rollback":
            session.rollback()
    assert outbox.sql.drain()
    assert publisher.stats().published == succeeds
    assert stored(engine) == []
    assert warnings_of(caplog) == []


def test_an_error_of_the_applications_listener_leaves_no_event_behind(engine: Engine) -> None:
    publisher = configure("memory://")

    def fail(_: Session) -> None:
        raise RuntimeError

    event.listen(Session, "after_commit", fail, insert=True)
    try:
        with pytest.raises(RuntimeError), Session(engine) as session:
            enqueue_event(1, "a", session=session)
            session.commit()
    finally:
        event.remove(Session, "after_commit", fail)
    assert outbox.sql.drain()
    assert publisher.stats().published == 1


@pytest.mark.parametrize("mode", ["create_savepoint", "rollback_only", "control_fully"])
def test_events_of_a_session_on_a_connection_are_published_after_the_commit_of_that(
    engine: Engine, mode: Any
) -> None:
    publisher = configure("memory://")
    with engine.connect() as connection:
        transaction = connection.begin()
        with Session(connection, join_transaction_mode=mode) as session:
            enqueue_event(1, "a", session=session)
            session.commit()
        if mode != "control_fully":
            time.sleep(0.05)
            assert publisher.stats().published == 0
            transaction.commit()
    assert outbox.sql.drain()
    assert publisher.stats().published == 1
    assert stored(engine) == []


def test_events_of_a_two_phase_transaction(postgresql_url: str) -> None:
    publisher = configure("memory://")
    engine = create_engine(postgresql_url)
    outbox.sql.metadata.create_all(engine)
    with engine.connect() as connection:
        transaction = connection.begin_twophase()
        enqueue_event(1, "core", connection=connection)
        transaction.prepare()
        transaction.commit()
    with Session(engine, twophase=True) as session:
        enqueue_event(1, "session", session=session)
        session.commit()
    assert outbox.sql.drain()
    assert publisher.stats().published == 2
    assert stored(engine) == []
    engine.dispose()


def test_a_commit_that_takes_long_is_waited_for(postgresql_url: str) -> None:
    publisher = configure("memory://")
    engine = create_engine(postgresql_url)
    outbox.sql.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "CREATE FUNCTION slow() RETURNS trigger AS 'BEGIN PERFORM pg_sleep(0.5); RETURN NULL; "
            "END' LANGUAGE plpgsql"
        )
        connection.exec_driver_sql("CREATE TABLE t (n int)")
        connection.exec_driver_sql(
            "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON t DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION slow()"
        )
    with engine.begin() as connection:
        connection.exec_driver_sql("INSERT INTO t VALUES (1)")
        enqueue_event(1, "a", connection=connection)
    assert outbox.sql.drain()
    assert publisher.stats().published == 1
    engine.dispose()


# --------------------------------------------------------------------------------- tried again


def test_what_waited_for_the_broker_is_published_when_it_is_back(
    engine: Engine, proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    proxy.refuse()
    configure(proxy.url, exchange=name, connect_timeout=1, timeout=1)
    for n in range(5):
        with Session(engine) as session:
            enqueue_event(n, "a", session=session, key="k")
            session.commit()
    assert outbox.sql.drain(20)
    assert len(stored(engine)) == 5
    proxy.heal()
    wait_until(lambda: stored(engine) == [], 60)
    assert [each.payload for each in inspector.messages(name, 5)] == [0, 1, 2, 3, 4]


def test_what_waited_for_the_database_is_published_when_it_works_again(
    postgresql_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = configure("memory://")
    engine = create_engine(postgresql_url)
    outbox.sql.metadata.create_all(engine)
    broken = [True]

    @event.listens_for(engine, "before_cursor_execute")
    def fail(_: Any, __: Any, statement: str, *___: Any) -> None:
        if broken[0] and threading.current_thread().name == "outbox-handover":
            from sqlalchemy.exc import OperationalError

            raise OperationalError(statement, {}, Exception("the server is starting up"))

    for n in range(3):
        with Session(engine) as session:
            enqueue_event(n, "a", session=session)
            session.commit()
        assert outbox.sql.drain()
    assert publisher.stats().published == 0
    broken[0] = False
    wait_until(lambda: stored(engine) == [])
    assert publisher.stats().published == 3
    assert len(warnings_of(caplog)) == 1
    engine.dispose()


def test_a_row_behind_another_of_its_key_is_published_when_that_is_gone(engine: Engine) -> None:
    publisher = configure("memory://")
    store = Store(open_engine(engine.url))
    outbox.configuration._publisher = None
    with Session(engine) as session:
        enqueue_event(1, "first", session=session, key="k")
        session.commit()
    [first] = store.claim(1)  # a relay is publishing it
    outbox.configuration._publisher = publisher
    with Session(engine) as session:
        enqueue_event(2, "second", session=session, key="k")
        enqueue_event(3, "free", session=session)
        session.commit()
    assert outbox.sql.drain()
    assert stored(engine) == ["first", "second"]
    store.complete([first])
    wait_until(lambda: stored(engine) == [])
    assert publisher.stats().published == 2
    store.engine.dispose()


def test_a_confirmed_row_whose_deletion_failed_is_not_published_again(postgresql_url: str) -> None:
    publisher = configure("memory://")
    engine = create_engine(postgresql_url)
    outbox.sql.metadata.create_all(engine)
    failures = [1, 1]

    @event.listens_for(engine, "before_cursor_execute")
    def fail(_: Any, __: Any, statement: str, *___: Any) -> None:
        if statement.startswith("DELETE") and failures:
            from sqlalchemy.exc import OperationalError

            failures.pop()
            raise OperationalError(statement, {}, Exception("the connection was lost"))

    with Session(engine) as session:
        enqueue_event(1, "a", session=session)
        session.commit()
    wait_until(lambda: stored(engine) == [])
    assert publisher.stats().published == 1
    engine.dispose()


def test_what_is_left_moves_to_the_publisher_that_replaces_the_first(engine: Engine) -> None:
    configure("amqp://127.0.0.1:1/", connect_timeout=1, timeout=1)
    with Session(engine) as session:
        enqueue_event(1, "a", session=session)
        session.commit()
    assert outbox.sql.drain(20)
    publisher = configure("memory://")
    wait_until(lambda: publisher.stats().published == 1)
    wait_until(lambda: stored(engine) == [])


def test_a_publisher_that_is_closed_ends_the_attempts(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    publisher = configure("amqp://127.0.0.1:1/", connect_timeout=1, timeout=1)
    with Session(engine) as session:
        enqueue_event(1, "a", session=session)
        session.commit()
    assert outbox.sql.drain(20)
    publisher.close(0)
    wait_until(lambda: not any(each.name == "outbox-handover" for each in threading.enumerate()), 5)
    assert "the publisher is closed" in caplog.text
    assert stored(engine) == ["a"]


@pytest.mark.slow
def test_a_publisher_that_is_forgotten_after_the_commit_publishes(engine: Engine) -> None:
    def store() -> None:
        publisher = Publisher("memory://")
        with auto_publishing(publisher=publisher), Session(engine) as session:
            enqueue_event(1, "a", session=session)
            session.commit()

    for _ in range(5):
        store()
        gc.collect()
    wait_until(lambda: stored(engine) == [])


def test_drain_tries_again_what_is_left(engine: Engine) -> None:
    publisher = configure("memory://")
    store = Store(open_engine(engine.url))
    store.put([make_event(JSONSerializer(), 1000, None, 1, "first", "shop", key="k")])
    [first] = store.claim(1)  # a relay is publishing it
    with Session(engine) as session:
        enqueue_event(2, "second", session=session, key="k")
        session.commit()
    for _ in range(5):  # each failure makes the pause longer
        assert outbox.sql.drain()
    assert publisher.stats().published == 0
    store.complete([first])
    assert outbox.sql.drain()
    assert publisher.stats().published == 1
    store.engine.dispose()


def test_a_process_with_too_many_threads_publishes_later(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher = configure("memory://")

    def start(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch, Session(engine) as session:
        patch.setattr(threading.Thread, "start", start)
        enqueue_event(1, "a", session=session)
        session.commit()
    assert publisher.stats().published == 0
    with Session(engine) as session:
        enqueue_event(2, "b", session=session)
        session.commit()
    assert outbox.sql.drain()
    assert publisher.stats().published == 2
    assert stored(engine) == []


def test_a_limited_number_of_rows_is_remembered(
    engine: Engine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(outbox.sql.handover, "_MOST_LEFT", 3)
    configure("amqp://127.0.0.1:1/", connect_timeout=1, timeout=1)
    for n in range(6):
        with Session(engine) as session:
            enqueue_event(n, "a", session=session)
            session.commit()
        assert outbox.sql.drain(20)
    publisher = configure("memory://")
    wait_until(lambda: publisher.stats().published == 3)
    assert outbox.sql.drain()
    assert len(stored(engine)) == 3  # for a relay
    assert len([each for each in warnings_of(caplog) if "too many" in each]) == 1


def test_the_rows_of_a_killed_process_are_due_for_a_relay_after_ten_seconds(
    postgresql_url: str, amqp_url: str, name: str
) -> None:
    """The fast path's lease is short, and renewed while the broker takes its time."""
    code = f"""
import os, signal
import outbox.sql
from outbox import configure, enqueue_event
from outbox.sql import Store
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
engine = create_engine({postgresql_url!r})
outbox.sql.metadata.create_all(engine)
claim = Store.claim
def claim_and_die(*args, **options):
    claim(*args, **options)
    os.kill(os.getpid(), signal.SIGKILL)
Store.claim = claim_and_die
configure({amqp_url!r}, exchange={name!r})
with Session(engine) as session:
    enqueue_event(1, "a", session=session)
    session.commit()
outbox.sql.drain()
"""
    subprocess.run([sys.executable, "-c", code], timeout=30, check=False)
    engine = create_engine(postgresql_url)
    with engine.connect() as connection:
        [due] = connection.execute(
            text("SELECT extract(epoch FROM available_at - now()) FROM outbox_events")
        ).scalars()
    assert datetime.timedelta(seconds=float(due)) < datetime.timedelta(seconds=10)
    engine.dispose()


@pytest.mark.slow
def test_a_lease_is_renewed_while_the_broker_takes_its_time(
    postgresql_url: str, monkeypatch: pytest.MonkeyPatch, amqp_url: str, name: str
) -> None:
    monkeypatch.setattr(outbox.sql.handover, "_LEASE", 1.0)
    engine = create_engine(postgresql_url)
    outbox.sql.metadata.create_all(engine)
    store = Store(engine)
    with FaultProxy(amqp_url) as proxy, Publisher(proxy.url, exchange=name) as publisher:
        monkeypatch.setattr(outbox.configuration, "_publisher", publisher)
        with auto_publishing():
            enqueue_event(0, "warm.up")
        proxy.black_hole()
        with Session(engine) as session:
            enqueue_event(1, "a", session=session)
            session.commit()
        time.sleep(3)
        assert store.claim(1) == []
        proxy.heal()
        assert outbox.sql.drain(20)
    assert stored(engine) == []
    engine.dispose()
