"""Events stored where a session's transaction is at its limits: in listeners, or expunged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event
from sqlalchemy import inspect as state_of
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_scoped_session, async_sessionmaker, create_async_engine
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import outbox.sql
from outbox import UsageError, auto_publishing, configure, enqueue_event
from outbox.consumers.message.databases import refreshers
from outbox.unit_of_work.auto_publishing import _warn_once_of_transaction
from outbox.unit_of_work.collector import EventOptions
from tests.conftest import database_of_kind
from tests.databases import Base, Order, targets


@pytest.fixture(params=["postgresql", "sqlite"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The kinds that differ in what SQLAlchemy does: MariaDB adds nothing."""
    return database_of_kind(request, tmp_path)


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(database_url)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def leave_alone(connection: Any, _: object) -> None:
            connection.isolation_level = None

        @event.listens_for(engine, "begin")
        def begin(connection: Any) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    Base.metadata.create_all(engine)
    outbox.sql.metadata.create_all(engine)
    yield engine
    outbox.sql.bind(None)
    engine.dispose()


def stored(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        return targets(connection)


def commits(session: Session) -> None:
    session.add(Order(name="a"))
    session.flush()
    session.commit()


def rolls_back(session: Session) -> None:
    session.add(Order(name="a"))
    session.flush()
    session.rollback()


def commits_with_savepoint(session: Session) -> None:
    session.add(Order(name="a"))
    with session.begin_nested():
        session.add(Order(name="b"))
    session.commit()


def rolls_savepoint_back(session: Session) -> None:
    session.add(Order(name="a"))
    savepoint = session.begin_nested()
    session.add(Order(name="b"))
    session.flush()
    savepoint.rollback()
    session.commit()


def rolls_back_with_savepoint(session: Session) -> None:
    session.add(Order(name="a"))
    with session.begin_nested():
        session.add(Order(name="b"))
    session.rollback()


def fails(session: Session) -> None:
    session.add(Order(name="a"))
    session.flush()
    session.add(Order(name="a"))
    with contextlib.suppress(IntegrityError):
        session.flush()
    session.rollback()


IN_FLUSH = ("before_flush", "after_flush", "after_flush_postexec", "after_begin")
STORED, PUBLISHED, GONE = "stored", "published", "gone"


@pytest.mark.parametrize("explicit", [False, True], ids=["bind", "session"])
@pytest.mark.parametrize(
    ("listener", "work", "fate"),
    [
        ("before_commit", commits, STORED),
        ("after_commit", commits, PUBLISHED),
        ("after_commit", commits_with_savepoint, STORED),
        ("after_commit", rolls_back_with_savepoint, GONE),
        ("after_commit", rolls_savepoint_back, PUBLISHED),
        ("after_rollback", rolls_back, PUBLISHED),
        ("after_rollback", rolls_savepoint_back, STORED),
        ("after_rollback", fails, PUBLISHED),
        ("after_soft_rollback", rolls_savepoint_back, STORED),
        ("after_soft_rollback", fails, PUBLISHED),
        ("after_transaction_end", commits_with_savepoint, STORED),
        *((each, commits, STORED) for each in IN_FLUSH),
        *((each, rolls_back, GONE) for each in IN_FLUSH),
        *((each, rolls_savepoint_back, STORED) for each in IN_FLUSH),
        *((each, rolls_back_with_savepoint, GONE) for each in IN_FLUSH),
        ("before_insert", commits, STORED),
        ("after_insert", commits, STORED),
        ("after_insert", rolls_savepoint_back, STORED),
        ("after_insert", rolls_back, GONE),
    ],
)
def test_an_event_of_a_listener_shares_the_fate_of_the_transaction_that_is_still_open(
    engine: Engine, listener: str, work: Callable[[Session], None], fate: str, explicit: bool
) -> None:
    publisher = configure("memory://", after_commit="nothing")
    session = Session(engine)
    outbox.sql.bind(None if explicit else lambda: session)
    called: list[str] = []
    options: EventOptions = {"session": session} if explicit else {}

    def listen(*_: Any) -> None:
        if not called:
            called.append(listener)
            enqueue_event(1, "a", **options)

    target: Any = Order if listener.endswith("_insert") else session
    event.listen(target, listener, listen)
    try:
        with auto_publishing():
            work(session)
    finally:
        event.remove(target, listener, listen)
    session.close()
    assert called
    assert (stored(engine) == ["a"]) == (fate == STORED)
    assert publisher.stats().published == (fate == PUBLISHED)


def test_after_a_failed_flush_an_event_is_collected_until_the_rollback(engine: Engine) -> None:
    publisher = configure("memory://", after_commit="nothing")
    session = Session(engine)
    outbox.sql.bind(lambda: session)
    with auto_publishing() as block:
        session.add_all([Order(name="twice"), Order(name="twice")])
        enqueue_event(1, "lost")
        with pytest.raises(IntegrityError):
            session.flush()
        enqueue_event(2, "duplicate")
        assert [each.target for each in block.events] == ["duplicate"]
        session.rollback()
        session.add(Order(name="once"))
        enqueue_event(3, "kept")
        session.commit()
    assert stored(engine) == ["kept"]
    assert publisher.stats().published == 1
    session.close()


def test_expunging_everything_drops_no_event(engine: Engine) -> None:
    with Session(engine) as session:
        session.add(Order(name="gone"))
        enqueue_event(1, "outer", session=session)
        session.expunge_all()
        with session.begin_nested() as savepoint:
            enqueue_event(2, "lost", session=session)
            session.expunge_all()
            savepoint.rollback()
        with session.begin_nested():
            enqueue_event(3, "inner", session=session)
            session.expunge_all()
        enqueue_event(4, "flushed", session=session)
        session.flush()
        session.expunge_all()
        session.commit()
    assert sorted(stored(engine)) == ["flushed", "inner", "outer"]


@pytest.mark.parametrize("end", ["close", "rollback"])
def test_expunged_events_are_gone_with_their_transaction(engine: Engine, end: str) -> None:
    session = Session(engine)
    enqueue_event(1, "lost", session=session)
    session.expunge_all()
    getattr(session, end)()
    session.add(Order(name="a"))
    session.commit()
    session.close()
    assert stored(engine) == []


def test_rows_look_like_other_objects_to_a_listener_that_walks_the_session(engine: Engine) -> None:
    audited: list[tuple[str, dict[str, Any]]] = []

    @event.listens_for(Session, "before_flush")
    def audit(session: Session, *_: Any) -> None:
        for each in session.new:
            state: Any = state_of(each)
            values = {attr.key: getattr(each, attr.key) for attr in state.mapper.column_attrs}
            audited.append((each.__tablename__, values))
            assert each.__table__ is not None
            each.changed_by = "the audit"

    try:
        with Session(engine) as session:
            session.add(Order(name="a"))
            enqueue_event(1, "placed", session=session)
            session.commit()
    finally:
        event.remove(Session, "before_flush", audit)
    assert sorted(name for name, _ in audited) == ["orders", "outbox_events"]
    assert stored(engine) == ["placed"]


# ---------------------------------------------------------------------------------- autocommit


def no_transactions(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def set_driver(connection: Any, _: object) -> None:
        if engine.dialect.name == "sqlite":
            connection.isolation_level = None  # and no listener begins
        else:
            connection.autocommit = True


@pytest.mark.parametrize("driver", ["psycopg", "psycopg2", "sqlite"])
def test_a_driver_in_autocommit_is_refused(
    driver: str, request: pytest.FixtureRequest, tmp_path: Any
) -> None:
    if driver == "sqlite":
        url = f"sqlite:///{tmp_path}/a.db"
    else:
        url = request.getfixturevalue("postgresql_url").replace("psycopg", driver)
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    outbox.sql.metadata.create_all(engine)
    engine.dispose()
    no_transactions(engine)
    with Session(engine) as session:
        session.add(Order(name="a"))
        enqueue_event(1, "a", session=session)
        with pytest.raises(UsageError, match="AUTOCOMMIT"):
            session.commit()  # the first statement of the session
        session.rollback()
        session.connection()
        with pytest.raises(UsageError, match="AUTOCOMMIT"):
            enqueue_event(1, "a", session=session)
    with engine.connect() as connection, pytest.raises(UsageError, match="AUTOCOMMIT"):
        enqueue_event(1, "a", connection=connection)
    assert stored(engine) == []
    engine.dispose()


def test_a_session_in_autocommit_is_refused(engine: Engine) -> None:
    with Session(engine) as session:
        session.connection(execution_options={"isolation_level": "AUTOCOMMIT"})
        with pytest.raises(UsageError, match="AUTOCOMMIT"):
            enqueue_event(1, "a", session=session)
    assert stored(engine) == []


# --------------------------------------------------------------------------------- other scopes


@pytest.mark.parametrize("error", [RuntimeError("no context"), LookupError("x"), AttributeError()])
def test_without_a_scope_there_is_no_session(engine: Engine, error: Exception) -> None:
    publisher = configure("memory://")

    def scope() -> int:
        raise error

    outbox.sql.bind(scoped_session(sessionmaker(engine), scopefunc=scope))
    with auto_publishing():
        enqueue_event(1, "collected")
    assert publisher.stats().published == 1
    [remove] = refreshers(is_async=False)
    remove()  # as a consumer does around each message


@pytest.mark.asyncio
async def test_without_an_asyncio_scope_there_is_no_session(tmp_path: Any) -> None:
    publisher = configure("memory://")

    def scope() -> int:
        raise RuntimeError("no context")

    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/a.db")
    outbox.sql.bind(async_scoped_session(async_sessionmaker(engine), scopefunc=scope))
    async with auto_publishing():
        enqueue_event(1, "collected")
    assert publisher.stats().published == 1
    [remove] = refreshers(is_async=True)
    await remove()
    outbox.sql.bind(None)
    await engine.dispose()


@pytest.mark.parametrize("error", [RuntimeError("no context"), LookupError("x")])
def test_a_callable_may_raise_where_there_is_no_session(error: Exception) -> None:
    publisher = configure("memory://")

    def current() -> None:
        raise error

    outbox.sql.bind(current)
    with auto_publishing():
        enqueue_event(1, "collected")
    assert publisher.stats().published == 1
    outbox.sql.bind(None)


def test_an_error_of_a_bound_callable_is_not_hidden() -> None:
    def current() -> None:
        raise TypeError("a bug")

    configure("memory://")
    outbox.sql.bind(current)
    with auto_publishing(), pytest.raises(TypeError, match="a bug"):
        enqueue_event(1, "a")
    outbox.sql.bind(None)


def test_a_session_that_routes_by_statement_stores_where_it_flushes(
    postgresql_url: str, tmp_path: Any
) -> None:
    publisher = configure("memory://")
    leader = create_engine(postgresql_url)
    follower = create_engine(f"sqlite:///{tmp_path}/replica.db", isolation_level="AUTOCOMMIT")
    for each in (leader, follower):
        Base.metadata.create_all(each)
        outbox.sql.metadata.create_all(each)

    class Routing(Session):
        def get_bind(self, mapper: Any = None, clause: Any = None, **_: Any) -> Engine:
            return leader if self._flushing else follower

    with Routing() as session:
        assert session.get(Order, 1) is None
        session.add(Order(name="a"))
        enqueue_event(1, "a", session=session)
        session.commit()
        assert outbox.sql.drain()
    assert publisher.stats().published == 1
    assert stored(leader) == stored(follower) == []
    leader.dispose()
    follower.dispose()


def test_a_block_inside_a_transaction_is_warned_about_once(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    configure("memory://")
    _warn_once_of_transaction.cache_clear()
    with auto_publishing(), Session(engine) as session, session.begin():
        enqueue_event(1, "after.the.commit")
    with Session(engine) as session, auto_publishing():
        session.connection()  # begins by itself
        enqueue_event(1, "a")
        session.commit()
    with Session(engine) as session, session.begin(), auto_publishing():
        enqueue_event(1, "stored", session=session)
    assert caplog.records == []
    for _ in range(2):
        with Session(engine) as session, session.begin(), auto_publishing():
            enqueue_event(1, "too.early")
    [warning] = caplog.records
    assert "before the transaction" in warning.getMessage()
    assert outbox.sql.drain()
