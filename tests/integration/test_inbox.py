"""The inbox: a message delivered twice is handled once, and noted in the handler's transaction."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, func, insert, select, text, update
from sqlalchemy.event import listens_for
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

import outbox.sql
from outbox import (
    CollectorClosed,
    Event,
    Publisher,
    UsageError,
    auto_publishing,
    enqueue_event,
)
from outbox.consumers import Consumer, ReceivedEvent, RetryPolicy, Worker, before, consumer
from outbox.consumers.message import message
from outbox.messages.delivery import dead_letter_queue
from outbox.sql import Inbox
from outbox.sql.inbox import done as inbox_table
from proving.proxy import FaultProxy
from tests.amqp import Inspector
from tests.databases import Base, Effect, failing_over
from tests.places import Place, made, reading, working
from tests.waiting import wait_until


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    engine = create_engine(database_url)
    Base.metadata.create_all(engine)
    outbox.sql.metadata.create_all(engine)
    yield engine
    engine.dispose()


@pytest.fixture
def inbox(engine: Engine) -> Inbox:
    return Inbox(engine)


@pytest.fixture
def publisher(place: Place) -> Iterator[Publisher]:
    with place.publisher() as found:
        yield found


@pytest.mark.parametrize(
    ("query", "options"),
    [("", {}), ("?ssl=require", None), ("", {"connect_args": {"ssl": True}})],
    ids=["url", "query", "connect_args"],
)
def test_an_asyncio_engine_is_not_replaced_by_one_that_connects_less_securely(
    query: str, options: dict[str, Any] | None
) -> None:
    url = f"postgresql+asyncpg://user@127.0.0.1:1/app{query}"
    engine = create_async_engine(url, **(options or {})).sync_engine
    if not query and not options:
        assert Inbox(engine).engine.url.drivername == "postgresql+psycopg"
    else:
        with pytest.raises(UsageError, match="synchronous driver"):
            Inbox(engine)


def effects(engine: Engine) -> int:
    with Session(engine) as session:
        return session.scalar(select(func.count()).select_from(Effect)) or 0


def noted(engine: Engine) -> int:
    with engine.connect() as connection:
        return connection.scalar(text("SELECT count(*) FROM outbox_inbox")) or 0


def send(publisher: Publisher, queue: str, *ids: str) -> None:
    events = [Event(id=one, target=queue, exchange="", body=b"{}") for one in ids]
    assert publisher.publish(events).ok


def test_a_second_delivery_is_acked_without_running_the_handler(
    place: Place, publisher: Publisher, inbox: Inbox, engine: Engine, name: str
) -> None:
    done: list[str] = []

    @consumer(made(place, name), deduplicate=True)
    def act(event: ReceivedEvent) -> None:
        done.append(event.id)

    with working(publisher, act, inbox=inbox, threads=1):
        send(publisher, name, "a", "b", "a", "a")
        wait_until(lambda: place.count(name) == 0 and len(done) >= 2)
    with working(publisher, act, inbox=Inbox(engine), threads=1):  # "b" ends before "c" begins
        send(publisher, name, "b", "c")
        wait_until(lambda: "c" in done)
    assert sorted(done) == ["a", "b", "c"]
    assert place.count(name) == place.count(dead_letter_queue(name)) == 0


def test_each_consumer_handles_a_message_once(
    place: Place, publisher: Publisher, inbox: Inbox, engine: Engine, name: str
) -> None:
    done: list[str] = []
    made(place, f"{name}-1", "t")
    made(place, f"{name}-2", "t")

    @consumer(f"{name}-1", topics=["t"], deduplicate=True)
    def first(event: ReceivedEvent) -> None:
        done.append("first")

    @consumer(f"{name}-2", topics=["t"], deduplicate=True)
    def second(event: ReceivedEvent) -> None:
        done.append("second")

    with working(publisher, first, second, inbox=inbox, threads=1):
        for _ in range(2):
            publisher.publish([Event(id="x", target="t", exchange=place.exchange, body=b"{}")])
            wait_until(lambda: len(done) >= 2)
            wait_until(lambda: noted(engine) == 2)
    assert sorted(done) == ["first", "second"]


@pytest.mark.parametrize("how", ["orm", "bulk", "text", "connection"])
def test_a_transaction_that_only_reads_notes_nothing_but_one_that_writes_does(
    place: Place, publisher: Publisher, inbox: Inbox, engine: Engine, name: str, how: str
) -> None:
    seen: list[tuple[int, int]] = []

    class Act(Consumer):
        queue = made(place, name)
        deduplicate = True
        retry = RetryPolicy(delay=0)

        @before
        def look_up(self, event: ReceivedEvent) -> None:
            with Session(engine) as session, session.begin():
                session.scalar(select(func.count()).select_from(Effect))

        def process(self, event: ReceivedEvent) -> None:
            if event.attempt == 1:
                raise ValueError("to be tried again")
            earlier = noted(engine)
            with Session(engine) as session, session.begin():
                if how == "orm":
                    session.add(Effect(of=event.id))
                    session.flush()
                elif how == "bulk":
                    session.execute(insert(Effect), [{"of": event.id}])
                elif how == "text":
                    of = engine.dialect.identifier_preparer.quote("of")
                    session.execute(text(f"INSERT INTO effects ({of}) VALUES ('x')"))
                else:
                    session.connection().execute(insert(Effect).values(of=event.id))
            seen.append((earlier, noted(engine)))

    with working(publisher, Act, inbox=inbox):
        send(publisher, name, "a")
        wait_until(lambda: seen and place.count(name) == 0)
    assert seen == [(0, 1)]
    assert effects(engine) == 1
    assert place.count(dead_letter_queue(name)) == 0


@pytest.mark.hazard("G8")
def test_the_note_is_committed_with_the_handlers_work_or_not_at_all(
    place: Place, publisher: Publisher, inbox: Inbox, engine: Engine, name: str
) -> None:
    attempts: list[int] = []

    @consumer(made(place, name), deduplicate=True, retry=RetryPolicy(delay=0))
    def act(event: ReceivedEvent) -> None:
        attempts.append(event.attempt)
        with Session(engine) as session:
            session.add(Effect(of=event.id))
            if event.attempt == 1:
                session.flush()
                session.rollback()
                raise ValueError
            session.commit()
        found.append(noted(engine))

    found: list[int] = []
    with working(publisher, act, inbox=inbox):
        send(publisher, name, "a")
        wait_until(lambda: found)
    assert attempts == [1, 2]
    assert found == [1]  # not later than the data
    assert effects(engine) == 1


@pytest.mark.hazard("G8")
def test_two_workers_with_the_same_message_do_its_work_once(
    place: Place, publisher: Publisher, inbox: Inbox, engine: Engine, name: str
) -> None:
    both = threading.Barrier(2)
    began: list[str] = []

    @consumer(made(place, name), deduplicate=True)
    def act(event: ReceivedEvent) -> None:
        began.append(event.id)
        with contextlib.suppress(threading.BrokenBarrierError):
            both.wait(5)
        with Session(engine) as session:
            session.add(Effect(of=event.id))
            session.commit()

    with working(publisher, act, inbox=inbox):
        send(publisher, name, "same", "same")
        wait_until(lambda: len(began) == 2)
        wait_until(lambda: place.count(name) == 0)
    assert effects(engine) == 1
    assert place.count(dead_letter_queue(name)) == 0


@pytest.mark.hazard("G8")
def test_a_message_that_fails_after_its_commit_is_a_dead_letter_that_says_so(
    place: Place, publisher: Publisher, inbox: Inbox, engine: Engine, name: str
) -> None:
    @consumer(made(place, name), deduplicate=True, retry=RetryPolicy(delay=0))
    def act(event: ReceivedEvent) -> None:
        with Session(engine) as session:
            session.add(Effect(of=event.id))
            session.commit()
        raise ValueError("too late")

    with working(publisher, act, inbox=inbox):
        send(publisher, name, "a")
        with reading(place, dead_letter_queue(name), again=True) as reader:
            [letter] = reader.get()
    reason = (letter.headers or {})["outbox-dead-reason"]
    assert reason == "failed after its transaction had been committed: ValueError: too late"
    assert effects(engine) == 1


@pytest.fixture
def through_proxy(proxy: FaultProxy, inspector: Inspector, name: str) -> Iterator[Publisher]:
    inspector.clean_up(queue=name, exchange=name)
    inspector.clean_up(queue=dead_letter_queue(name))
    with Publisher(proxy.url, exchange=name, unroutable="ignore") as found:
        yield found


def cut(proxy: FaultProxy, worker: Worker) -> None:
    """Cut the links of a worker, and wait until it knows."""
    proxy.cut()
    wait_until(lambda: not worker.is_consuming)


@contextlib.contextmanager
def consuming(
    publisher: Publisher, act: Consumer | type[Consumer], inbox: Inbox, queue: str
) -> Iterator[Worker]:
    """Run a worker until everything that was delivered is settled."""
    with working(publisher, act, inbox=inbox) as worker:
        wait_until(lambda: worker.is_consuming)
        yield worker
        wait_until(lambda: worker.is_consuming and worker._subscription.out(queue) == 0)


def test_a_message_that_fails_after_its_commit_is_a_dead_letter_even_if_its_link_is_lost(
    proxy: FaultProxy,
    through_proxy: Publisher,
    inspector: Inspector,
    inbox: Inbox,
    engine: Engine,
    name: str,
) -> None:
    calls: list[str] = []

    class Act(Consumer):
        queue = name
        deduplicate = True
        retry = RetryPolicy(delay=0)

        def process(self, event: ReceivedEvent) -> None:
            with Session(engine) as session:
                session.add(Effect(of=event.id))
                session.commit()
            cut(proxy, worker)
            raise ValueError("too late")

        def on_failure(self, event: ReceivedEvent, error: BaseException) -> None:
            calls.append("failure")

        def on_dead(self, event: ReceivedEvent, reason: str) -> None:
            calls.append("dead")

    with consuming(through_proxy, Act, inbox, name) as worker:
        send(through_proxy, name, "a")
        letter = inspector.get(dead_letter_queue(name))
    assert letter.id == "a"
    assert effects(engine) == 1
    assert inspector.all(name) == inspector.all(dead_letter_queue(name)) == []
    assert calls == ["failure", "dead"]


def test_events_auto_published_after_a_commit_are_not_lost_with_the_link(
    proxy: FaultProxy,
    through_proxy: Publisher,
    inspector: Inspector,
    inbox: Inbox,
    engine: Engine,
    name: str,
) -> None:
    seen: list[str] = []

    @consumer(name, deduplicate=True, auto_publish=True)
    def act(event: ReceivedEvent) -> None:
        enqueue_event({}, f"{name}-next", exchange="")
        with Session(engine) as session:
            session.add(Effect(of=event.id))
            session.commit()
        seen.append(event.id)
        if len(seen) == 1:
            cut(proxy, worker)

    follow_ons = inspector.queue(f"{name}-next")
    with consuming(through_proxy, act, inbox, name) as worker:
        send(through_proxy, name, "a")
        assert inspector.get(follow_ons).target == follow_ons
        wait_until(lambda: noted(engine) == 1)
    assert inspector.all(name) == inspector.all(dead_letter_queue(name)) == []


def test_after_the_deduplication_window_a_message_counts_as_new(
    place: Place, publisher: Publisher, inbox: Inbox, engine: Engine, name: str
) -> None:
    done: list[str] = []

    @consumer(made(place, name), deduplicate=datetime.timedelta(hours=1))
    def act(event: ReceivedEvent) -> None:
        done.append(event.id)
        with Session(engine) as session:
            session.add(Effect(of=event.id))
            session.commit()

    with working(publisher, act, inbox=inbox):
        send(publisher, name, "a")
        wait_until(lambda: noted(engine) == 1)
        earlier = datetime.datetime.now(datetime.UTC) - datetime.timedelta(hours=2)
        with engine.begin() as connection:
            connection.execute(update(inbox_table).values(done_at=earlier))
        send(publisher, name, "a")
        wait_until(lambda: len(done) == 2)
    assert effects(engine) == 2
    assert inbox.purge(name, 3600) == 0
    assert inbox.purge(name, 0) == 1


def note(engine: Engine, consumer: str, count: int, *, days_ago: float) -> None:
    """Note messages that ``consumer`` has processed."""
    done_at = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=days_ago)
    rows = [
        {"consumer": consumer, "message_id": f"{days_ago}-{number}", "done_at": done_at}
        for number in range(count)
    ]
    with engine.begin() as connection:
        connection.execute(insert(inbox_table), rows)


def test_a_purge_reads_only_what_it_deletes(engine: Engine, inbox: Inbox, name: str) -> None:
    note(engine, name, 20_000, days_ago=1)
    note(engine, name, 3, days_ago=8)
    plans: list[str] = []

    @listens_for(inbox.engine, "before_cursor_execute")
    def explain(connection: Any, cursor: Any, statement: str, parameters: Any, *_: object) -> None:
        if "done_at <" in statement:
            cursor.execute(f"EXPLAIN {query_plan}{statement}", parameters)
            plans.append("\n".join(str(row) for row in cursor.fetchall()))

    is_sqlite = engine.dialect.name == "sqlite"
    query_plan = "QUERY PLAN " if is_sqlite else ""
    if not is_sqlite:
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            table = "TABLE " if engine.dialect.name == "mariadb" else ""
            connection.exec_driver_sql(f"ANALYZE {table}outbox_inbox")
    assert inbox.purge(name, 7 * 86_400) == 3
    bound = {
        "sqlite": "consumer=? AND done_at<?",
        "postgresql": "(done_at < ",
        "mariadb": "'outbox_inbox_done', '1030'",  # both columns
    }[engine.dialect.name]
    assert plans
    for plan in plans:
        assert bound in plan
        assert "index" in plan.lower()
    with engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(inbox_table)).scalar() == 20_000


def test_a_message_waits_for_a_part_of_a_large_purge_only(
    engine: Engine, inbox: Inbox, name: str
) -> None:
    note(engine, name, 2_500, days_ago=8)

    def remaining() -> int:
        with engine.connect() as connection:
            count = connection.execute(select(func.count()).select_from(inbox_table)).scalar()
        assert isinstance(count, int)
        return count

    counts = []
    for _ in range(4):
        inbox.purge_now_and_then(name, 7 * 86_400)
        counts.append(remaining())
    assert counts == [1_500, 500, 0, 0]
    note(engine, name, 10, days_ago=9)
    inbox.purge_now_and_then(name, 7 * 86_400)
    assert remaining() == 10  # within the hour


def test_a_coroutines_note_is_in_its_asynchronous_session(
    place: Place, publisher: Publisher, tmp_path: Path, name: str
) -> None:
    url = f"sqlite:///{tmp_path}/shop.db"
    engine = create_engine(url)
    found: list[int] = []
    Base.metadata.create_all(engine)
    outbox.sql.metadata.create_all(engine)
    asynchronous = create_async_engine(
        url.replace("sqlite:", "sqlite+aiosqlite:"), poolclass=NullPool
    )

    class Act(Consumer):
        queue = name
        deduplicate = True

        async def process(self, event: ReceivedEvent) -> None:
            async with AsyncSession(asynchronous) as session:
                session.add(Effect(of=event.id))
                await session.commit()
            found.append(await asyncio.to_thread(noted, engine))

    made(place, name)
    with working(publisher, Act, inbox=Inbox(engine)):
        send(publisher, name, "a", "a")
        wait_until(lambda: place.count(name) == 0 and found)
    assert found == [1]
    assert effects(engine) == 1
    engine.dispose()


def test_follow_ons_stored_with_the_note_are_published_once(
    place: Place, publisher: Publisher, inbox: Inbox, engine: Engine, name: str
) -> None:
    made(place, f"{name}-all", f"{name}-next")

    @consumer(made(place, name), deduplicate=True)
    def act(event: ReceivedEvent) -> None:
        with Session(engine) as session:
            session.add(Effect(of=event.id))
            enqueue_event({}, f"{name}-next", session=session)
            session.commit()

    with working(publisher, act, inbox=inbox):
        send(publisher, name, "a", "a")
        wait_until(lambda: place.count(name) == 0 and effects(engine))
        outbox.sql.drain()
        with reading(place, f"{name}-all", again=True) as reader:
            [follow_on] = reader.get()
    assert follow_on.target == f"{name}-next"
    assert place.count(f"{name}-all") == 0


def test_a_database_that_is_away_costs_no_attempt(
    place: Place, publisher: Publisher, inbox: Inbox, engine: Engine, name: str
) -> None:
    attempts: list[int] = []

    @consumer(made(place, name), deduplicate=True)
    def act(event: ReceivedEvent) -> None:
        attempts.append(event.attempt)
        if len(attempts) == 1:
            with create_engine("postgresql+psycopg://a@127.0.0.1:1/none").connect():
                pass

    with working(publisher, act, inbox=inbox):
        send(publisher, name, "a")
        wait_until(lambda: len(attempts) == 2)
        wait_until(lambda: place.count(name) == 0)
    assert attempts == [1, 1]
    assert place.count(dead_letter_queue(name)) == 0
    with pytest.raises(OperationalError):
        create_engine("postgresql+psycopg://a@127.0.0.1:1/none").connect()


@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
@pytest.mark.parametrize("writes", [False, True], ids=["inbox", "handler"])
def test_a_server_that_has_become_read_only_costs_no_attempt(
    place: Place, publisher: Publisher, engine: Engine, database_url: str, name: str, writes: bool
) -> None:
    attempts: list[int] = []
    with failing_over(database_url) as failover:
        ordinary = create_engine(failover.url, poolclass=NullPool)
        inbox = Inbox(ordinary)

        @consumer(made(place, name), deduplicate=True)
        def act(event: ReceivedEvent) -> None:
            attempts.append(event.attempt)
            if len(attempts) == 1:
                failover.set_read_only(True)
            if len(attempts) == 2:
                failover.set_read_only(False)
            if writes:
                with ordinary.begin() as connection:
                    connection.execute(insert(Effect).values(of=event.id))

        with working(publisher, act, inbox=inbox):
            send(publisher, name, "a")
            wait_until(lambda: noted(engine) == 1 and place.count(name) == 0)
    assert attempts == [1, 1]
    assert effects(engine) == writes
    assert place.count(dead_letter_queue(name)) == 0


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_handler_that_writes_in_its_own_read_only_transaction_has_failed_in_the_end(
    place: Place,
    publisher: Publisher,
    inbox: Inbox,
    engine: Engine,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(message, "PATIENCE", 1)
    attempts: list[int] = []

    @consumer(made(place, name), deduplicate=True, retry=RetryPolicy(max_attempts=2, delay=0))
    def act(event: ReceivedEvent) -> None:
        attempts.append(event.attempt)
        with engine.connect().execution_options(postgresql_readonly=True) as connection:
            connection.execute(insert(Effect).values(of=event.id))

    with working(publisher, act, inbox=inbox):
        send(publisher, name, "a")
        wait_until(lambda: place.count(dead_letter_queue(name)) == 1)
    assert attempts == sorted(attempts)
    assert len(attempts) <= 8
    assert set(attempts) == {1, 2}


def test_without_a_database_a_consumer_that_deduplicates_is_refused(
    name: str, amqp_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("OUTBOX_DATABASE_URL", raising=False)

    @consumer(name, deduplicate=True)
    def act(event: ReceivedEvent) -> None: ...

    with Publisher(amqp_url) as publisher:
        with pytest.raises(UsageError, match="set OUTBOX_DATABASE_URL, or pass Worker"):
            Worker([act], publisher=publisher)
        monkeypatch.setenv("OUTBOX_DATABASE_URL", f"sqlite:///{tmp_path}/none.db")
        with pytest.raises(
            UsageError, match=r"table outbox_inbox.*does not exist.*outbox sql create"
        ):
            Worker([act], publisher=publisher)


def test_a_database_that_is_away_at_the_start_is_waited_for(
    amqp_url: str, name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE_URL", "postgresql://a@127.0.0.1:1/none")

    @consumer(name, deduplicate=True)
    def act(event: ReceivedEvent) -> None: ...

    with Publisher(amqp_url) as publisher:
        Worker([act], publisher=publisher)
    assert "the inbox is unavailable" in caplog.text


def test_the_inbox_of_a_sqlite_transport_is_in_its_file(tmp_path: Path, name: str) -> None:
    done: list[str] = []

    @consumer(name, deduplicate=True)
    def act(event: ReceivedEvent) -> None:
        done.append(event.id)

    path = tmp_path / "outbox.db"
    with Publisher(f"sqlite:///{path}") as publisher, working(publisher, act, threads=1):
        assert path.stat().st_mode & 0o777 == 0o600
        wait_until(lambda: publisher.publish([Event("a", name, "", b"{}")]).published)
        send(publisher, name, "a", "b")
        wait_until(lambda: "b" in done)
    assert done == ["a", "b"]


@pytest.mark.hazard("G8")
def test_a_commit_in_a_callback_is_not_taken_for_the_handlers_work(
    place: Place, publisher: Publisher, inbox: Inbox, engine: Engine, name: str
) -> None:
    attempts: list[int] = []
    calls: list[str] = []

    class Act(Consumer):
        queue = made(place, name)
        deduplicate = True
        retry = RetryPolicy(delay=0)

        def process(self, event: ReceivedEvent) -> None:
            attempts.append(event.attempt)
            if event.attempt == 1:
                raise ValueError

        def on_failure(self, event: ReceivedEvent, error: BaseException) -> None:
            self.audit(f"failure {noted(engine)}")

        def on_success(self, event: ReceivedEvent) -> None:
            self.audit(f"success {noted(engine)}")

        def audit(self, what: str) -> None:
            with Session(engine) as session:
                session.add(Effect(of=what))
                session.commit()
            calls.append(what)

    with working(publisher, Act, inbox=inbox):
        send(publisher, name, "a")
        wait_until(lambda: len(calls) == 2)
    assert attempts == [1, 2]
    assert calls == ["failure 0", "success 1"]
    assert place.count(dead_letter_queue(name)) == 0


@pytest.mark.hazard("G4", "G8")
def test_a_late_handler_cannot_commit_beside_the_attempt_that_follows(
    place: Place, publisher: Publisher, inbox: Inbox, engine: Engine, name: str
) -> None:
    second, refused = threading.Event(), threading.Event()

    @consumer(made(place, name), deduplicate=True, timeout=0.5, retry=RetryPolicy(delay=0))
    def act(event: ReceivedEvent) -> None:
        with Session(engine) as session:
            session.add(Effect(of=str(event.attempt)))
            if event.attempt == 1:
                second.wait(10)
                try:
                    session.commit()
                except CollectorClosed:
                    refused.set()
            else:
                second.set()
                assert refused.wait(5)
                session.commit()

    with working(publisher, act, inbox=inbox):
        send(publisher, name, "a")
        wait_until(lambda: noted(engine) == 1)
    with Session(engine) as session:
        assert list(session.scalars(select(Effect.of))) == ["2"]
    assert place.count(dead_letter_queue(name)) == 0


@pytest.mark.hazard("G8")
def test_a_message_that_times_out_after_its_commit_is_a_dead_letter_that_says_so(
    place: Place, publisher: Publisher, inbox: Inbox, engine: Engine, name: str
) -> None:
    release = threading.Event()

    @consumer(made(place, name), deduplicate=True, timeout=0.3, retry=RetryPolicy(delay=0))
    def act(event: ReceivedEvent) -> None:
        with Session(engine) as session:
            session.add(Effect(of=event.id))
            session.commit()
        release.wait(10)

    with working(publisher, act, inbox=inbox):
        send(publisher, name, "a")
        with reading(place, dead_letter_queue(name), again=True) as reader:
            [letter] = reader.get()
        release.set()
    reason = (letter.headers or {})["outbox-dead-reason"]
    assert reason.startswith("failed after its transaction had been committed: ProcessTimeout")
    assert effects(engine) == 1


@pytest.mark.hazard("G8")
def test_a_session_with_a_different_url_of_the_same_database_writes_the_note(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    own = create_engine("sqlite:///shop.db")
    Base.metadata.create_all(own)
    found: list[int] = []

    @consumer(name, deduplicate=True)
    def act(event: ReceivedEvent) -> None:
        with Session(own) as session:
            session.add(Effect(of=event.id))
            session.commit()
        found.append(noted(own))

    with Publisher("sqlite:///shop.db") as publisher, working(publisher, act):
        wait_until(lambda: publisher.publish([Event("a", name, "", b"{}")]).published)
        wait_until(lambda: found)
    assert found == [1]
    own.dispose()


@pytest.mark.hazard("G9")
def test_an_event_is_never_seen_before_its_data(
    place: Place, publisher: Publisher, engine: Engine, name: str
) -> None:
    found: list[bool] = []

    @consumer(made(place, name))
    def look(event: ReceivedEvent) -> None:
        with Session(engine) as session:
            query = select(Effect.id).where(Effect.of == event.payload["of"])
            found.append(session.scalar(query) is not None)

    with working(publisher, look):
        for number in range(50):
            with auto_publishing(publisher=publisher), Session(engine) as session:
                enqueue_event({"of": str(number)}, name, exchange="")
                session.add(Effect(of=str(number)))
                session.flush()
                session.commit()
        wait_until(lambda: len(found) == 50)
    assert all(found)
