"""Edge cases of a database server as the broker: outages, missing tables, other workers."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, make_url, text
from sqlalchemy.pool import NullPool

from outbox import ConnectionLost, Event, Publisher, UsageError, auto_publishing
from outbox.consumers import ReceivedEvent, Worker, consumer
from outbox.consumers.message.deduplication import open_inbox
from outbox.settings import Settings
from outbox.sql import Inbox
from outbox.tasks import task_rows
from outbox.testing.databases.postgresql import PrivatePostgreSQL
from outbox.transports.database import leases, subscription
from outbox.transports.database.server import server_database
from outbox.transports.database.server.server_database import ServerDatabase
from outbox.url import BrokerURL
from proving import database_queues
from proving.proxy import FaultProxy
from tests import shipping
from tests.places import (
    ServerPlace,
    end_connections,
    events_for,
    made,
    place_of,
    reading,
    server_place_of,
    working,
)
from tests.waiting import wait_until


@pytest.fixture(params=["postgresql", "mariadb"])
def place(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> ServerPlace:
    return server_place_of(request.param, request, name, tmp_path)


@pytest.fixture
def postgresql_place(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> ServerPlace:
    return server_place_of("postgresql", request, name, tmp_path)


@pytest.fixture
def mortal_place(mortal_postgresql: PrivatePostgreSQL, name: str) -> ServerPlace:
    """A database on a server that the test may stop and start."""
    if not mortal_postgresql.running:
        mortal_postgresql.start()
    return ServerPlace(mortal_postgresql.url, name)


@pytest.fixture
def publisher(place: ServerPlace) -> Iterator[Publisher]:
    with place.publisher() as found:
        yield found


def is_empty(place: ServerPlace) -> bool:
    return place.execute("SELECT 1 FROM outbox_events") == []


def connections(place: ServerPlace) -> set[int]:
    """Return the ids of the open connections to the database."""
    if place.engine.dialect.name == "postgresql":
        statement = (
            "SELECT pid FROM pg_stat_activity "
            "WHERE datname = current_database() AND pid <> pg_backend_pid()"
        )
    else:
        statement = (
            "SELECT id FROM information_schema.processlist "
            "WHERE db = database() AND id <> connection_id()"
        )
    return {int(number) for (number,) in place.execute(statement)}


# ---------------------------------------------------------------------------------- the tables


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_missing_table_is_named_with_the_command_and_none_is_made(
    request: pytest.FixtureRequest, kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    url: str = request.getfixturevalue(f"{kind}_url")

    @consumer(name)
    def nothing(event: ReceivedEvent) -> None: ...

    with Publisher(url, exchange=name, drain_timeout=0) as publisher:
        publisher.make_ready()
        wait_until(lambda: "outbox sql create" in caplog.text)
        assert "the table outbox_events does not exist" in caplog.text
        worker = Worker([nothing], publisher=publisher)
        worker.start()
        try:
            with pytest.raises(UsageError, match="outbox sql create"):
                worker.wait(10)
        finally:
            worker.stop()
    engine = create_engine(url, poolclass=NullPool)
    with engine.connect() as connection:
        assert not engine.dialect.has_table(connection, "outbox_events")
        assert not engine.dialect.has_table(connection, "outbox_bindings")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("?poll=never", "invalid poll=never"),
        ("?poll=0", "invalid poll=0"),
    ],
)
def test_an_invalid_option_is_refused_when_configured(options: str, reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        Publisher(f"postgresql://h/shop{options}")


def test_a_url_without_a_database_is_refused_when_configured() -> None:
    with pytest.raises(UsageError, match="names no database"):
        Publisher("postgresql://h")
    with pytest.raises(UsageError, match="names several hosts"):
        Publisher("mariadb://h,i/shop")


# --------------------------------------------------------------------------------- connections


def test_a_connection_that_was_ended_is_opened_again_and_nothing_is_lost(
    place: ServerPlace, publisher: Publisher, name: str
) -> None:
    with reading(place, name) as reader:
        sent = []
        for _ in range(3):
            events = events_for(publisher, [name] * 5)
            report = publisher.publish(events)
            assert report.published or report.kept
            sent += [event.id for event in events]
            end_connections(place)
        assert publisher.drain(10)
        found: set[str | None] = set()
        while not found >= set(sent):
            found |= {one.message_id for one in reader.get()}
    assert found == set(sent)


def test_an_unused_connection_is_closed_and_opened_again_without_a_failure(
    place: ServerPlace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(place, name)
    monkeypatch.setattr(ServerDatabase, "idle_timeout", 0.1)
    lost: list[Any] = []
    others = connections(place)
    with place.publisher(on_disconnected=lost.append) as publisher:
        for _ in range(2):
            assert publisher.publish(events_for(publisher, [name])).ok
            wait_until(lambda: connections(place) <= others)
        assert publisher.connected
    assert lost == []


def test_a_connection_that_the_server_has_closed_meanwhile_is_replaced_without_a_failure(
    place: ServerPlace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(place, name)
    monkeypatch.setattr(server_database, "_PROBE_AFTER", 0.0)
    lost: list[Any] = []
    with place.publisher(on_disconnected=lost.append) as publisher:
        assert publisher.publish(events_for(publisher, [name])).ok
        end_connections(place)
        assert publisher.publish(events_for(publisher, [name])).ok
    assert lost == []
    assert place.count(name) == 2


@pytest.mark.parametrize("level", ["serializable", "repeatable read"])
def test_transactions_are_read_committed_whatever_the_servers_default(
    postgresql_url: str, name: str, level: str
) -> None:
    place = ServerPlace(postgresql_url, name)
    database = make_url(postgresql_url).database
    place.execute(f"ALTER DATABASE {database} SET default_transaction_isolation = '{level}'")
    server = ServerDatabase(BrokerURL.parse(postgresql_url), lambda _: None)

    def look(connection: Connection) -> Any:
        return connection.execute(text("SHOW transaction_isolation")).scalar()

    assert server.run(look) == server.run(look, durable=False) == "read committed"
    server.close()


@pytest.mark.parametrize("durable", [True, False])
def test_only_the_transactions_of_a_worker_need_not_survive_a_power_cut(
    postgresql_place: ServerPlace, durable: bool
) -> None:
    server = ServerDatabase(BrokerURL.parse(postgresql_place.url), lambda _: None)

    def look(connection: Connection) -> Any:
        return connection.execute(text("SHOW synchronous_commit")).scalar()

    assert server.run(look, durable=durable) == ("on" if durable else "off")
    assert server.run(look) == "on"  # of that transaction alone
    server.close()


# --------------------------------------------------------------------------------------- outages


def test_events_are_kept_while_the_server_is_away_and_written_when_it_is_back(
    mortal_place: ServerPlace, mortal_postgresql: PrivatePostgreSQL, name: str
) -> None:
    made(mortal_place, name)
    with mortal_place.publisher() as publisher:
        assert publisher.publish(events_for(publisher, [name])).ok
        mortal_postgresql.kill()
        events = events_for(publisher, [name] * 3)
        report = publisher.publish(events, timeout=5)
        assert report.kept == tuple(events)
        assert "hunter2" not in str(report.error)
        mortal_postgresql.start()
        assert publisher.drain(20)
    assert mortal_place.count(name) == 4


@pytest.mark.slow
def test_what_a_worker_does_while_the_server_is_away_is_settled_afterwards(
    mortal_place: ServerPlace,
    mortal_postgresql: PrivatePostgreSQL,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ServerDatabase, "lease", 2.0)  # it ends during the outage
    made(mortal_place, name)
    begun, go_on = threading.Event(), threading.Event()
    runs: list[str] = []

    @consumer(name)
    def act(event: ReceivedEvent) -> None:
        runs.append(event.id)
        begun.set()
        assert go_on.wait(20)

    with mortal_place.publisher() as publisher, mortal_place.publisher() as other:
        with working(publisher, act), working(other, act):
            publisher.publish(events_for(publisher, [name]))
            assert begun.wait(10)
            time.sleep(1.0)  # until the claim is on the disk: its commit hasn't waited for that
            mortal_postgresql.kill()
            time.sleep(2.0)
            go_on.set()
            mortal_postgresql.start()
            wait_until(lambda: is_empty(mortal_place), 20)
    assert len(runs) == 1


def test_a_cut_connection_makes_a_worker_reconnect_and_lose_nothing(
    postgresql_place: ServerPlace, name: str
) -> None:
    place = postgresql_place
    done: list[str] = []

    @consumer(name)
    def act(event: ReceivedEvent) -> None:
        done.append(event.id)

    with FaultProxy(place.url) as proxy:
        behind = ServerPlace(proxy.url, name)
        made(place, name)
        with place.publisher() as publisher, behind.publisher() as own, working(own, act):
            events = events_for(publisher, [name] * 300)
            for start in range(0, 300, 100):
                assert publisher.publish(events[start : start + 100]).ok
                proxy.cut()
            wait_until(lambda: set(done) == {event.id for event in events}, 30)
            wait_until(lambda: is_empty(place), 30)


def test_what_was_claimed_by_a_commit_whose_answer_got_lost_is_delivered_soon(
    place: ServerPlace, publisher: Publisher, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, exchange = ServerDatabase.run, ServerDatabase.exchange
    lost: list[ServerDatabase] = []

    def lose_first(database: ServerDatabase, claimed: bool) -> None:
        if claimed and not lost:
            lost.append(database)
            raise ConnectionLost("cut off")

    def losing(
        self: ServerDatabase, work: Callable[[Connection], Any], *, durable: bool = True
    ) -> Any:
        result = run(self, work, durable=durable)
        lose_first(self, not durable and isinstance(result, tuple) and bool(result[1]))
        return result

    def losing_exchange(self: ServerDatabase, *arguments: Any) -> Any:
        result = exchange(self, *arguments)
        lose_first(self, bool(result))
        return result

    monkeypatch.setattr(ServerDatabase, "run", losing)
    monkeypatch.setattr(ServerDatabase, "exchange", losing_exchange)
    made(place, name)
    with reading(place, name, again=True) as reader:
        events = events_for(publisher, [name] * 3)
        publisher.publish(events).raise_for_failure()
        assert {one.message_id for one in reader.get(3)} == {event.id for event in events}
    assert lost


WORKER = """
import sys, time
from outbox import Publisher
from outbox.consumers import Worker, consumer

