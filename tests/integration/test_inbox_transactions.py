"""The inbox's note and the handler's transaction, whatever kind of transaction that is."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import datetime
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pymysql
import pytest
from sqlalchemy import Connection, Engine, create_engine, event, func, insert, select, text, update
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

import outbox.sql
from outbox import CollectorClosed, Event, Publisher
from outbox.consumers import Consumer, ReceivedEvent, RetryPolicy, consumer
from outbox.consumers.message.inline_engine import InlineEngine
from outbox.consumers.message.message import Message
from outbox.consumers.outcome import ACK, DUPLICATE, REQUEUE, Again, Dead, Hold, Outcome
from outbox.messages.delivery import as_delivered
from outbox.sql import Inbox, commits
from outbox.sql.inbox import done as inbox_table
from outbox.storage import transactions
from tests.databases import Base, Order

ORDERS = Base.metadata.tables["orders"]
LINES = Base.metadata.tables["lines"]
Commits = Callable[[Engine, str], None]


class Failure(Exception):
    """Raised by a handler, which has its transaction rolled back."""


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """The handlers' engine, all of whose transactions are on one connection."""
    engine = create_engine(database_url, pool_size=1, max_overflow=0)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", lambda raw, _: raw.execute("PRAGMA foreign_keys=ON"))
    Base.metadata.create_all(engine)
    outbox.sql.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def inbox(database_url: str) -> Iterator[Inbox]:
    inbox = Inbox(database_url)
    yield inbox
    inbox.engine.dispose()


def handler(process: Callable[[ReceivedEvent], Any]) -> Consumer:
    return consumer("work", deduplicate=True, retry=RetryPolicy(delay=0))(process)


def message(work: Consumer, inbox: Inbox, publisher: Publisher) -> Message:
    event = Event("a", "work", "", b"{}")
    return Message(work, as_delivered(event, "work", 1), InlineEngine(publisher, inbox))


def outcome(work: Consumer, inbox: Inbox) -> Outcome:
    """Process the message once, as a worker would."""
    with Publisher("memory://") as publisher:
        made, engine = message(work, inbox, publisher), InlineEngine(publisher)
        if not work.is_async:
            return contextvars.copy_context().run(engine.conclude, made)
        return asyncio.run(engine.conclude_async(made))


def names(inbox: Inbox) -> list[str]:
    """Return what handlers have committed."""
    with inbox.engine.connect() as connection:
        return list(connection.scalars(select(ORDERS.c.name).order_by(ORDERS.c.id)))


def noted(inbox: Inbox) -> int:
    with inbox.engine.connect() as connection:
        return connection.scalar(text("SELECT count(*) FROM outbox_inbox")) or 0


def note_beside(inbox: Inbox, message_id: str, *, days: float = 0) -> None:
    """Note a message as another worker would, or did some days ago."""
    at = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days)
    values = {"consumer": "work", "message_id": message_id, "done_at": at}
    with commits.unwatched(), inbox.engine.begin() as connection:
        connection.execute(insert(inbox_table), values)


# ------------------------------------------------------------------ the ways to have a transaction


def _begin(engine: Engine, name: str) -> None:
    with engine.begin() as connection:
        connection.execute(insert(ORDERS), {"name": name})
        _fail_if_asked(name)


def _commit(engine: Engine, name: str) -> None:
    with engine.connect() as connection:
        connection.exec_driver_sql(f"INSERT INTO orders (name) VALUES ('{name}')")
        _fail_if_asked(name)
        connection.commit()


def _session(engine: Engine, name: str) -> None:
    with Session(engine) as session, session.begin():
        session.add(Order(name=name))
        session.flush()
        _fail_if_asked(name)


def _session_on_a_connection(engine: Engine, name: str) -> None:
    with engine.begin() as connection:
        with Session(connection) as session:
            session.add(Order(name=name))
            session.commit()
        _fail_if_asked(name)


def _savepoint(engine: Engine, name: str) -> None:
    with engine.begin() as connection:
        connection.execute(insert(ORDERS), {"name": name})
        with connection.begin_nested():
            connection.execute(update(ORDERS).values(name=ORDERS.c.name))
        assert connection.scalar(text("SELECT count(*) FROM outbox_inbox")) == 0
        _fail_if_asked(name)


async def _async_begin(engine: AsyncEngine, name: str) -> None:
    async with engine.begin() as connection:
        await connection.execute(insert(ORDERS), {"name": name})
        _fail_if_asked(name)


async def _async_session(engine: AsyncEngine, name: str) -> None:
    async with AsyncSession(engine) as session, session.begin():
        session.add(Order(name=name))
        await session.flush()
        _fail_if_asked(name)


