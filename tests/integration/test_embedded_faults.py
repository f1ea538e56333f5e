"""The embedded transport while its file is replaced, its disk is full, or its clock jumps."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sqlite3
import subprocess
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox import Blocked, Event, Publisher
from outbox.consumers import Consumer, ReceivedEvent, RetryPolicy
from outbox.transports import outages
from outbox.transports.database import subscription
from outbox.transports.database.clock_jumps import ClockJumps
from outbox.transports.database.database import Room
from outbox.transports.database.sqlite import sqlite_file
from tests.places import Reader, SQLitePlace, events_for, made, reading, working
from tests.waiting import wait_until


@pytest.fixture
def place(tmp_path: Path, name: str) -> SQLitePlace:
    folder = tmp_path / "disk"
    folder.mkdir()
    return SQLitePlace(str(folder / "outbox.db"), name)


@pytest.fixture
def publisher(place: SQLitePlace) -> Iterator[Publisher]:
    with place.publisher(drain_timeout=10) as publisher:
        yield publisher


def delete_file(place: SQLitePlace) -> None:
    for path in Path(place.path).parent.iterdir():
        path.unlink()


def nothing_arrives(reader: Reader, timeout: float) -> None:
    with pytest.raises(AssertionError, match="0 of 1"):
        reader.take(1, timeout=timeout)


# ------------------------------------------------------------------------------------ the clock


class JumpingClock:
    """The machine's clock, and a file as it looks once that has jumped forward."""

    def __init__(self, place: SQLitePlace) -> None:
        self._place = place
        self._ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self._ahead

    def jump(self, seconds: float) -> None:
        with contextlib.closing(sqlite3.connect(self._place.path, timeout=10)) as connection:
            connection.isolation_level = None
            connection.execute("BEGIN IMMEDIATE")  # nobody changes the file in the moment between
            self._ahead += seconds
            connection.execute(
                "UPDATE outbox_events SET available_at = available_at - ?,"
                " stored_at = stored_at - ?",
                (seconds, seconds),
            )
            connection.execute("COMMIT")


