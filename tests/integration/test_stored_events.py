"""Events stored in the application's own transaction, on PostgreSQL and SQLite."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, make_url, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, PendingRollbackError
from sqlalchemy.ext.asyncio import (
    AsyncSession,
    async_scoped_session,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import outbox.sql
from outbox import (
    EventCollector,
    InvalidEvent,
    Publisher,
    UsageError,
    auto_publishing,
    clear_events,
    configure,
    enqueue_event,
)
from outbox.sql import Store
from outbox.storage.engines import open_engine
from outbox.tasks import NoResults, TaskHandle
from outbox.unit_of_work.collector import EventOptions
from tests import shipping
from tests.amqp import Inspector
from tests.databases import Base, Line, Order, targets

pytestmark = pytest.mark.usefixtures("unbound")


@pytest.fixture
def unbound() -> Iterator[None]:
    yield
    outbox.sql.bind(None)


def correct_savepoints(engine: Engine) -> None:
    """Have SQLite's driver leave transactions to SQLAlchemy, as its documentation advises.

    They take the lock when they begin, so that another writer can't make them fail.
    """

    @event.listens_for(engine, "connect")
    def leave_alone(connection: Any, _: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA foreign_keys=ON")

    @event.listens_for(engine, "begin")
    def begin(connection: Any) -> None:
        connection.exec_driver_sql("BEGIN IMMEDIATE")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    found = create_engine(database_url)
    if found.dialect.name == "sqlite":
        correct_savepoints(found)
    Base.metadata.create_all(found)
    outbox.sql.metadata.create_all(found)
    yield found
    assert outbox.sql.drain()
    found.dispose()


@pytest.fixture
def sessions(engine: Engine) -> sessionmaker[Session]:
    return sessionmaker(engine)


@pytest.fixture
def stored(engine: Engine) -> Any:
    """Return a function that returns the targets of what is committed."""

    def found() -> list[str]:
        with engine.connect() as connection:
            return targets(connection)

    return found


# --------------------------------------------------------------------------- in a transaction


def test_an_event_is_stored_with_its_transaction_and_not_collected(
    sessions: sessionmaker[Session], stored: Any
) -> None:
    with sessions() as session:
        session.add(Order(name="a"))
        found = enqueue_event({"n": 1}, "order.placed", session=session, key="7")
        assert len(EventCollector.current()) == 0
        assert stored() == []
        session.commit()
    assert stored() == ["order.placed"]
    assert found.exchange == "outbox"


def test_a_rollback_takes_a_stored_event_back(sessions: sessionmaker[Session], stored: Any) -> None:
    with sessions() as session:
        enqueue_event(1, "a", session=session)
        session.flush()
        session.rollback()
        enqueue_event(2, "b", session=session)
        session.commit()
    assert stored() == ["b"]


@pytest.mark.hazard("F2")
def test_closing_without_a_commit_takes_a_stored_event_back(
    sessions: sessionmaker[Session], stored: Any
) -> None:
    session = sessions()
    enqueue_event(1, "lost", session=session)
    session.flush()
    session.close()
    enqueue_event(2, "unflushed", session=session)
    session.close()
    session.add(Order(name="reused"))
    enqueue_event(3, "kept", session=session)
    session.commit()
    session.close()
    assert stored() == ["kept"]


@pytest.mark.hazard("F6")
def test_a_savepoint_takes_back_only_its_own_events(
    sessions: sessionmaker[Session], stored: Any
) -> None:
    with sessions() as session:
        session.add(Order(name="a"))
        enqueue_event(1, "outer", session=session)
        with contextlib.suppress(RuntimeError), session.begin_nested():
            enqueue_event(2, "inner.lost", session=session)
            raise RuntimeError
        with session.begin_nested():
            enqueue_event(3, "inner.kept", session=session)
        session.commit()
    assert stored() == ["outer", "inner.kept"]


@pytest.mark.hazard("F1")
def test_a_released_savepoint_is_undone_by_the_outer_rollback(
    sessions: sessionmaker[Session], stored: Any
) -> None:
    with sessions() as session:
        with session.begin_nested():
            enqueue_event(1, "a", session=session)
        session.rollback()
    assert stored() == []


@pytest.mark.hazard("F5")
def test_an_outer_event_survives_a_savepoint_that_is_rolled_back_around_a_released_one(
    sessions: sessionmaker[Session], stored: Any
) -> None:
    with sessions() as session:
        session.add(Order(name="a"))
        enqueue_event(1, "outer", session=session)
        outer = session.begin_nested()
        with session.begin_nested():
            enqueue_event(2, "innermost", session=session)
        outer.rollback()
        session.commit()
    assert stored() == ["outer"]


@pytest.mark.hazard("F3")
def test_a_commit_that_fails_stores_nothing_and_leaves_the_next_transaction_clean(
    sessions: sessionmaker[Session], stored: Any
) -> None:
    with sessions() as session:
        session.add(Line(order_id=404))
        enqueue_event(1, "never", session=session)
        with pytest.raises(IntegrityError):
            session.commit()
        session.rollback()
        enqueue_event(2, "next", session=session)
        session.commit()
    assert stored() == ["next"]


@pytest.mark.hazard("F4")
def test_a_swallowed_database_error_stores_nothing_on_postgresql(postgresql_url: str) -> None:
    engine = create_engine(postgresql_url)
    outbox.sql.metadata.create_all(engine)
    with Session(engine) as session:
        enqueue_event(1, "never", session=session)
        session.flush()
        connection = session.connection()
        with contextlib.suppress(DBAPIError):
            connection.exec_driver_sql("SELECT nonsense")
        session.commit()  # PostgreSQL rolls back, and says nothing
    with engine.connect() as connection:
        assert targets(connection) == []
    engine.dispose()


@pytest.mark.hazard("D3", "F10")
def test_several_transactions_of_one_request_decide_separately(
    sessions: sessionmaker[Session], stored: Any
) -> None:
    with sessions() as session:
        enqueue_event(1, "first", session=session)
        session.commit()
        enqueue_event(2, "second", session=session)
        session.rollback()
        enqueue_event(3, "third", session=session)
        session.commit()
    assert stored() == ["first", "third"]


@pytest.mark.hazard("F8")
def test_two_concurrent_sessions_do_not_mix(
    postgresql_url: str,
) -> None:
    engine = create_engine(postgresql_url)
    outbox.sql.metadata.create_all(engine)
    with Session(engine) as main, Session(engine) as audit:
        enqueue_event(1, "main", session=main)
        enqueue_event(2, "audit", session=audit)
        audit.commit()
        main.rollback()
    with engine.connect() as connection:
        assert targets(connection) == ["audit"]
    engine.dispose()


def test_ten_events_of_a_transaction_are_one_statement_on_postgresql(postgresql_url: str) -> None:
    engine = create_engine(postgresql_url)
    outbox.sql.metadata.create_all(engine)
    statements: list[str] = []

    @event.listens_for(engine, "before_cursor_execute")
    def note(_: Any, __: Any, statement: str, *___: Any) -> None:
        statements.append(statement)

    configure("memory://")
    with Session(engine) as session:
        for n in range(10):
            enqueue_event(n, "a", session=session)
        session.flush()
        session.rollback()
    assert len([one for one in statements if "INSERT" in one]) == 1
    engine.dispose()


def test_an_invalid_event_is_refused_before_it_reaches_the_transaction(
    sessions: sessionmaker[Session], stored: Any
) -> None:
    with sessions() as session:
        session.add(Order(name="a"))
        with pytest.raises(InvalidEvent):
            enqueue_event(float("nan"), "a", session=session)
        session.commit()
    assert stored() == []


@pytest.mark.hazard("F22")
def test_a_later_change_of_the_payload_has_no_effect(
    sessions: sessionmaker[Session], engine: Engine
) -> None:
    payload = {"n": 1}
    with sessions() as session:
        enqueue_event(payload, "a", session=session)
        payload["n"] = 2
        session.commit()
    with engine.connect() as connection:
        [row] = connection.execute(select(outbox.sql.events.c.payload)).all()
    assert bytes(row.payload) == b'{"n":1}'


@pytest.mark.hazard("F8")
def test_a_session_in_the_callers_transaction_stores_with_that_transaction(
    engine: Engine, stored: Any
) -> None:
    configure("memory://")
    with engine.connect() as connection:
        transaction = connection.begin()
        with Session(connection, join_transaction_mode="create_savepoint") as session:
            enqueue_event(1, "a", session=session)
            session.commit()
        transaction.rollback()
    assert stored() == []


def test_scheduled_events_are_stored_whatever_the_broker_can_do(
    sessions: sessionmaker[Session], engine: Engine, amqp_url: str
) -> None:
    configure(amqp_url)
    with sessions() as session:
        enqueue_event(1, "later", session=session, delay=3600)
        session.commit()
    store = Store(open_engine(engine.url))
    assert (store.status().scheduled, store.claim(1)) == (1, [])
    store.engine.dispose()


def test_without_a_publisher_the_environment_is_not_searched_for_each_event(
    sessions: sessionmaker[Session], stored: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from outbox.settings import Settings

    with sessions() as session:
        enqueue_event(1, "a", session=session)
        loaded: list[Any] = []
        monkeypatch.setattr(Settings, "load", lambda *_: loaded.append(1))
        enqueue_event(2, "b", session=session)
        session.commit()
    assert loaded == []
    assert stored() == ["a", "b"]


def test_what_postgresql_could_not_store_is_refused_when_it_is_enqueued(
    sessions: sessionmaker[Session], stored: Any
) -> None:
    with sessions() as session:
        refused: list[EventOptions] = [
            {"session": session, "key": "a\0"},
            {"session": session, "id": "a\0"},
            {"session": session, "exchange": "a\0"},
        ]
        for options in refused:
            with pytest.raises(InvalidEvent, match="NUL"):
                enqueue_event(1, "a", **options)
        with pytest.raises(InvalidEvent, match="NUL"):
            enqueue_event(1, "a\0", session=session)
        enqueue_event({"a": "\0"}, "a", session=session, headers={"b\0": "\0"})
        session.commit()
    assert stored() == ["a"]


# ------------------------------------------------------------------------------- connections


@pytest.mark.hazard("F6")
def test_a_core_connection_stores_in_its_transaction(engine: Engine, stored: Any) -> None:
    with engine.begin() as connection:
        enqueue_event(1, "kept", connection=connection)
        with contextlib.suppress(RuntimeError), connection.begin_nested():
            enqueue_event(2, "lost", connection=connection)
            raise RuntimeError
    with contextlib.suppress(RuntimeError), engine.begin() as connection:
        enqueue_event(3, "lost", connection=connection)
        raise RuntimeError
    assert stored() == ["kept"]


@pytest.mark.hazard("F8")
@pytest.mark.parametrize("where", ["engine", "option"])
def test_a_connection_in_autocommit_is_refused(database_url: str, where: str) -> None:
    engine = create_engine(
        database_url, **({"isolation_level": "AUTOCOMMIT"} if where == "engine" else {})
    )
    if where == "option":
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    with engine.connect() as connection, pytest.raises(UsageError, match="AUTOCOMMIT"):
        enqueue_event(1, "a", connection=connection)
    with Session(engine) as session, pytest.raises(UsageError, match="AUTOCOMMIT"):
        enqueue_event(1, "a", session=session)
    engine.dispose()


def test_only_a_session_or_connection_is_accepted(engine: Engine) -> None:
    for options, message in [
        ({"session": object()}, "is not an SQLAlchemy Session"),
        ({"session": engine}, "is not an SQLAlchemy Session"),
        ({"connection": object()}, "is not an SQLAlchemy Connection"),
        ({"session": object(), "connection": object()}, "only one of session"),
        ({"session": Session()}, "no engine"),
    ]:
        with pytest.raises(UsageError, match=message):
            enqueue_event(1, "a", **options)  # type: ignore[arg-type]
    assert len(EventCollector.current()) == 0


def test_an_unsupported_database_is_refused() -> None:
    class Dialect:
        name = "oracle"

    class Bound(Session):
        def get_bind(self, *_: Any, **__: Any) -> Any:
            return type("Engine", (), {"dialect": Dialect})()

    with pytest.raises(UsageError, match="cannot be stored in oracle"):
        enqueue_event(1, "a", session=Bound())


# -------------------------------------------------------------------------------------- bind


def test_events_bound_to_a_scoped_session_follow_its_transaction(
    engine: Engine, stored: Any
) -> None:
    configure("memory://", after_commit="nothing")
    session = scoped_session(sessionmaker(engine))
    outbox.sql.bind(session)
    with auto_publishing() as block:
        enqueue_event(1, "collected")  # no session was used yet: none is made
        assert not session.registry.has()
        session.add(Order(name="a"))
        enqueue_event(2, "stored")
        assert [one.target for one in block.events] == ["collected"]
        session.commit()
        enqueue_event(3, "collected.too")
    session.remove()
    assert stored() == ["stored"]
    assert block.report is not None
    assert [one.target for one in block.report.published] == ["collected", "collected.too"]


def test_a_bound_callable_is_asked_for_the_current_session_each_time(
    sessions: sessionmaker[Session], stored: Any
) -> None:
    configure("memory://", after_commit="nothing")
    present: list[Session | None] = [None]
    outbox.sql.bind(lambda: present[0])
    with auto_publishing():
        enqueue_event(0, "collected")
        assert len(clear_events()) == 1
        with sessions.begin() as session:
            present[0] = session
            enqueue_event(1, "stored")
        present[0] = None
        enqueue_event(2, "collected")
        assert len(clear_events()) == 1
    assert stored() == ["stored"]


def test_an_event_stored_outside_a_unit_of_work_does_not_warn(
    sessions: sessionmaker[Session], stored: Any
) -> None:
    with sessions.begin() as session:
        enqueue_event(1, "a", session=session)  # a warning is an error here
    assert stored() == ["a"]


@pytest.mark.parametrize("provider", [1, "session", Session()])
def test_bind_refuses_what_gives_no_session(provider: Any) -> None:
    with pytest.raises(UsageError, match="needs a scoped_session"):
        outbox.sql.bind(provider)


# ---------------------------------------------------------------------------------- handles


def check_open(handle: TaskHandle[Any]) -> None:
    assert handle.status == "collected"
    with pytest.raises(UsageError, match="is stored in a transaction that is open"):
        handle.result()


def check_dropped(*handles: TaskHandle[Any]) -> None:
    for handle in handles:
        assert (handle.status, handle.cancel()) == ("dropped", True)
        with pytest.raises(UsageError, match="was dropped with its transaction"):
            handle.result()


def check_committed(handle: TaskHandle[Any]) -> None:
    assert handle.status in ("waiting", "unknown")  # it may be published already
    with pytest.raises(NoResults, match="no database for results is configured"):
        handle.result()


@pytest.mark.parametrize("is_bound", [False, True])
def test_a_handle_knows_what_becomes_of_the_session_that_its_task_is_stored_in(
    sessions: sessionmaker[Session], is_bound: bool
) -> None:
    configure("memory://")
    with sessions() as session:
        if is_bound:
            outbox.sql.bind(lambda: session, begin=True)

        def call() -> TaskHandle[str]:
            return shipping.greet.options(**({} if is_bound else {"session": session})).later(1)

        first = call()
        check_open(first)
        session.flush()
        check_open(first)
        session.commit()
        check_committed(first)
        outer = call()
        with session.begin_nested() as savepoint:
            inner = call()
            released = session.begin_nested()
            innermost = call()
            released.commit()
            check_open(innermost)
            savepoint.rollback()
        check_dropped(inner, innermost)
        check_open(outer)
        session.rollback()
        check_dropped(outer)
        session.add(Order(name="twice"))
        session.commit()
        session.add(Order(name="twice"))
        written, unwritten = call(), call()
        with pytest.raises(IntegrityError):
            session.commit()
        session.rollback()
        check_dropped(written, unwritten)
        closed = call()
        session.flush()
    check_dropped(closed)
    check_committed(first)


def test_a_handle_keeps_no_session_alive(sessions: sessionmaker[Session]) -> None:
    configure("memory://")
    session: Any = sessions()
    handle = shipping.greet.options(session=session).later(1)
    session.flush()
    check_open(handle)
    del session
    gc.collect()
    check_dropped(handle)


def test_a_handle_knows_what_becomes_of_the_connection_that_its_task_is_stored_in(
    engine: Engine,
) -> None:
    configure("memory://")
    with engine.connect() as connection:
        call = shipping.greet.options(connection=connection).later
        outer = call(1)
        with connection.begin_nested() as savepoint:
            inner = call(1)
            with connection.begin_nested():
                innermost = call(1)
            check_open(innermost)
            savepoint.rollback()
        check_dropped(inner, innermost)
        check_open(outer)
        connection.commit()
        check_committed(outer)
        rolled_back = call(1)
        check_open(rolled_back)
        connection.rollback()
        check_dropped(rolled_back)
        closed = call(1)
    check_dropped(closed)
    check_committed(outer)


def test_a_handle_knows_the_transaction_of_its_sessions_caller(engine: Engine) -> None:
    configure("memory://")
    for is_committed in (True, False):
        with engine.connect() as connection:
            connection.begin()
            with Session(connection, join_transaction_mode="create_savepoint") as session:
                handle = shipping.greet.options(session=session).later(1)
                check_open(handle)
                session.commit()
                lost = shipping.greet.options(session=session).later(1)
                session.flush()
            check_dropped(lost)
            check_open(handle)
            if is_committed:
                connection.commit()
        (check_committed if is_committed else check_dropped)(handle)


# ----------------------------------------------------------------------------------- asyncio


def asynchronous(url: str) -> str:
    driver = {"postgresql": "postgresql+asyncpg", "sqlite": "sqlite+aiosqlite"}
    parsed = make_url(url)
    if parsed.get_backend_name() not in driver:
        pytest.skip(f"no asyncio driver of {parsed.get_backend_name()} is installed")
    return parsed.set(drivername=driver[parsed.get_backend_name()]).render_as_string(
        hide_password=False
    )


@pytest.mark.hazard("F9")
@pytest.mark.asyncio
async def test_an_asyncio_session_stores_in_its_transaction(
    database_url: str, engine: Engine, stored: Any
) -> None:
    asynchronous_engine = create_async_engine(asynchronous(database_url))
    async with AsyncSession(asynchronous_engine) as session:
        enqueue_event(1, "kept", session=session)
        await session.commit()
        enqueue_event(2, "lost", session=session)
        await session.rollback()
    async with asynchronous_engine.begin() as connection:
        with pytest.raises(UsageError, match="run_sync"):
            enqueue_event(3, "a", connection=connection)
        await connection.run_sync(lambda sync: enqueue_event(4, "core", connection=sync))
    scoped = async_scoped_session(
        async_sessionmaker(asynchronous_engine), scopefunc=asyncio.current_task
    )
    outbox.sql.bind(scoped)
    scoped.add(Order(name="a"))
    enqueue_event(5, "scoped")
    await scoped.commit()
    await scoped.remove()
    assert stored() == ["kept", "core", "scoped"]
    await asynchronous_engine.dispose()


@pytest.mark.asyncio
async def test_a_handle_knows_what_becomes_of_an_asyncio_session(
    database_url: str, engine: Engine
) -> None:
    configure("memory://")
    asynchronous_engine = create_async_engine(asynchronous(database_url))
    scoped = async_scoped_session(
        async_sessionmaker(asynchronous_engine), scopefunc=asyncio.current_task
    )
    outbox.sql.bind(scoped, begin=True)
    handle = shipping.greet.later(1)
    assert handle.status == "collected"
    with pytest.raises(UsageError, match="is stored in a transaction that is open"):
        await handle.result_async()
    await scoped.flush()
    async with scoped.begin_nested() as savepoint:
        inner = shipping.greet.later(1)
        await scoped.flush()
        await savepoint.rollback()
    assert (inner.status, handle.status) == ("dropped", "collected")
    await scoped.rollback()
    with pytest.raises(UsageError, match="was dropped with its transaction"):
        await handle.result_async()
    committed = shipping.greet.later(1)
    await scoped.commit()
    assert committed.status in ("waiting", "unknown")
    await scoped.remove()
    await asynchronous_engine.dispose()


@pytest.mark.hazard("F9", "G9")
@pytest.mark.asyncio
async def test_events_committed_by_an_asyncio_session_are_published_at_once(
    database_url: str, engine: Engine, stored: Any, publisher: Publisher, inspector: Inspector,
    name: str, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(outbox.configuration, "_publisher", publisher)
    inspector.queue(name, name)
    asynchronous_engine = create_async_engine(asynchronous(database_url))
    async with AsyncSession(asynchronous_engine) as session:
        enqueue_event(1, "now", session=session)
        await session.commit()
    assert inspector.get(name).payload == 1
    await asynchronous_engine.dispose()


# ---------------------------------------------------------------------------- the fast path


@pytest.fixture
def bound_queue(
    publisher: Publisher, inspector: Inspector, name: str, monkeypatch: pytest.MonkeyPatch
) -> str:
    """Return a queue that gets every event of the process's publisher."""
    monkeypatch.setattr(outbox.configuration, "_publisher", publisher)
    inspector.queue(name, name)
    return name


