"""Edge cases of the embedded transport and its file."""

from __future__ import annotations

import contextlib
import datetime
import logging
import os
import shutil
import sqlite3
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from outbox import Blocked, BrokerError, Event, Publisher, PublishTimeout, UsageError
from outbox.consumers import ReceivedEvent, Worker, consumer
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.messages.delivery import dead_letter_queue
from outbox.transports.database import leases, subscription
from outbox.transports.database.sqlite import sqlite_file
from outbox.transports.database.sqlite.sqlite_file import SQLiteFile
from tests.places import SQLitePlace, events_for, reading
from tests.waiting import wait_until


@pytest.fixture
def place(tmp_path: Path, name: str) -> SQLitePlace:
    return SQLitePlace(str(tmp_path / "outbox.db"), name)


@pytest.fixture
def publisher(place: SQLitePlace) -> Iterator[Publisher]:
    with place.publisher(drain_timeout=10) as found:
        yield found


@contextlib.contextmanager
def locked(path: str) -> Iterator[None]:
    """Hold the lock of the file, as another process that writes would."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


# ------------------------------------------------------------------------------------- the file


def test_the_file_and_those_beside_it_are_readable_by_their_owner_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = os.umask(0)
    try:
        place = SQLitePlace(str(tmp_path / "outbox.db"), "x")
        with place.publisher() as publisher:
            publisher.publish(events_for(publisher, ["a"]))
            modes = {one.name: stat.S_IMODE(one.stat().st_mode) for one in tmp_path.iterdir()}
    finally:
        os.umask(before)
    assert modes == {"outbox.db": 0o600, "outbox.db-wal": 0o600, "outbox.db-shm": 0o600}


def test_an_untrusted_or_unusable_path_is_refused_when_configured(
    tmp_path: Path,
) -> None:
    (tmp_path / "target.db").touch()
    (tmp_path / "link.db").symlink_to(tmp_path / "target.db")
    (tmp_path / "folder.db").mkdir()
    for file, reason in (
        ("link.db", "symbolic link"),
        ("folder.db", "not a regular file"),
        ("none/x.db", "No such file"),
        ("x.db?cache=shared", "unknown option 'cache'"),
    ):
        with pytest.raises(UsageError, match=reason):
            Publisher(f"sqlite:///{tmp_path}/{file}")


@pytest.mark.parametrize(("chosen", "level"), [("", 2), ("?synchronous=normal", 1)])
def test_the_url_decides_what_survives_a_power_cut(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: str, level: int
) -> None:
    seen: list[int] = []
    run = SQLiteFile.run

    def looking(self: SQLiteFile, work: Callable[[Connection], Any]) -> Any:
        def look(connection: Connection) -> Any:
            seen.append(connection.exec_driver_sql("PRAGMA synchronous").scalar_one())
            return work(connection)

        return run(self, look)

    monkeypatch.setattr(SQLiteFile, "run", looking)
    with Publisher(f"sqlite:///{tmp_path}/o.db{chosen}") as publisher:
        publisher.publish(events_for(publisher, ["a"]))
    assert set(seen) == {level}


def test_a_clean_exit_leaves_a_single_file_with_everything_in_it(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    place.bind(name, place.exchange, "#")
    publisher.publish(events_for(publisher, ["a"] * 3))
    publisher.close()
    assert [one.name for one in Path(place.path).parent.iterdir()] == ["outbox.db"]
    assert place.count(name) == 3


def test_events_published_before_the_process_was_killed_are_there(
    place: SQLitePlace, name: str
) -> None:
    place.bind(name, place.exchange, "#")
    program = (
        "import os, sys\n"
        "from outbox import Event, Publisher\n"
        "publisher = Publisher(sys.argv[1], exchange=sys.argv[2])\n"
        "made = [Event(id=str(n), target='a', exchange=sys.argv[2], body=b'') for n in range(9)]\n"
        "assert publisher.publish(made).ok\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, place.url, place.exchange], check=False)
    assert done.returncode == -9
    assert place.count(name) == 9


def test_a_missing_sqlalchemy_names_the_extra(tmp_path: Path) -> None:
    program = (
        "import sys\n"
        "sys.modules['sqlalchemy'] = None\n"
        "import outbox\n"
        "try:\n    outbox.configure(sys.argv[1])\n"
        "except outbox.errors.MissingExtra as error:\n    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, f"sqlite:///{tmp_path}/o.db"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "outbox-events[sql]" in done.stdout


# ---------------------------------------------------------------------------- it cannot be written


def test_while_another_process_writes_callers_wait_no_longer_than_their_timeout(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    place.bind(name, place.exchange, "#")
    events = events_for(publisher, ["a", "b"])
    with locked(place.path):
        report = publisher.publish(events[:1], timeout=0.1)
        assert report.kept == tuple(events[:1])
        assert isinstance(report.error, PublishTimeout)
        begin = time.monotonic()
        assert publisher.publish(events[1:], timeout=5).kept == tuple(events[1:])
        assert time.monotonic() - begin < 1  # callers do not wait while it is known to be locked
        assert publisher.kept == tuple(events)
    assert publisher.drain(10)
    assert publisher.kept == ()
    assert [row[0] for row in place.execute("SELECT id FROM outbox_events ORDER BY seq")] == [
        event.id for event in events
    ]


def test_a_file_that_stays_locked_is_reported_and_its_events_are_kept_and_written_later(
    place: SQLitePlace,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sqlite_file, "_PATIENCE", 0.3)
    place.bind(name, place.exchange, "#")
    connected: list[str] = []
    lost: list[BrokerError] = []
    kept: list[Event] = []
    with place.publisher(
        on_connected=connected.append, on_disconnected=lost.append, on_kept=kept.extend
    ) as publisher:
        publisher.make_ready()
        wait_until(lambda: publisher.connected)
        with locked(place.path):
            events = events_for(publisher, ["a"])
            report = publisher.publish(events)
            assert report.kept == tuple(events)
            assert isinstance(report.error, Blocked)
            wait_until(lambda: lost and not publisher.connected)
            assert f"another process has kept {place.path} locked" in str(lost[0])
            assert kept == events
        assert publisher.drain(10)
        assert publisher.connected
    assert connected == [f"sqlite:///{place.path}"] * 2
    assert place.count(name) == 1


def test_a_consumers_events_are_withdrawn_and_not_kept_while_the_file_is_locked(
    place: SQLitePlace, publisher: Publisher, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sqlite_file, "_PATIENCE", 0.3)
    place.bind(name, place.exchange, "#")
    with locked(place.path):
        report = publisher.publish(events_for(publisher, ["a"]), keep=False)
        assert len(report.rejected) == 1
    assert publisher.kept == ()
    assert publisher.publish(events_for(publisher, ["b"])).ok or publisher.drain(10)
    assert place.execute("SELECT type FROM outbox_events") == [("b",)]


FULL_DISK = """
import resource, sys
from outbox import Event, Publisher