def _fail_if_asked(name: str) -> None:
    if name.startswith("fail"):
        raise Failure(name)


def _plain(way: Commits, engine: Engine, then: Callable[[], None]) -> Callable[[str], Consumer]:
    def make(name: str) -> Consumer:
        def process(event: ReceivedEvent) -> None:
            way(engine, name)
            then()

        return handler(process)

    return make


def _coroutine(way: Any, engine: Engine, then: Callable[[], None]) -> Callable[[str], Consumer]:
    driver = {"sqlite": "sqlite+aiosqlite", "postgresql": "postgresql+asyncpg"}
    if engine.dialect.name not in driver:
        pytest.skip(f"no asyncio driver of {engine.dialect.name} is installed")
    url = engine.url.set(drivername=driver[engine.dialect.name])

    def make(name: str) -> Consumer:
        async def process(event: ReceivedEvent) -> None:
            asynchronous = create_async_engine(url)
            try:
                await way(asynchronous, name)
                then()
            finally:
                await asynchronous.dispose()

        return handler(process)

    return make


WAYS = [_begin, _commit, _session, _session_on_a_connection, _savepoint]
ASYNC_WAYS = [_async_begin, _async_session]


@pytest.fixture(params=[*WAYS, *ASYNC_WAYS], ids=lambda way: way.__name__.strip("_"))
def working(
    request: pytest.FixtureRequest, engine: Engine, inbox: Inbox
) -> tuple[Callable[[str], Consumer], list[int]]:
    """A handler for each way, given what it is to write, and how much it finds noted after that."""
    found: list[int] = []
    make = _coroutine if request.param in ASYNC_WAYS else _plain
    return make(request.param, engine, lambda: found.append(noted(inbox))), found


Working = tuple[Callable[[str], Consumer], list[int]]


@pytest.mark.hazard("G8")
def test_the_note_is_committed_with_the_handlers_writes(working: Working, inbox: Inbox) -> None:
    make, found = working
    assert outcome(make("one"), inbox) is ACK
    assert found == [1]  # not later than the data
    assert outcome(make("two"), inbox) is DUPLICATE
    assert names(inbox) == ["one"]


@pytest.mark.hazard("G8")
def test_a_rolled_back_message_is_not_noted_and_is_handled_again(
    working: Working, inbox: Inbox
) -> None:
    make, found = working
    assert isinstance(outcome(make("fail"), inbox), Again)
    assert (names(inbox), noted(inbox)) == ([], 0)
    assert outcome(make("one"), inbox) is ACK
    assert (names(inbox), found) == (["one"], [1])


# ------------------------------------------------------------------ which of several transactions


@pytest.mark.hazard("G8")
def test_a_transaction_that_only_reads_is_not_taken_for_the_handlers_work(
    engine: Engine, inbox: Inbox
) -> None:
    found: list[int] = []

    def process(event: ReceivedEvent) -> None:
        with engine.begin() as connection:
            connection.execute(select(func.count()).select_from(ORDERS))
        with Session(engine) as session, session.begin():
            session.scalars(select(Order)).all()
        found.append(noted(inbox))
        _begin(engine, "one")
        found.append(noted(inbox))

    assert outcome(handler(process), inbox) is ACK
    assert found == [0, 1]


def test_the_first_of_several_writing_transactions_has_the_note(
    engine: Engine, inbox: Inbox
) -> None:
    found: list[int] = []

    def process(event: ReceivedEvent) -> None:
        for name in ("one", "two"):
            _begin(engine, name)
            found.append(noted(inbox))

    assert outcome(handler(process), inbox) is ACK
    assert (names(inbox), found) == (["one", "two"], [1, 1])


def test_a_connection_in_autocommit_is_not_joined(engine: Engine, inbox: Inbox) -> None:
    found: list[int] = []

    def process(event: ReceivedEvent) -> None:
        _begin(engine.execution_options(isolation_level="AUTOCOMMIT"), "an audit trail")
        found.append(noted(inbox))
        _begin(engine, "one")
        found.append(noted(inbox))

    assert outcome(handler(process), inbox) is ACK
    assert found == [0, 1]


def test_a_transaction_of_another_database_is_not_joined(
    engine: Engine, inbox: Inbox, tmp_path: Path
) -> None:
    other = create_engine(f"sqlite:///{tmp_path}/other.db")
    Base.metadata.create_all(other)
    found: list[int] = []

    def process(event: ReceivedEvent) -> None:
        _begin(other, "one")
        found.append(noted(inbox))

    assert outcome(handler(process), inbox) is ACK
    assert (found, noted(inbox)) == ([0], 1)
    other.dispose()


