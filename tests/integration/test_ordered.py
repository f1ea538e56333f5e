"""Ordered consumers: one message of a key at a time, in the order in which they were stored."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outbox import Event, EventCollector, Publisher, UsageError, exit_codes
from outbox.consumers import REJECT, REQUEUE, ReceivedEvent, RetryPolicy, Worker, consumer
from outbox.messages.delivery import dead_letter_queue
from outbox.messages.rows import values_of
from outbox.storage.store import Store
from tests.consuming import Command
from tests.integration.test_store import an_event, payloads
from tests.places import (
    DatabasePlace,
    database_place_of,
    made,
    selected,
    working,
)
from tests.waiting import wait_until


@pytest.fixture(params=["sqlite", "postgresql", "mariadb"])
def place(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> DatabasePlace:
    return database_place_of(request.param, request, name, tmp_path)


@pytest.fixture
def publisher(place: DatabasePlace) -> Iterator[Publisher]:
    with place.publisher() as found:
        yield found


def send(publisher: Publisher, queue: str, *keys: str | None, **options: Any) -> list[Event]:
    """Publish a message for each key, numbered from 0."""
    collector = EventCollector(publisher=publisher)
    sent = [
        collector.enqueue_event({"n": n}, queue, exchange="", key=key, **options)
        for n, key in enumerate(keys)
    ]
    assert publisher.publish(sent).ok
    return sent


class Log:
    """What handlers have done, and whether two ever had messages of one key."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running: set[str] = set()
        self.overlaps: list[str] = []
        self.seen: dict[str, list[Any]] = defaultdict(list)

    @contextlib.contextmanager
    def handling(self, event: ReceivedEvent, key: str) -> Iterator[None]:
        with self._lock:
            if key in self._running:
                self.overlaps.append(key)
            self._running.add(key)
            self.seen[key].append(event.payload["n"])
        try:
            yield
        finally:
            with self._lock:
                self._running.discard(key)

    def __len__(self) -> int:
        return sum(map(len, self.seen.values()))


def test_two_workers_take_turns_with_each_key_and_keep_its_order(
    place: DatabasePlace, publisher: Publisher, name: str
) -> None:
    queue = made(place, name)
    log = Log()

    @consumer(queue, ordered=True)
    def work(event: ReceivedEvent) -> None:
        with log.handling(event, event.headers["k"]):
            time.sleep(0.001)

    collector = EventCollector(publisher=publisher)
    sent = []
    for n in range(210):
        key = f"k{n % 7}"
        options: dict[str, Any] = {"key": key, "priority": n % 3, "headers": {"k": key}}
        sent.append(collector.enqueue_event({"n": n}, queue, exchange="", **options))
    with (
        working(publisher, work, threads=4),
        place.publisher() as other,
        working(other, work, threads=4),
    ):
        for start in range(0, 210, 30):
            assert publisher.publish(sent[start : start + 30]).ok
        wait_until(lambda: len(log) >= 210, 30)
    assert log.overlaps == []
    assert log.seen == {f"k{key}": list(range(key, 210, 7)) for key in range(7)}
    assert place.count(queue) == 0


def test_a_retry_holds_up_its_key_alone_and_a_dead_letter_does_not(
    place: DatabasePlace, publisher: Publisher, name: str
) -> None:
    queue = made(place, name)
    seen: list[tuple[int, int, float]] = []

    @consumer(queue, ordered=True, retry=RetryPolicy(max_attempts=3, delay=0.3))
    def work(event: ReceivedEvent) -> None:
        seen.append((event.payload["n"], event.attempt, time.monotonic()))
        if event.payload["n"] == 0:
            raise ValueError("not now")

    send(publisher, queue, "a", "a", "b", "a", None)
    with working(publisher, work, threads=4):
        wait_until(lambda: len(seen) == 7)
        wait_until(lambda: place.count(queue) == 0)
    order = [(n, attempt) for n, attempt, _ in seen]
    assert [each for each in order if each[0] in (0, 1, 3)] == [
        (0, 1),
        (0, 2),
        (0, 3),
        (1, 1),
        (3, 1),
    ]
    assert {order.index((2, 1)), order.index((4, 1))} <= {0, 1, 2}
    times = [at for n, _, at in seen if n == 0]
    assert all(later - earlier >= 0.29 for earlier, later in itertools.pairwise(times))
    [dead] = selected(place, dead_letter_queue(queue))
    assert dead.attempts == 3