def test_a_worker_never_gets_a_message_that_it_has_in_hand(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    with reading(place, name) as reader:
        first, second = events_for(publisher, [name, name])
        publisher.publish([first])
        [held] = reader.take(1)
        # The lease has ended, and there is nothing by which the worker could know.
        place.execute("UPDATE outbox_events SET available_at = available_at - 60")
        publisher.publish([second])
        assert [delivery.message_id for delivery in reader.get()] == [second.id]
        nothing_arrives(reader, 1.0)
        [(remaining,)] = place.execute("SELECT available_at - unixepoch() FROM outbox_events")
        assert remaining > 20  # extended
        reader._subscription.ack(held)
        wait_until(lambda: place.execute("SELECT count(*) FROM outbox_events") == [(0,)])


def test_what_a_worker_gives_back_is_not_taken_for_a_message_in_hand(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    with reading(place, name, prefetch=1) as reader:
        publisher.publish(events_for(publisher, [name]))
        for _ in range(3):
            [delivery] = reader.take(1)
            reader.requeue(delivery, 0)
        reader.get()


def test_when_the_clock_jumps_no_worker_takes_what_another_one_has_in_hand(
    place: SQLitePlace,
    publisher: Publisher,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = JumpingClock(place)
    monkeypatch.setattr(subscription, "ClockJumps", functools.partial(ClockJumps, clock))
    # The first worker has no room for more, so it has no other reason to look at the file.
    with reading(place, name, prefetch=1) as busy:
        events = events_for(publisher, [name, name])
        publisher.publish(events[:1])
        [held] = busy.take(1)
        with reading(place, name, again=True) as idle:
            clock.jump(3600)
            nothing_arrives(idle, 2.5)
            publisher.publish(events[1:])
            assert [delivery.message_id for delivery in idle.get()] == [events[1].id]
        assert not busy._subscription.is_stale(held)
        busy._subscription.ack(held)
        wait_until(lambda: place.execute("SELECT count(*) FROM outbox_events") == [(0,)])
    assert "the clock has jumped 3600 s forward" in caplog.text


# ------------------------------------------------------------------------------------- the file


@pytest.mark.parametrize("prefetch", [1, 10], ids=["without room", "with room"])
def test_a_worker_makes_its_queue_in_a_file_that_replaces_the_old_one(
    place: SQLitePlace,
    publisher: Publisher,
    name: str,
    prefetch: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with reading(place, name, ["order.*"], prefetch=prefetch) as reader:
        events = events_for(publisher, [name, "order.placed", name])
        publisher.publish(events[:1])
        [held] = reader.take(1)
        delete_file(place)
        report = publisher.publish(events[1:])
        assert report.published == tuple(events[1:])
        received = reader.get(2) if prefetch > 1 else reader.get() + reader.get()
        assert [delivery.message_id for delivery in received] == [each.id for each in events[1:]]
        # Its number may be that of a message in the new file by now.
        assert reader._subscription.is_stale(held)
    lines = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    replaced = [line for line in lines if "was deleted or replaced by another file" in line]
    assert len(replaced) == 2, lines  # the publisher's and the worker's
    assert any("1 message(s) of the old one can't be acknowledged" in line for line in replaced)


def await_queue(place: SQLitePlace, name: str) -> None:
    wait_until(lambda: ("outbox_bindings",) in place.execute("SELECT name FROM sqlite_master"))
    wait_until(lambda: (name,) in place.execute("SELECT queue FROM outbox_bindings"))


def test_an_idle_worker_makes_its_queue_before_anything_is_published(
    place: SQLitePlace, name: str
) -> None:
    with reading(place, name):
        delete_file(place)
        wait_until(lambda: Path(place.path).exists())
        await_queue(place, name)


def test_a_file_whose_tables_were_dropped_gets_its_queues_again(
    place: SQLitePlace, publisher: Publisher, name: str
) -> None:
    with reading(place, name) as reader:
        events = events_for(publisher, [name, name])
        publisher.publish(events[:1])
        reader.get()
        place.execute("DROP TABLE outbox_events")
        place.execute("DROP TABLE outbox_bindings")
        # Until the worker has looked, events for its queue are parked, as in any new file.
        await_queue(place, name)
        wait_until(lambda: publisher.publish(events[1:]).published or publisher.drain(10))
        assert [delivery.message_id for delivery in reader.get()] == [events[1].id]


# ------------------------------------------------------------------------------------- the disk


def large_events(count: int, size: int, target: str, exchange: str) -> list[Event]:
    return [
        Event(id=str(uuid.uuid4()), target=target, exchange=exchange, body=b'"%b"' % (b"z" * size))
        for _ in range(count)
    ]


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[None]:
    mount = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)]
    if os.geteuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk, where the system lets it")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("failures", [0, 1], ids=["all succeed", "all are retried"])
@pytest.mark.slow
def test_a_disk_that_the_backlog_has_filled_is_emptied_by_a_worker(
    tmp_path: Path, name: str, failures: int
) -> None:
    processed: set[str] = set()

    class Take(Consumer):
        queue = name
        retry = RetryPolicy(delay=0.5)

        def process(self, event: ReceivedEvent) -> None:
            if event.attempt <= failures:
                raise RuntimeError("not yet")
            processed.add(event.id)

    with small_disk(tmp_path, 32):
        place = SQLitePlace(str(tmp_path / "outbox.db"), name)
        made(place, name)
        with place.publisher(drain_timeout=0) as publisher:
            published = 0
            while not publisher.kept:
                events = large_events(20, 20_000, name, name)
                published += len(publisher.publish(events).published)
                assert published < 3_000
            kept = len(publisher.kept)
            assert published > 400  # most of the disk was used
            with working(publisher, Take):
                wait_until(lambda: len(processed) == published + kept, timeout=60)
            assert publisher.kept == ()


def test_copies_of_messages_are_written_where_new_events_have_no_room(
    place: SQLitePlace, publisher: Publisher, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.bind(name, "x", "#")
    monkeypatch.setattr(sqlite_file, "room_at", lambda path: Room(0, 10_000))
    new = large_events(2, 1000, "a", "x")
    assert publisher.publish(new).kept == tuple(new)
    copies = large_events(3, 1000, "a", "x")
    with place.publisher() as of_worker:
        assert of_worker.publish(copies, keep=False).ok
        assert place.count(name) == 3
        report = of_worker.publish(large_events(1, 20_000, "a", "x"), keep=False)
        assert len(report.rejected) == 1
    assert publisher.kept == tuple(new)
    monkeypatch.setattr(sqlite_file, "room_at", lambda path: Room(10_000, 10_000))


@pytest.mark.slow
def test_while_only_the_workers_reserve_is_left_events_are_kept_with_growing_pauses(
    place: SQLitePlace,
    publisher: Publisher,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    place.bind(name, place.exchange, "#")
    room = 0
    looks: list[float] = []

    def room_at(path: str) -> Room:
        looks.append(time.monotonic())
        return Room(room, room)

    monkeypatch.setattr(sqlite_file, "room_at", room_at)
    caplog.set_level(logging.WARNING, "outbox.publisher")
    events = events_for(publisher, ["a"])
    report = publisher.publish(events)
    assert report.kept == tuple(events)
    assert isinstance(report.error, Blocked)
    assert "reserved for workers" in str(report.error)
    wait_until(lambda: len(looks) >= 8)  # twice each time: before and after truncating the log
    assert not publisher.connected
    assert caplog.text.count("; retrying") == 1
    monkeypatch.setattr(outages, "_REMINDED_EVERY", 0.1)
    wait_until(lambda: "s, 1 event(s) kept; retrying" in caplog.text)
    room = 10_000_000
    assert publisher.drain(20)
    wait_until(lambda: "works again, after" in caplog.text)
    assert place.count(name) == 1


def test_a_large_chunk_fills_the_room_that_there_is(
    place: SQLitePlace, publisher: Publisher, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.bind(name, "x", "#")
    place.bind(f"{name}-copy", "x", "#")  # a row for each queue
    monkeypatch.setattr(sqlite_file, "room_at", lambda path: Room(30_000, 30_000))
    publisher.publish(large_events(25, 1000, "a", "x"))
    wait_until(lambda: place.count(name) >= 12)
    assert publisher.drain(20)
    assert place.count(name) == place.count(f"{name}-copy") == 25
    event = large_events(1, 20_000, "a", "x")
    assert publisher.publish(event).kept == tuple(event)
    monkeypatch.setattr(sqlite_file, "room_at", lambda path: Room(50_000, 50_000))
    assert publisher.drain(20)