def test_after_a_failed_commit_the_note_goes_with_the_next_transaction(
    engine: Engine, inbox: Inbox
) -> None:
    found: list[int] = []

    def process(event: ReceivedEvent) -> None:
        with suppress(IntegrityError), engine.begin() as connection:
            connection.execute(insert(LINES), {"order_id": 99})  # deferred: at the commit
        found.append(noted(inbox))
        _begin(engine, "one")
        found.append(noted(inbox))

    assert outcome(handler(process), inbox) is ACK
    assert (names(inbox), found) == (["one"], [0, 1])


def test_committing_a_failed_transaction_does_not_stop_the_message(
    engine: Engine, inbox: Inbox
) -> None:
    def process(event: ReceivedEvent) -> None:
        with engine.begin() as connection, suppress(DBAPIError):
            connection.execute(text("SELECT * FROM nowhere"))

    assert outcome(handler(process), inbox) is ACK
    assert noted(inbox) == 1


@pytest.mark.parametrize(("name", "left"), [("ends", 1), ("fail", 0)])
def test_work_that_continues_after_its_message_has_ended_commits_without_a_note(
    engine: Engine, inbox: Inbox, name: str, left: int
) -> None:
    contexts: list[contextvars.Context] = []

    def process(event: ReceivedEvent) -> None:
        contexts.append(contextvars.copy_context())  # as a task or thread has it
        _fail_if_asked(name)

    outcome(handler(process), inbox)
    contexts[0].run(_begin, engine, "later")
    assert (names(inbox), noted(inbox)) == (["later"], left)


def test_the_inboxs_own_statements_are_not_taken_for_the_handlers_work(
    engine: Engine, inbox: Inbox
) -> None:
    def process(event: ReceivedEvent) -> None:
        note_beside(inbox, "old", days=30)
        inbox._forgetting._looked_at.clear()  # an hour passes
        raise Failure

    assert isinstance(outcome(handler(process), inbox), Again)
    assert noted(inbox) == 0


def test_a_note_counts_once_its_commit_has_finished(engine: Engine, inbox: Inbox) -> None:
    found: list[bool] = []
    made: list[Message] = []

    def look(_: object) -> None:
        attempt = made[0]._attempt
        assert attempt is not None
        entry = attempt._entry
        assert entry is not None
        found.append(entry.committed)

    def process(message: ReceivedEvent) -> None:
        event.listen(engine, "commit", look)
        _begin(engine, "one")
        look(None)

    with Publisher("memory://") as publisher:
        made.append(message(handler(process), inbox, publisher))
        contextvars.copy_context().run(InlineEngine(publisher).conclude, made[0])
    assert found == [False, True]


def test_a_two_phase_transaction_has_the_note_when_it_is_prepared(
    postgresql_url: str,
) -> None:
    engine = create_engine(postgresql_url)
    inbox = Inbox(engine)
    Base.metadata.create_all(engine)
    outbox.sql.metadata.create_all(engine)
    found: list[int] = []

    def process(event: ReceivedEvent) -> None:
        with engine.connect() as connection:
            for name, end in (("one", "rollback"), ("two", "commit")):
                transaction = connection.begin_twophase()
                connection.execute(insert(ORDERS), {"name": name})
                transaction.prepare()
                getattr(transaction, end)()
                found.append(noted(inbox))

    assert outcome(handler(process), inbox) is ACK
    assert (names(inbox), found) == (["two"], [0, 1])
    engine.dispose()


# ------------------------------------------------------------------ commits that must not be


def _explicit(engine: Engine) -> None:
    """Write, and leave the connection to the pool as a commit leaves it."""
    with engine.connect() as connection:
        connection.execute(insert(ORDERS), {"name": "mine"})
        connection.commit()


def _explicit_and_go_on(engine: Engine) -> None:
    with engine.connect() as connection:
        connection.execute(insert(ORDERS), {"name": "mine"})
        try:
            connection.commit()
        finally:
            connection.rollback()
            connection.execute(insert(ORDERS), {"name": "after it"})
            connection.rollback()


@pytest.mark.hazard("G8")
@pytest.mark.parametrize("work", [_explicit, _explicit_and_go_on], ids=lambda one: one.__name__)
def test_of_two_concurrent_runs_the_second_leaves_nothing_behind(
    engine: Engine, inbox: Inbox, work: Callable[[Engine], None]
) -> None:
    def process(event: ReceivedEvent) -> None:
        note_beside(inbox, "a")
        work(engine)

    assert outcome(handler(process), inbox) is DUPLICATE
    _begin(engine, "the next")  # on the same connection
    assert names(inbox) == ["the next"]