def test_what_is_requeued_or_rejected_keeps_its_place_or_leaves_it(
    place: DatabasePlace, publisher: Publisher, name: str
) -> None:
    queue = made(place, name)
    seen: list[int] = []

    @consumer(queue, ordered=True)
    def work(event: ReceivedEvent) -> Any:
        seen.append(event.payload["n"])
        if event.payload["n"] == 0 and seen.count(0) == 1:
            return REQUEUE
        return REJECT if event.payload["n"] == 1 else None

    send(publisher, queue, "a", "a", "a")
    with working(publisher, work, threads=4):
        wait_until(lambda: len(seen) == 4)
    assert seen == [0, 0, 1, 2]


def test_a_scheduled_event_holds_up_its_key_only_from_its_time_on(
    place: DatabasePlace, publisher: Publisher, name: str
) -> None:
    queue = made(place, name)
    log = Log()
    go_on = threading.Event()

    @consumer(queue, ordered=True)
    def work(event: ReceivedEvent) -> None:
        with log.handling(event, "a"):
            if event.payload["n"] == 1:
                assert go_on.wait(10)

    collector = EventCollector(publisher=publisher)
    scheduled = collector.enqueue_event({"n": 0}, queue, exchange="", key="a", delay=3600)
    others = [collector.enqueue_event({"n": n}, queue, exchange="", key="a") for n in (1, 2)]
    with working(publisher, work, threads=4) as worker:
        wait_until(lambda: worker.is_consuming)
        assert publisher.publish([scheduled, *others]).ok
        wait_until(lambda: log.seen["a"] == [1])
        # Now the scheduled one is due.
        place.execute("UPDATE outbox_events SET available_at = stored_at WHERE deliveries = 0")
        time.sleep(0.3)
        assert log.seen["a"] == [1]
        go_on.set()
        wait_until(lambda: len(log) == 3)
    assert log.seen["a"] == [1, 0, 2]
    assert log.overlaps == []


def test_nothing_of_a_key_is_claimed_while_any_row_of_it_is_in_hand(store: Store) -> None:
    # A transaction may commit its row after one that was stored later.
    store.put_rows([values_of(an_event("early", key="a"), queue="q") | {"seq": 7}])
    [early] = store.claim(5, queue="q", one_a_key=True)
    store.put_rows([values_of(an_event("late", key="a"), queue="q", rank=9) | {"seq": 3}])
    store.put_rows([values_of(an_event("other", key="b"), queue="q") | {"seq": 8}])
    assert payloads(store.claim(5, queue="q", one_a_key=True)) == ["other"]
    assert store.back_off(early, 0.0, {"x": 1})
    [late] = store.claim(5, queue="q", one_a_key=True)
    assert late.event.payload == "late"
    assert store.complete([late]) == 1
    [again] = store.claim(5, queue="q", one_a_key=True)
    assert (again.event.payload, again.event.headers) == ("early", {"x": 1})
    assert (again.deliveries, again.attempts) == (2, 1)