def until(condition: Any, timeout: float = 10.0) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_committed_events_are_published_at_once_and_deleted(
    sessions: sessionmaker[Session], stored: Any, bound_queue: str, inspector: Inspector
) -> None:
    with sessions() as session:
        for n in range(5):
            enqueue_event(n, "a", session=session, key="k", headers={"b": b"x"})
        session.commit()
    assert [inspector.get(bound_queue).payload for _ in range(5)] == [0, 1, 2, 3, 4]
    until(lambda: stored() == [])


@pytest.mark.hazard("F1")
def test_an_event_rolled_back_with_its_savepoint_is_not_published(
    sessions: sessionmaker[Session], stored: Any, bound_queue: str, inspector: Inspector
) -> None:
    with sessions() as session:
        with contextlib.suppress(RuntimeError), session.begin_nested():
            enqueue_event("lost", "a", session=session)
            session.flush()
            raise RuntimeError
        with session.begin_nested():
            enqueue_event("kept", "a", session=session)
        session.commit()
    assert inspector.get(bound_queue).payload == "kept"
    until(lambda: stored() == [])
    assert inspector.all(bound_queue) == []


def test_with_publishing_after_commit_off_a_row_is_due_for_a_relay_at_once(
    sessions: sessionmaker[Session], engine: Engine, amqp_url: str
) -> None:
    configure(amqp_url, after_commit="nothing")
    with sessions() as session:
        enqueue_event(1, "a", session=session)
        session.commit()
    store = Store(open_engine(engine.url))
    assert len(store.claim(1)) == 1
    store.engine.dispose()