def test_a_commit_after_the_timeout_leaves_nothing_behind(engine: Engine, inbox: Inbox) -> None:
    refused: list[CollectorClosed] = []
    made: list[Message] = []

    def process(event: ReceivedEvent) -> None:
        made[0].abandon()  # as the watch does
        try:
            _explicit(engine)
        except CollectorClosed as error:
            refused.append(error)

    with Publisher("memory://") as publisher:
        made.append(message(handler(process), inbox, publisher))
        contextvars.copy_context().run(InlineEngine(publisher).conclude, made[0])
    assert refused
    _begin(engine, "the next")
    assert (names(inbox), noted(inbox)) == (["the next"], 0)


@contextlib.contextmanager
def noting_beside(url: str) -> Iterator[Connection]:
    """Note the message in a transaction that another worker has left open."""
    beside = create_engine(url, poolclass=NullPool)
    with commits.unwatched(), beside.connect() as connection:
        connection.execute(insert(inbox_table), {"consumer": "work", "message_id": "a"})
        yield connection


@contextlib.contextmanager
def impatient(engine: Engine) -> Iterator[None]:
    """Have the next connections of ``engine`` wait for locks for a second only."""

    def hurry(raw: Any, _: object) -> None:
        with contextlib.closing(raw.cursor()) as cursor:
            cursor.execute("SET SESSION innodb_lock_wait_timeout = 1")

    event.listen(engine, "connect", hurry)
    yield
    event.remove(engine, "connect", hurry)


@pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)
def test_an_inbox_that_waits_too_long_for_a_lock_tries_again(
    engine: Engine, inbox: Inbox, database_url: str
) -> None:
    def process(event: ReceivedEvent) -> None:
        begun.append(event.attempt)

    begun: list[int] = []
    with impatient(inbox.engine), noting_beside(database_url) as other:
        release = threading.Timer(2.5, other.rollback)
        release.start()
        assert outcome(handler(process), inbox) == ACK
        release.join()
    assert begun == [1]
    assert noted(inbox) == 1


@pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)
def test_an_inbox_whose_row_stays_locked_holds_the_message(
    engine: Engine, inbox: Inbox, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transactions, "_TRIES", 2)
    with impatient(inbox.engine), noting_beside(database_url):
        held = outcome(handler(lambda event: None), inbox)
    assert isinstance(held, Hold)
    assert not held.is_doubtful


@pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)
@pytest.mark.parametrize("ends_with", ["rollback", "commit"])
def test_a_lock_in_the_way_of_the_note_in_the_handlers_transaction_is_no_failed_attempt(
    engine: Engine, inbox: Inbox, database_url: str, ends_with: str
) -> None:
    def process(event: ReceivedEvent) -> None:
        try:
            _begin(engine, "one")
        except OperationalError:
            if ends_with == "commit":
                with commits.unwatched():
                    other.commit()
            raise

    engine.dispose()
    with impatient(engine), noting_beside(database_url) as other:
        found = outcome(handler(process), inbox)
    assert found == (DUPLICATE if ends_with == "commit" else REQUEUE)
    assert names(inbox) == []


def test_a_lock_in_the_way_of_the_handlers_own_statement_is_a_failed_attempt(
    engine: Engine, inbox: Inbox
) -> None:
    def process(event: ReceivedEvent) -> None:
        raise OperationalError("UPDATE orders", {}, pymysql.OperationalError(1205, "lock wait"))

    assert isinstance(outcome(handler(process), inbox), Again)


@pytest.mark.parametrize("database_url", ["mariadb"], indirect=True)
def test_only_engines_of_outbox_itself_wait_for_locks_for_five_seconds(
    engine: Engine, inbox: Inbox
) -> None:
    def seconds(engine: Engine) -> Any:
        with engine.connect() as connection:
            return connection.scalar(text("SELECT @@innodb_lock_wait_timeout"))

    assert seconds(inbox.engine) == 5
    assert seconds(engine) == seconds(Inbox(engine).engine) == 50


def test_a_message_that_fails_after_a_connections_commit_is_a_dead_letter_that_says_so(
    engine: Engine, inbox: Inbox
) -> None:
    def process(event: ReceivedEvent) -> None:
        _begin(engine, "one")
        raise Failure("too late")

    found = outcome(handler(process), inbox)
    assert isinstance(found, Dead)
    assert found.reason == "failed after its transaction had been committed: Failure: too late"


def test_a_statement_that_fails_after_the_commit_does_not_undo_the_note(
    engine: Engine, inbox: Inbox
) -> None:
    def process(event: ReceivedEvent) -> None:
        _begin(engine, "one")
        with engine.begin() as connection:
            connection.execute(text("SELECT * FROM nowhere"))

    found = outcome(handler(process), inbox)
    assert isinstance(found, Dead)
    assert found.reason.startswith("failed after its transaction had been committed")