_, url, exchange, queue = sys.argv

@consumer(queue)
def act(event):
    print(event.id, flush=True)
    time.sleep(60)

with Publisher(url, exchange=exchange) as publisher:
    worker = Worker([act], publisher=publisher)
    worker.start()
    worker.wait()
"""


def test_the_messages_of_a_killed_worker_are_delivered_to_another_when_their_leases_end(
    place: ServerPlace, publisher: Publisher, name: str
) -> None:
    made(place, name)
    events = events_for(publisher, [name] * 3)
    publisher.publish(events)
    command = [sys.executable, "-c", WORKER, place.url, place.exchange, name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        child.stdout.readline()
        child.kill()
    with reading(place, name, again=True) as reader:
        with pytest.raises(AssertionError, match="0 of 1"):
            reader.take(1, timeout=0.5)
        past = "'2020-01-01'"
        place.execute(f"UPDATE outbox_events SET available_at = {past}")
        found = reader.get(3)
    assert {one.message_id for one in found} == {event.id for event in events}
    assert all(one.redelivered for one in found)


def test_a_slow_message_stays_with_its_worker(
    place: ServerPlace, publisher: Publisher, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ServerDatabase, "lease", 0.6)
    monkeypatch.setattr(leases, "_EXTENSIONS", 6)
    with reading(place, name) as reader:
        publisher.publish(events_for(publisher, [name]))
        [found] = reader.take(1)
        with reading(place, name, again=True) as other:
            with pytest.raises(AssertionError, match="0 of 1"):
                other.take(1, timeout=1.0)
        assert not reader._subscription.is_stale(found)


# --------------------------------------------------------------------------------------- events


def test_an_event_that_fits_no_row_is_rejected_and_its_siblings_are_published(
    place: ServerPlace, publisher: Publisher, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    made(place, name)
    good = events_for(publisher, [name] * 2)
    bad = Event(id="x" * 300, target=name, exchange=name, body=b"hunter2")  # by hand
    report = publisher.publish([good[0], bad, good[1]])
    assert report.published == tuple(good)
    [rejected] = report.rejected
    assert "cannot be stored" in rejected.reason
    assert "hunter2" not in rejected.reason + caplog.text
    assert place.count(name) == 2


def test_a_chunk_larger_than_mariadb_takes_at_once_is_written_and_a_larger_event_rejected(
    request: pytest.FixtureRequest, name: str, tmp_path: Path
) -> None:
    place = place_of("mariadb", request, name, tmp_path)
    made(place, name)
    bodies = [b'"' * 150_000] * 80  # 24 MB in a statement, where quotes are escaped
    good = [
        Event(id=str(number), target=name, exchange=name, body=body)
        for number, body in enumerate(bodies)
    ]
    large = Event(id="large", target=name, exchange=name, body=b"\n" * 9_000_000)
    with place.publisher() as publisher:
        report = publisher.publish([*good, large], timeout=60)
    assert report.published == tuple(good)
    [rejected] = report.rejected
    assert rejected.event is large
    assert "max_allowed_packet" in rejected.reason
    assert place.count(name) == 80


def test_events_wake_a_worker_of_the_same_process_at_once(
    place: ServerPlace, publisher: Publisher, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for setting in ("_FIRST_POLL", "_LOOK_AGAIN"):
        monkeypatch.setattr(subscription, setting, 30.0)
    with reading(place, name) as reader:
        for _ in range(3):
            publisher.publish(events_for(publisher, [name]))
            reader.get(timeout=5)


def test_an_idle_worker_looks_ten_times_a_second_at_most(
    postgresql_place: ServerPlace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_LISTEN_URL", "no")
    looks: list[float] = []
    due_in = ServerDatabase.due_in

    def looking(self: ServerDatabase, queues: Any) -> float | None:
        looks.append(time.monotonic())
        return due_in(self, queues)

    monkeypatch.setattr(ServerDatabase, "due_in", looking)
    with reading(postgresql_place, name):
        time.sleep(1.0)
        begin = time.monotonic()
        time.sleep(1.0)
    assert 5 <= len([at for at in looks if begin <= at < begin + 1.0]) <= 11


@pytest.mark.slow
def test_a_conflict_with_others_is_tried_again_unseen(
    place: ServerPlace, publisher: Publisher, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Two transactions change the same rows in opposite orders."""
    made(place, name)
    ids = [str(number) for number in range(50)]
    events = [Event(id=each, target=name, exchange=name, body=b"") for each in ids]
    publisher.publish(events).raise_for_failure()
    servers = [ServerDatabase(BrokerURL.parse(place.url), lambda _: None) for _ in range(2)]
    numbers = [row[0] for row in place.execute("SELECT seq FROM outbox_events ORDER BY seq")]

    def change(server: ServerDatabase, order: list[int]) -> None:
        def touch(connection: Connection) -> None:
            for number in order:
                connection.execute(
                    text("UPDATE outbox_events SET attempts = attempts + 1 WHERE seq = :n"),
                    {"n": number},
                )

        for _ in range(2):
            server.run(touch)

    threads = [
        threading.Thread(target=change, args=(server, order))
        for server, order in zip(servers, (numbers, numbers[::-1]), strict=True)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    for server in servers:
        server.close()
    assert place.execute("SELECT DISTINCT attempts FROM outbox_events") == [(4,)]


def test_forked_children_leave_their_parents_connections_alone(
    place: ServerPlace, publisher: Publisher, name: str
) -> None:
    with reading(place, name) as reader:
        for _ in range(3):
            publisher.publish(events_for(publisher, [name])).raise_for_failure()
            reader.get()
            child = os.fork()
            if not child:
                gc.collect()
                os._exit(0)
            os.waitpid(child, 0)
        assert publisher.stats().connects == 1


def test_a_message_is_done_once_where_the_inbox_is_in_the_same_database(
    place: ServerPlace, publisher: Publisher, name: str
) -> None:
    made(place, name)
    runs: list[str] = []

    @consumer(name, deduplicate=True)
    def act(event: ReceivedEvent) -> None:
        runs.append(event.id)

    inbox = open_inbox(publisher.settings, [act])
    assert isinstance(inbox, Inbox)
    with working(publisher, act, threads=1, inbox=inbox):
        event = Event(id="x", target=name, exchange=name, body=b"{}")
        publisher.publish([event, event]).raise_for_failure()
        wait_until(lambda: is_empty(place))
    inbox.engine.dispose()
    assert runs == ["x"]


def test_a_task_that_waits_is_seen_and_taken_away(
    place: ServerPlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_URL", place.url)
    with auto_publishing():
        handle = shipping.greet.later(1)
    assert handle.status == "waiting"
    assert handle.cancel()
    assert is_empty(place)
    task_rows.engine_of(Settings(url=place.url)).dispose()


@pytest.mark.one_python
@pytest.mark.timeout(240)
@pytest.mark.slow
def test_nothing_is_lost_or_invented_under_faults(tmp_path: Path) -> None:
    ledger = database_queues.prove("postgresql", tmp_path, seconds=2.5, seed=5, pause=0.5)
    assert ledger.is_clean, database_queues.report(ledger)