def test_relays_leave_new_rows_alone_only_for_a_moment(
    sessions: sessionmaker[Session], engine: Engine
) -> None:
    configure("memory://")
    store = Store(open_engine(engine.url))
    with sessions() as session:
        enqueue_event(1, "a", session=session)
        session.flush()
        session.info.clear()  # as if the process had died right after the commit
        session.commit()
    assert store.claim(1) == []
    until(lambda: store.claim(1) != [], 3)
    store.engine.dispose()


@pytest.mark.hazard("F7")
def test_a_broker_that_is_away_does_not_slow_the_commit_and_leaves_the_event_to_the_relay(
    sessions: sessionmaker[Session], engine: Engine
) -> None:
    configure("amqp://127.0.0.1:1/", connect_timeout=1)
    begin = time.monotonic()
    with sessions() as session:
        enqueue_event(1, "a", session=session)
        session.commit()
    assert time.monotonic() - begin < 1
    store = Store(open_engine(engine.url))
    until(lambda: store.status().waiting == 1)
    [row] = store.claim(1)
    assert (row.attempts, row.event.payload) == (0, 1)
    store.engine.dispose()


@pytest.mark.hazard("F7")
def test_an_event_that_can_never_be_published_is_buried_with_its_reason(
    sessions: sessionmaker[Session], engine: Engine, bound_queue: str, inspector: Inspector
) -> None:
    with sessions() as session:
        enqueue_event(1, "a", session=session)
        enqueue_event(2, "b", session=session, exchange=f"{bound_queue}-none", unroutable="fail")
        enqueue_event(3, "c", session=session)
        session.commit()
    # The missing exchange closes the channel: what was not confirmed then comes twice.
    found = {inspector.get(bound_queue).id, inspector.get(bound_queue).id}
    while len(found) < 2:
        found.add(inspector.get(bound_queue).id)
    store = Store(open_engine(engine.url))
    until(lambda: store.dead() != [])
    [(_, _, target, reason)] = store.dead()
    assert target == "b"
    assert "404" in reason
    store.engine.dispose()