def test_a_worker_does_not_look_all_the_time_while_a_key_waits(
    place: DatabasePlace,
    publisher: Publisher,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue = made(place, name)
    began, go_on = threading.Event(), threading.Event()

    @consumer(queue, ordered=True)
    def work(event: ReceivedEvent) -> None:
        began.set()
        assert go_on.wait(10)

    claims: list[float] = []
    claim = Store.claim

    def counted(self: Store, *arguments: Any, **options: Any) -> Any:
        claims.append(time.monotonic())
        return claim(self, *arguments, **options)

    send(publisher, queue, *["a"] * 50)
    monkeypatch.setattr(Store, "claim", counted)
    with working(publisher, work, threads=4):
        assert began.wait(10)
        time.sleep(0.5)
        claims.clear()
        time.sleep(1.0)
        looks = len(claims)
        sent_at = time.monotonic()
        send(publisher, queue, "b")
        wait_until(lambda: any(at > sent_at for at in claims))
        go_on.set()
        wait_until(lambda: place.count(queue) == 0)
    assert looks <= 15


def test_an_ordered_consumer_needs_a_database() -> None:
    @consumer("q", ordered=True)
    def work(event: ReceivedEvent) -> None: ...

    with (
        Publisher("amqp://guest@localhost") as publisher,
        pytest.raises(UsageError, match="'q' is ordered, but amqp:// keeps no order of keys"),
    ):
        Worker([work], publisher=publisher)
    with pytest.raises(UsageError, match="ordered is 1, not a bool"):
        consumer("q", ordered=1)(print)  # type: ignore[arg-type]


WORKER = """
import os, sys, time
from outbox import Publisher
from outbox.consumers import RetryPolicy, Worker, consumer
from outbox.transports.database.server.server_database import ServerDatabase
from outbox.transports.database.sqlite.sqlite_file import SQLiteFile

_, url, exchange, queue, seen = sys.argv
ServerDatabase.lease = SQLiteFile.lease = 2.0
log = os.open(seen, os.O_WRONLY | os.O_APPEND)


def note(what, event):
    line = f"{what} {event.payload['key']} {event.payload['n']} {os.getpid()}"
    os.write(log, (line + chr(10)).encode())


@consumer(queue, ordered=True, retry=RetryPolicy(max_attempts=2, delay=0.05))
def work(event):
    note("began", event)
    time.sleep(0.002)
    note("ended", event)
    if event.payload["n"] % 10 == 0 and event.attempt == 1:
        raise ValueError


with Publisher(url, exchange=exchange) as publisher:
    worker = Worker([work], publisher=publisher, threads=4)
    worker.start()
    print("started", flush=True)
    sys.stdin.read()
    assert worker.stop(20)
"""


@contextlib.contextmanager
def worker_process(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.one_python
def test_kills_of_workers_change_neither_order_nor_turns(
    place: DatabasePlace, publisher: Publisher, name: str, tmp_path: Path
) -> None:
    queue = made(place, name)
    seen = tmp_path / "seen"
    seen.touch()
    keys, each = 8, 20
    arguments = (place.url, place.exchange, queue, str(seen))
    collector = EventCollector(publisher=publisher)
    sent = [
        collector.enqueue_event({"key": key, "n": n}, queue, exchange="", key=f"k{key}")
        for n in range(each)
        for key in range(keys)
    ]
    assert publisher.publish(sent).ok
    killed: set[str] = set()
    with contextlib.ExitStack() as stack:
        victims = [stack.enter_context(worker_process(*arguments)) for _ in range(2)]
        last = stack.enter_context(worker_process(*arguments))
        for number, victim in enumerate(victims, 1):
            wait_until(lambda: seen.read_text().count("\n") > 80 * number)  # noqa: B023
            victim.send_signal(signal.SIGKILL)
            killed.add(str(victim.pid))
        wait_until(lambda: place.count(queue) == 0, 30)
        last.communicate("", timeout=20)
        assert last.returncode == 0
    in_hand: dict[str, tuple[str, str]] = {}
    order: dict[str, list[int]] = defaultdict(list)
    for line in seen.read_text().splitlines():
        what, key, n, pid = line.split()
        if what == "ended":
            assert in_hand.pop(key) == (n, pid)
            continue
        if key in in_hand:  # what the killed worker had begun, and nothing else, comes again
            assert in_hand[key][1] in killed
            assert in_hand[key][0] == n
        in_hand[key] = (n, pid)
        order[key].append(int(n))
    assert in_hand == {}
    for numbers in order.values():
        assert numbers == sorted(numbers)
        assert sorted(set(numbers)) == list(range(each))
        assert numbers.count(10) >= 2  # tried again, in its place


CONSUMERS = """
import os, time
from outbox.consumers import RetryPolicy, consumer


def note(what, event):
    line = f"{what} {event.payload['key']} {event.payload['n']} {os.getpid()} {os.getppid()}"
    log = os.open("seen", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(log, (line + chr(10)).encode())
    os.close(log)


@consumer("QUEUE", ordered=True, retry=RetryPolicy(max_attempts=5, delay=0.05))
def work(event):
    note("began", event)
    time.sleep(0.01)
    note("ended", event)
    if event.payload["n"] % 10 == 0 and event.attempt == 1:
        raise ValueError
"""


def followed(seen: Path, killed: set[str]) -> dict[str, list[int]]:
    """Return the numbers of each key in the order in which they began.

    Only what a killed process had begun may begin again before it has ended, and nothing else of
    its key meanwhile.
    """
    in_hand: dict[str, tuple[str, set[str]]] = {}
    order: dict[str, list[int]] = defaultdict(list)
    for line in seen.read_text().splitlines():
        what, key, n, *processes = line.split()
        if what == "ended":
            assert in_hand.pop(key) == (n, set(processes)), line
            continue
        if key in in_hand:
            assert in_hand[key][1] & killed, (in_hand[key], line)
            assert in_hand[key][0] == n, (in_hand[key], line)
        in_hand[key] = (n, set(processes))
        order[key].append(int(n))
    assert in_hand == {}
    return order


@pytest.mark.one_python
@pytest.mark.parametrize("isolated", [False, True], ids=["threads", "isolated"])
@pytest.mark.parametrize("place", ["postgresql", "mariadb"], indirect=True)
@pytest.mark.slow
def test_worker_processes_under_a_parent_keep_the_order_though_some_are_killed(
    place: DatabasePlace, publisher: Publisher, name: str, tmp_path: Path, isolated: bool
) -> None:
    keys, each = 6, 15
    command = Command(tmp_path, place, name)
    command.write(CONSUMERS.replace("QUEUE", name))
    seen = tmp_path / "seen"
    seen.touch()
    killed: set[str] = set()
    try:
        command.start(
            "-p", "3", *(["-t", "1", "--isolate", "process"] if isolated else ["-t", "2"])
        )
        workers = command.consuming(3)
        collector = EventCollector(publisher=publisher)
        sent = [
            collector.enqueue_event({"key": key, "n": n}, name, exchange="", key=f"k{key}")
            for n in range(each)
            for key in range(keys)
        ]
        assert publisher.publish(sent).ok
        for number, worker in enumerate(workers[:2], 1):
            wait_until(lambda: seen.read_text().count("\n") > 40 * number, 30)  # noqa: B023
            killed.add(str(worker))
            os.kill(worker, signal.SIGKILL)
        if isolated:  # a handler's process alone, too
            wait_until(lambda: seen.read_text().count("\n") > 120, 30)
            for victim in [line.split()[3] for line in seen.read_text().splitlines()][::-1]:
                killed.add(victim)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(victim), signal.SIGKILL)
                    break
        left = "SELECT id, queue, attempts, deliveries, reason FROM outbox_events"
        wait_until(lambda: place.execute(left) == [], 30)
        assert command.stop() == exit_codes.SUCCESS
    finally:
        command.close()
    order = followed(seen, killed)
    for numbers in order.values():
        assert numbers == sorted(numbers)
        assert sorted(set(numbers)) == list(range(each))
    # Tried again, in their places; an attempt may have been lost with its process.
    assert sum(numbers.count(0) + numbers.count(10) for numbers in order.values()) >= 3 * keys