def limit(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

with Publisher(sys.argv[1], exchange="x", drain_timeout=20) as publisher:
    small = Event(id="small", target="a", exchange="x", body=b"s")
    large = Event(id="large", target="a", exchange="x", body=b"l" * 1_000_000)
    assert publisher.publish([small]).ok
    limit(500_000)
    report = publisher.publish([large])
    print([event.id for event in report.kept], type(report.error).__name__, publisher.connected)
    print([event.id for event in publisher.publish([small]).kept])
    limit(resource.RLIM_INFINITY)
    print(publisher.drain(20), publisher.kept)
"""


def test_events_are_kept_while_the_disk_is_full(place: SQLitePlace, name: str) -> None:
    place.bind(name, "x", "#")
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, place.url], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] in ("['large'] Blocked False", "['large'] ConnectionLost False")
    assert lines[1:] == ["['small']", "True ()"]
    rows = place.execute("SELECT id FROM outbox_events ORDER BY seq")
    assert rows == [("small",), ("large",), ("small",)]


def test_a_removed_file_is_created_again_and_nothing_is_written_to_the_old_one(
    name: str, tmp_path: Path
) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    place = SQLitePlace(str(folder / "outbox.db"), name)
    place.bind(name, place.exchange, "#")
    with place.publisher() as publisher, reading(place, name, again=True) as reader:
        publisher.publish(events_for(publisher, ["a"]))
        reader.get()
        folder.rename(tmp_path / "away")  # with the log beside it, at one go
        folder.mkdir()
        events = events_for(publisher, ["b"])
        assert publisher.publish(events).parked == tuple(events)  # the bindings are gone
        place.bind(name, place.exchange, "#")
        more = events_for(publisher, ["c"])
        assert publisher.publish(more).ok
        assert [one.message_id for one in reader.get()] == [more[0].id]


def test_events_are_kept_while_the_removed_file_cannot_be_created_again(
    place: SQLitePlace, publisher: Publisher, tmp_path: Path
) -> None:
    publisher.publish(events_for(publisher, ["a"]))
    away = tmp_path / "away"
    away.mkdir()
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(
            FileNotFoundError
        ):  # closing the last connection removes these two
            shutil.move(place.path + suffix, away)
    Path(place.path).mkdir()
    events = events_for(publisher, ["b"])
    report = publisher.publish(events)
    assert report.kept == tuple(events)
    assert "not a regular file" in str(report.error)
    Path(place.path).rmdir()
    assert publisher.drain(10)
    assert place.execute("SELECT type FROM outbox_events") == [(PARKING_QUEUE,)]


def test_events_for_a_file_that_is_not_a_database_are_kept_and_the_process_can_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "o.db"
    path.write_bytes(b"no database at all" * 1000)
    with Publisher(f"sqlite:///{path}", drain_timeout=0) as publisher:
        events = events_for(publisher, ["a"])
        report = publisher.publish(events)
        assert report.kept == tuple(events)
        assert "not a database" in str(report.error)
    assert path.read_bytes().startswith(b"no database at all")
    assert f"1 event(s) lost, never confirmed: {events[0].id!r}" in caplog.text


def test_an_event_that_no_row_can_hold_is_rejected_alone(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    place.bind(name, place.exchange, "#")
    events = events_for(publisher, ["a"] * 20)
    # Made by hand: enqueue_event would have refused it.
    events[7] = Event(id="\ud800", target="a", exchange=place.exchange, body=b"")
    report = publisher.publish(events)
    assert [one.event for one in report.rejected] == [events[7]]
    assert "cannot be stored" in report.rejected[0].reason
    assert report.published == tuple(events[:7] + events[8:])
    rows = place.execute("SELECT id FROM outbox_events ORDER BY seq")
    assert [row[0] for row in rows] == [event.id for event in report.published]


def test_events_wait_for_a_parking_queue_that_may_not_be_declared(
    place: SQLitePlace, name: str
) -> None:
    place.bind(name, place.exchange, "good")
    with place.publisher(declare="never", drain_timeout=10) as publisher:
        events = events_for(publisher, ["bad", "good"])
        report = publisher.publish(events)
        assert (report.kept, report.published) == (tuple(events[:1]), tuple(events[1:]))
        assert PARKING_QUEUE in str(report.error)
        place.bind(PARKING_QUEUE, "")
        wait_until(lambda: not publisher.kept)
    assert place.count(PARKING_QUEUE) == 1


# ----------------------------------------------------------------------------------- consuming


def test_events_published_by_the_same_process_arrive_at_once(
    place: SQLitePlace, publisher: Publisher, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for setting in ("_FIRST_POLL", "_LOOK_AGAIN"):
        monkeypatch.setattr(subscription, setting, 30.0)
    monkeypatch.setattr(SQLiteFile, "poll", 30.0)
    with reading(place, name) as reader:
        for _ in range(5):
            publisher.publish(events_for(publisher, [name]))
            reader.get(timeout=5)


def test_events_published_by_another_process_are_noticed_while_idle(
    place: SQLitePlace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subscription, "_LOOK_AGAIN", 30.0)
    place.bind("elsewhere", place.exchange, "later")
    with place.publisher() as publisher:
        publisher.publish(events_for(publisher, ["later"]))
    with reading(place, name) as reader:
        reader._subscription._poll = SQLiteFile.poll  # type: ignore[attr-defined]
        place.execute("UPDATE outbox_events SET queue = ?", name)  # on a separate connection
        begin = time.monotonic()
        assert reader.get()[0].target == "later"
        assert time.monotonic() - begin < 1


def test_a_delayed_event_arrives_when_it_is_due(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    with reading(place, name) as reader:
        [soon] = events_for(publisher, [name], delay=0.3)
        moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=0.15)
        [sooner] = events_for(publisher, [name], deliver_at=moment)
        [now] = events_for(publisher, [name])
        publisher.publish([soon, sooner, now])
        arrived = []
        for expected in (now, sooner, soon):
            [found] = reader.get()
            assert found.message_id == expected.id
            arrived.append(datetime.datetime.now(datetime.UTC))
    assert soon.deliver_at is not None
    milliseconds = datetime.timedelta(milliseconds=2)
    assert arrived[1] >= moment - milliseconds
    assert soon.deliver_at - milliseconds <= arrived[2] < soon.deliver_at + milliseconds * 250


def test_the_higher_priority_is_delivered_first(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    place.bind(name, place.exchange, "#")
    events = [events_for(publisher, ["a"], priority=one)[0] for one in (None, 5, 0, 255, 5)]
    publisher.publish(events)
    with reading(place, name, again=True, prefetch=1) as reader:
        order = [reader.get()[0].message_id for _ in events]
    assert order == [events[n].id for n in (3, 1, 4, 0, 2)]


def test_a_message_given_back_with_a_delay_is_redelivered_after_it(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    with reading(place, name, prefetch=1) as reader:
        publisher.publish(events_for(publisher, [name]))
        [found] = reader.take(1)
        begin = time.monotonic()
        reader.requeue(found, 0.3)
        reader.get()
        assert time.monotonic() - begin >= 0.29


def test_a_slow_message_stays_with_its_worker(
    place: SQLitePlace, publisher: Publisher, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SQLiteFile, "lease", 0.6)
    monkeypatch.setattr(leases, "_EXTENSIONS", 6)
    with reading(place, name) as one, reading(place, name, again=True) as other:
        publisher.publish(events_for(publisher, [name]))
        found = _taken_by_either(one, other)
        for reader in (one, other):
            with pytest.raises(AssertionError, match="0 of 1"):
                reader.take(1, timeout=0.8)
        assert found


def _taken_by_either(*readers: Any) -> Any:
    found: list[Any] = []

    def look() -> list[Any]:
        for reader in readers:
            with contextlib.suppress(AssertionError):
                found.extend(reader.take(1, timeout=0.01))
        return found

    wait_until(look)
    return found


def test_a_lost_lease_is_noticed_and_the_other_worker_settles_the_message(
    place: SQLitePlace,
    publisher: Publisher,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(leases, "_EXTENSIONS", 150)
    with reading(place, name) as reader:
        publisher.publish(events_for(publisher, [name]))
        [found] = reader.take(1)
        of_reader = reader._subscription
        assert not of_reader.is_stale(found)
        place.execute("UPDATE outbox_events SET lease_token = 'of another'")
        wait_until(lambda: of_reader.is_stale(found))
        of_reader.ack(found)
        of_reader.requeue(found, 0)
        wait_until(lambda: "other workers have claimed them" in caplog.text)
    assert place.execute("SELECT lease_token FROM outbox_events") == [("of another",)]


def test_a_message_that_is_never_settled_is_dead_lettered_with_the_reason(
    place: SQLitePlace, publisher: Publisher, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with reading(place, name):
        pass
    sent = events_for(publisher, [name, name], headers={"a": b"1"}, priority=2)
    publisher.publish(sent)
    place.execute("UPDATE outbox_events SET deliveries = 20 WHERE id = ?", sent[0].id)
    with reading(place, name, again=True) as reader:
        assert [one.message_id for one in reader.get()] == [sent[1].id]
        with reading(place, dead_letter_queue(name), again=True) as dead:
            [letter] = dead.get()
    assert (letter.message_id, letter.body, letter.priority) == (sent[0].id, sent[0].body, 2)
    headers = letter.headers or {}
    assert headers["a"] == b"1"
    assert headers["outbox-dead-queue"] == name
    assert headers["outbox-attempt"] == 1
    assert headers["outbox-dead-first-at"] == headers["outbox-dead-at"]
    assert "delivered 20 times" in headers["outbox-dead-reason"]
    assert repr(sent[0].id) in caplog.text


def test_messages_lost_several_times_are_claimed_alone_so_that_others_lose_nothing_by_them(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    with reading(place, name):
        pass
    events = events_for(publisher, [name] * 4)
    publisher.publish(events)
    sent = [event.id for event in events]
    place.execute("UPDATE outbox_events SET deliveries = 6 WHERE id != ?", sent[3])
    losses = "SELECT deliveries - 1 - attempts FROM outbox_events WHERE id = ?"
    with reading(place, name, again=True) as reader:
        [fourth] = reader.take(1)  # what was never lost doesn't wait
        assert fourth.message_id == sent[3]
        reader._subscription.ack(fourth)
        for number, each in enumerate(sent[:3]):
            [alone] = reader.take(1)
            assert alone.message_id == each
            assert place.execute(losses, each) == [(6,)]
            for later in sent[number + 1 : 3]:
                assert place.execute(losses, later) == [(5,)]  # if it dies now, they lose nothing
            with pytest.raises(AssertionError, match="0 of 1"):
                reader.take(1, timeout=0.3)
            reader._subscription.ack(alone)
        publisher.publish(events_for(publisher, [name] * 2))
        assert len(reader.take(2)) == 2


def test_a_message_given_back_repeatedly_is_not_taken_for_a_deadly_one(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    with reading(place, name) as reader:
        publisher.publish(events_for(publisher, [name]))
        for _ in range(25):
            reader.requeue(reader.take(1)[0])
        assert reader.get()[0].redelivered


def test_queues_are_bound_to_their_names_and_topics_and_have_dead_letter_queues(
    place: SQLitePlace, name: str
) -> None:
    with reading(place, name, ["a.*", "#.z"]):
        rows = place.execute("SELECT * FROM outbox_bindings WHERE queue LIKE ?", f"{name}%")
    assert set(rows) == {
        (name, "", name),
        (f"{name}.dead", "", f"{name}.dead"),
        (name, place.exchange, name),
        (name, place.exchange, "a.*"),
        (name, place.exchange, "#.z"),
    }


@pytest.mark.parametrize("declare", ["passive", "never"])
def test_a_worker_that_may_not_declare_names_the_missing_queue(
    place: SQLitePlace, name: str, declare: Any
) -> None:
    @consumer(name)
    def nothing(event: ReceivedEvent) -> None: ...

    with place.publisher(declare=declare) as publisher:
        worker = Worker([nothing], publisher=publisher)
        worker.start()
        try:
            with pytest.raises(UsageError, match=f"no queue '{name}"):
                worker.wait(10)
        finally:
            worker.stop()
    assert place.execute("SELECT * FROM outbox_bindings") == []


def test_a_worker_holds_its_message_while_the_file_is_locked_and_then_continues(
    place: SQLitePlace,
    publisher: Publisher,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sqlite_file, "_PATIENCE", 0.3)
    begun, go_on = threading.Event(), threading.Event()
    runs: list[str] = []

    @consumer(name, auto_publish=True)
    def act(event: ReceivedEvent) -> None:
        from outbox import enqueue_event

        runs.append(event.id)
        enqueue_event({}, f"{name}-next")
        begun.set()
        go_on.wait(10)

    with reading(place, f"{name}-next") as reader, reading(place, name):
        pass
    worker = Worker([act], publisher=publisher)
    worker.start()
    publisher.publish(events_for(publisher, [name]))
    assert begun.wait(10)
    with locked(place.path):
        go_on.set()
        wait_until(lambda: "holding message" in caplog.text)
    with reading(place, f"{name}-next", again=True) as reader:
        reader.get()
    wait_until(lambda: place.execute("SELECT * FROM outbox_events") == [])
    assert worker.stop(10)
    assert len(runs) >= 2
    assert len(set(runs)) == 1


def test_a_worker_continues_after_the_file_was_locked_for_long(
    place: SQLitePlace,
    publisher: Publisher,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sqlite_file, "_PATIENCE", 0.1)
    with reading(place, name) as reader:
        publisher.publish(events_for(publisher, [name] * 2))
        first, second = reader.take(2)
        with locked(place.path), caplog.at_level(logging.ERROR, "outbox.consumer"):
            reader._subscription.ack(first)
            wait_until(lambda: "cannot consume" in caplog.text)
        wait_until(lambda: len(place.execute("SELECT 1 FROM outbox_events")) == 1)
        reader._subscription.ack(second)
        wait_until(lambda: place.execute("SELECT 1 FROM outbox_events") == [])