@pytest.mark.slow
def test_a_thousand_transactions_in_four_threads_are_published_once_each(
    postgresql_url: str, bound_queue: str, inspector: Inspector
) -> None:
    from concurrent.futures import ThreadPoolExecutor

    engine = create_engine(postgresql_url)
    outbox.sql.metadata.create_all(engine)

    def work(thread: int) -> None:
        for n in range(100):
            with Session(engine) as session:
                enqueue_event([thread, n], "a", session=session, key=str(thread))
                if n % 10 == 9:
                    session.rollback()
                else:
                    session.commit()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    found = [tuple(inspector.get(bound_queue).payload) for _ in range(360)]
    assert outbox.sql.drain()
    assert len(set(found)) == 360
    assert not [one for one in found if one[1] % 10 == 9]
    for thread in range(4):
        numbers = [n for of, n in found if of == thread]
        assert numbers == sorted(numbers)
    assert inspector.all(bound_queue) == []
    engine.dispose()


@pytest.mark.hazard("F3")
def test_a_closed_session_after_a_failed_flush_hands_nothing_over(
    sessions: sessionmaker[Session], stored: Any, bound_queue: str, inspector: Inspector
) -> None:
    with sessions() as session:
        session.add(Order(name="twice"))
        session.commit()
        session.add(Order(name="twice"))
        enqueue_event(1, "a", session=session)
        with pytest.raises(IntegrityError):
            session.flush()
        with contextlib.suppress(PendingRollbackError):
            session.commit()
    assert stored() == []
    assert inspector.all(bound_queue) == []


@pytest.mark.hazard("F18")
def test_a_listening_relay_is_notified_if_configured(postgresql_url: str) -> None:
    import psycopg

    configure("memory://", after_commit="notify")
    engine = create_engine(postgresql_url)
    outbox.sql.metadata.create_all(engine)
    address = make_url(postgresql_url).set(drivername="postgresql").render_as_string(False)
    with psycopg.connect(address, autocommit=True) as listener:
        listener.execute("LISTEN outbox_events")
        with Session(engine) as session:
            enqueue_event(1, "a", session=session)
            session.commit()
        [notification] = list(listener.notifies(timeout=5, stop_after=1))
    assert notification.payload == ""
    assert outbox.sql.drain()
    with engine.connect() as connection:
        assert connection.execute(text("SELECT count(*) FROM outbox_events")).scalar() == 1
    engine.dispose()


def test_neither_the_engine_nor_the_publisher_is_kept_alive(tmp_path: Path) -> None:
    def use() -> tuple[weakref.ref[Engine], weakref.ref[Publisher]]:
        engine = create_engine(f"sqlite:///{tmp_path}/short.db")
        outbox.sql.metadata.create_all(engine)
        publisher = configure("memory://")
        with Session(engine) as session:
            enqueue_event(1, "a", session=session)
            session.commit()
        assert outbox.sql.drain()
        engine.dispose()
        publisher.close()
        outbox.configuration._publisher = None
        return weakref.ref(engine), weakref.ref(publisher)

    used = use()

    def is_gone() -> bool:
        gc.collect()
        return not any(one() for one in used)

    until(is_gone)
