"""Messages of a worker that wait: for a database, for room in a queue, for their own first run."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from outbox import Publisher, auto_publishing, enqueue_event, publish, publish_async
from outbox.consumers import Consumer, ReceivedEvent, RetryPolicy, Worker, consumer
from outbox.consumers.message import message, republishing
from outbox.consumers.message.message import Message
from outbox.consumers.worker import in_flight
from outbox.messages.delivery import dead_letter_queue
from outbox.testing.broker import PrivateBroker
from tests.amqp import Inspector
from tests.places import Place, RabbitMQPlace, events_for, made, reading, working
from tests.waiting import wait_until


class Database:
    """A SQLite database of the application, which another connection can lock."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._other = sqlite3.connect(path, isolation_level=None, check_same_thread=False)

    def lock(self) -> None:
        self._other.execute("BEGIN EXCLUSIVE")

    def unlock(self) -> None:
        self._other.execute("ROLLBACK")

    def use(self) -> None:
        """Read from it, on a new connection; raise sqlite3.OperationalError while it is locked."""
        with contextlib.closing(sqlite3.connect(self._path, timeout=0)) as connection:
            connection.execute("SELECT * FROM sqlite_master").fetchall()

    def close(self) -> None:
        self._other.close()


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    database = Database(tmp_path / "application.db")
    yield database
    database.close()


class Runs:
    """The runs of a handler, as (number of the message, number of the attempt)."""

    def __init__(self, act: Callable[[ReceivedEvent], object] = lambda event: None) -> None:
        self.begun: list[tuple[int, int]] = []
        self.done: list[int] = []
        self._act = act

    def __call__(self, event: ReceivedEvent) -> None:
        self.begun.append((event.payload["n"], event.attempt))
        self._act(event)
        self.done.append(event.payload["n"])


def of(queue: str, runs: Runs, *, is_async: bool = False, **options: Any) -> Consumer:
    """Return a plain or an asynchronous consumer that calls ``runs``."""

    def process(event: ReceivedEvent) -> None:
        runs(event)

    async def process_as_task(event: ReceivedEvent) -> None:
        runs(event)

    return consumer(queue, **options)(process_as_task if is_async else process)


def send(publisher: Publisher, queue: str, count: int) -> list[str]:
    events = events_for(publisher, [queue] * count, exchange="")
    assert publisher.publish(events).ok
    return [event.id for event in events]


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_while_a_database_is_away_its_queue_waits_and_the_others_go_on(
    place: Place, name: str, database: Database, is_async: bool
) -> None:
    needing, other = Runs(lambda event: database.use()), Runs()
    consumers = [
        of(made(place, name), needing, is_async=is_async),
        of(made(place, f"{name}-other"), other, is_async=is_async),
    ]
    with place.publisher() as publisher:
        with working(publisher, *consumers, threads=2, concurrency=2):
            database.lock()
            send(publisher, name, 20)
            wait_until(lambda: needing.begun)
            send(publisher, f"{name}-other", 200)
            wait_until(lambda: len(other.done) == 200, 3)
            time.sleep(0.5)
            assert not needing.done
            assert len(needing.begun) <= 5  # two at first, and one at a time from then on
            database.unlock()
            wait_until(lambda: len(needing.done) == 20)
    assert sorted(needing.done) == list(range(20))
    assert place.count(name) == place.count(dead_letter_queue(name)) == 0


def test_a_single_thread_keeps_the_order_of_a_queue_that_waits(
    place: Place, name: str, database: Database
) -> None:
    needing, other = Runs(lambda event: database.use()), Runs()
    consumers = [of(made(place, name), needing), of(made(place, f"{name}-other"), other)]
    with place.publisher() as publisher, working(publisher, *consumers, threads=1):
        database.lock()
        send(publisher, name, 5)
        wait_until(lambda: needing.begun)
        send(publisher, f"{name}-other", 5)
        wait_until(lambda: len(other.done) == 5)
        database.unlock()
        wait_until(lambda: len(needing.done) == 5)
    assert needing.done == list(range(5))
    assert {n for n, _ in needing.begun[:-4]} == {0}


def test_messages_that_wait_do_not_hold_up_a_stop_and_are_redelivered(
    place: Place, name: str, database: Database
) -> None:
    needing = Runs(lambda event: database.use())
    database.lock()
    with place.publisher() as publisher:
        with working(publisher, of(made(place, name), needing)) as worker:
            send(publisher, name, 5)
            wait_until(lambda: len(needing.begun) >= 3)
            begin = time.monotonic()
            assert worker.stop(20)
            assert time.monotonic() - begin < 5
        assert not needing.done
        database.unlock()
        with working(publisher, of(name, needing)):
            wait_until(lambda: len(needing.done) == 5)
    assert sorted(needing.done) == list(range(5))


def test_a_queue_with_a_lower_rank_does_not_wait_for_one_that_is_closed(
    place: Place, name: str, database: Database
) -> None:
    needing, other = Runs(lambda event: database.use()), Runs()
    low = f"{name}-low"
    consumers = [of(made(place, name), needing), of(made(place, low), other)]
    with place.publisher() as publisher:
        database.lock()
        with working(publisher, *consumers, prefetch=4, ranks={name: 0, low: 1}):
            send(publisher, name, 10)
            wait_until(lambda: needing.begun)
            send(publisher, low, 20)
            wait_until(lambda: len(other.done) == 20)
            database.unlock()
            wait_until(lambda: len(needing.done) == 10)


# ------------------------------------------------------------------------- queues without room


@pytest.fixture
def full(amqp_url: str, name: str, inspector: Inspector) -> RabbitMQPlace:
    """RabbitMQ, with a full queue ``<name>-full`` that refuses what is published."""
    place = RabbitMQPlace(amqp_url, name, inspector)
    limits = {"x-max-length": 1, "x-overflow": "reject-publish", "x-queue-type": "classic"}
    inspector.queue(f"{name}-full", arguments=limits)
    inspector.publish(f"{name}-full", b"{}")
    wait_until(lambda: inspector.count(f"{name}-full") == 1)
    return place


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
@pytest.mark.parametrize("threads", [1, 2])
def test_refused_follow_on_events_are_published_again_and_not_their_handler_run_again(
    full: RabbitMQPlace, inspector: Inspector, name: str, is_async: bool, threads: int
) -> None:
    target = f"{name}-full"
    runs = Runs(lambda event: enqueue_event({"of": event.payload["n"]}, target, exchange=""))
    other = Runs()
    consumers = [
        of(made(full, name), runs, is_async=is_async, auto_publish=True),
        of(made(full, f"{name}-other"), other, is_async=is_async),
    ]
    with full.publisher() as publisher:
        with working(publisher, *consumers, threads=threads, concurrency=threads) as worker:
            send(publisher, name, 3)
            wait_until(lambda: len(runs.begun) == 3)
            send(publisher, f"{name}-other", 20)
            wait_until(lambda: len(other.done) == 20)
            assert worker._subscription.out(name) == 3
            received = [inspector.get(target)]
            for _ in range(3):  # there is room for one at a time
                received.append(inspector.get(target, 30))
            wait_until(lambda: worker._subscription.out(name) == 0)
    assert runs.begun == [(n, 1) for n, _ in runs.begun]
    assert len(runs.begun) == 3
    assert {each.payload.get("of") for each in received} == {None, 0, 1, 2}
    assert inspector.all(name) == []


def test_follow_on_events_that_are_refused_for_too_long_are_a_failed_attempt(
    full: RabbitMQPlace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(republishing, "PATIENCE", 1.0)
    runs = Runs(lambda event: enqueue_event({}, f"{name}-full", exchange=""))
    with full.publisher() as publisher:
        with working(publisher, of(made(full, name), runs, auto_publish=True)):
            send(publisher, name, 1)
            wait_until(lambda: full.count(dead_letter_queue(name)) == 1)
    assert runs.begun == [(0, 1)]
    with reading(full, dead_letter_queue(name), again=True) as letters:
        [letter] = letters.get()
    assert "FollowOnsRefused" in (letter.headers or {})["outbox-dead-reason"]


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_a_handler_whose_own_publishing_is_refused_runs_again_seldom(
    full: RabbitMQPlace,
    inspector: Inspector,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    is_async: bool,
) -> None:
    monkeypatch.setattr(message, "_REFUSED", (1.0, 1.0))
    runs: list[float] = []

    @consumer(made(full, name))
    def act(event: ReceivedEvent) -> None:
        runs.append(time.monotonic())
        enqueue_event({}, f"{name}-full", exchange="")
        publish()

    @consumer(name)
    async def act_as_task(event: ReceivedEvent) -> None:
        runs.append(time.monotonic())
        enqueue_event({}, f"{name}-full", exchange="")
        await publish_async()

    with full.publisher() as publisher:
        with working(publisher, act_as_task if is_async else act) as worker:
            send(publisher, name, 1)
            wait_until(lambda: len(runs) == 2)
            assert runs[1] - runs[0] >= 1.0
            inspector.get(f"{name}-full")
            inspector.get(f"{name}-full")
            wait_until(lambda: worker._subscription.out(name) == 0)
    assert len(runs) in (2, 3)  # there may have been room in time for the second
    assert full.count(dead_letter_queue(name)) == 0


def test_a_handler_whose_own_publishing_is_refused_for_too_long_has_failed(
    full: RabbitMQPlace, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(message, "_REFUSED", (0.2, 0.2))
    monkeypatch.setattr(message, "PATIENCE", 0.5)

    class Refused(Consumer):
        queue = made(full, name)
        retry = RetryPolicy(max_attempts=2, delay=0)

        def process(self, event: ReceivedEvent) -> None:
            attempts.append(event.attempt)
            enqueue_event({}, f"{name}-full", exchange="")
            publish()

    attempts: list[int] = []
    with full.publisher() as publisher, working(publisher, Refused):
        send(publisher, name, 1)
        wait_until(lambda: full.count(dead_letter_queue(name)) == 1)
    assert attempts == sorted(attempts)
    assert set(attempts) == {1, 2}
    assert len(attempts) <= 8


@pytest.mark.parametrize("way", ["block", "publisher"])
def test_a_failure_of_another_publisher_is_a_failed_attempt(
    place: Place, name: str, way: str
) -> None:
    other = Publisher("amqp://guest:guest@127.0.0.1:1/", timeout=0.2, drain_timeout=0)

    def bridge(event: ReceivedEvent) -> None:
        if way == "block":
            with auto_publishing(publisher=other, independent=True):
                enqueue_event({}, "copy")
        else:
            other.publish(events_for(other, ["copy"]), keep=False).raise_for_failure()

    runs = Runs(bridge)
    retry = RetryPolicy(max_attempts=2, delay=0)
    with contextlib.closing(other), place.publisher() as publisher:
        with working(publisher, of(made(place, name), runs, retry=retry)):
            send(publisher, name, 1)
            wait_until(lambda: place.count(dead_letter_queue(name)) == 1)
    assert runs.begun == [(0, 1), (0, 2)]


def test_dead_letters_that_find_no_room_hold_no_threads(
    amqp_url: str, name: str, inspector: Inspector, caplog: pytest.LogCaptureFixture
) -> None:
    place = RabbitMQPlace(amqp_url, name, inspector)
    limits = {"x-max-length": 1, "x-overflow": "reject-publish", "x-queue-type": "quorum"}

    def fail(event: ReceivedEvent) -> None:
        raise ValueError("bad")

    bad, good = Runs(fail), Runs()
    consumers = [of(name, bad), of(made(place, f"{name}-good"), good)]
    inspector.queue(dead_letter_queue(name), arguments=limits)
    inspector.queue(name)
    with place.publisher(declare="never") as publisher:
        with working(publisher, *consumers) as worker:
            wait_until(lambda: worker.is_consuming)
            send(publisher, name, 4)
            wait_until(lambda: len(bad.begun) == 4)
            send(publisher, f"{name}-good", 20)
            wait_until(lambda: len(good.done) == 20)
            time.sleep(1.0)
            lines = caplog.text.count("could not publish")
            assert 1 <= lines <= 4  # once each
            for _ in range(4):
                inspector.get(dead_letter_queue(name), 40)
            wait_until(lambda: worker._subscription.out(name) == 0)
    assert len(bad.begun) == 4
    assert inspector.all(name) == []


def test_a_stop_does_not_wait_for_dead_letters_that_find_no_room(
    amqp_url: str, name: str, inspector: Inspector
) -> None:
    place = RabbitMQPlace(amqp_url, name, inspector)
    limits = {"x-max-length": 1, "x-overflow": "reject-publish", "x-queue-type": "quorum"}

    def fail(event: ReceivedEvent) -> None:
        raise ValueError("bad")

    bad = Runs(fail)
    inspector.queue(dead_letter_queue(name), arguments=limits)
    inspector.queue(name)
    with place.publisher(declare="never") as publisher:
        worker = Worker([of(name, bad)], publisher=publisher, threads=2)
        worker.start()
        wait_until(lambda: worker.is_consuming)
        send(publisher, name, 5)
        wait_until(lambda: len(bad.begun) == 5)
        time.sleep(0.3)
        begin = time.monotonic()
        assert worker.stop(20)
        assert time.monotonic() - begin < 5
    assert len(inspector.all(name)) + len(inspector.all(dead_letter_queue(name))) == 5


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_a_retry_that_finds_no_room_in_its_queue_goes_on_in_the_worker(
    amqp_url: str, name: str, inspector: Inspector, is_async: bool
) -> None:
    place = RabbitMQPlace(amqp_url, name, inspector)
    limits = {"x-max-length": 1, "x-overflow": "reject-publish", "x-queue-type": "quorum"}
    inspector.queue(name, arguments=limits)
    inspector.clean_up(queue=dead_letter_queue(name))

    def fail_twice(event: ReceivedEvent) -> None:
        if event.attempt < 3:
            raise ValueError("try again")

    runs = Runs(fail_twice)
    retry = RetryPolicy(max_attempts=3, delay=0)
    with place.publisher(declare="never") as publisher:
        inspector.queue(dead_letter_queue(name))
        consumers = of(name, runs, is_async=is_async, retry=retry)
        with working(publisher, consumers, prefetch=1) as worker:
            wait_until(lambda: worker.is_consuming)
            # One is with the worker, and one fills the queue.
            first = events_for(publisher, [name], exchange="")
            assert publisher.publish(first).ok
            wait_until(lambda: runs.begun)
            publisher.submit(events_for(publisher, [name], exchange="")).result(10)
            wait_until(lambda: len(runs.done) == 2, 30)
    assert [attempt for _, attempt in runs.begun].count(1) == 2
    assert [attempt for _, attempt in runs.begun].count(3) == 2
    assert inspector.all(name) == inspector.all(dead_letter_queue(name)) == []


# -------------------------------------------------------------------------- what waits for long


@pytest.mark.slow
def test_what_waits_long_to_begin_is_given_back_to_others(
    amqp_url: str, name: str, inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(in_flight, "_LONGEST_WAIT", 0.5)
    place = RabbitMQPlace(amqp_url, name, inspector)
    go_on = threading.Event()
    slow, quick = Runs(lambda event: go_on.wait(20)), Runs()
    with place.publisher(timeout=0.4) as publisher:
        with working(publisher, of(made(place, name), slow), threads=1) as worker:
            send(publisher, name, 5)
            wait_until(lambda: slow.begun and worker._subscription.out(name) == 5)
            try:
                with working(publisher, of(name, quick)):
                    wait_until(lambda: len(quick.done) == 4, 20)
            finally:
                go_on.set()
            wait_until(lambda: slow.done)
    assert len(slow.begun) == 1
    assert sorted([*slow.done, *quick.done]) == list(range(5))


def test_a_held_message_is_requeued_before_the_broker_takes_it_back(
    amqp_url: str,
    name: str,
    inspector: Inspector,
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(message, "LONGEST_WAIT", 0.3)
    place = RabbitMQPlace(amqp_url, name, inspector)
    redelivered: list[bool] = []

    @consumer(made(place, name))
    def act(event: ReceivedEvent) -> None:
        redelivered.append(event.redelivered)
        database.use()

    database.lock()
    with place.publisher() as publisher, working(publisher, act) as worker:
        send(publisher, name, 1)
        wait_until(lambda: True in redelivered)
        database.unlock()
        wait_until(lambda: worker._subscription.out(name) == 0)
    assert place.count(dead_letter_queue(name)) == 0


@contextlib.contextmanager
def limited(broker: PrivateBroker, seconds: float) -> Iterator[None]:
    """Let the broker close channels on which something isn't acked within ``seconds``."""

    def set_limit(limit: float, tick: float) -> None:
        broker.ctl(
            "eval",
            f"application:set_env(rabbit, consumer_timeout, {1000 * limit:.0f}), "
            f"application:set_env(rabbit, channel_tick_interval, {1000 * tick:.0f}).",
        )

    set_limit(seconds, 0.3)
    try:
        yield
    finally:
        set_limit(1800, 60)


@pytest.mark.slow
def test_messages_that_outlast_the_brokers_limit_for_acks_are_processed_once(
    private_broker: PrivateBroker, name: str
) -> None:
    """The slow one itself, and what was sent ahead with it."""
    slow = Runs(lambda event: time.sleep(4.0 if event.payload["n"] == 0 else 0.5))
    with limited(private_broker, 1.5), Publisher(private_broker.url, exchange=name) as publisher:
        worker = Worker([of(name, slow)], publisher=publisher, threads=2)
        worker.start()
        try:
            wait_until(lambda: worker.is_consuming)
            send(publisher, name, 10)
            wait_until(lambda: len(slow.done) == 10, 30)
            wait_until(lambda: worker._subscription.out(name) == 0, 30)
        finally:
            worker.stop(10)
        time.sleep(0.5)
    assert sorted(n for n, _ in slow.begun) == list(range(10))
    with contextlib.closing(Inspector(private_broker.url)) as inspector:
        assert inspector.all(name) == []


@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_a_message_that_outbox_fails_to_handle_is_dead_lettered_in_the_end(
    place: Place, name: str, monkeypatch: pytest.MonkeyPatch, is_async: bool
) -> None:
    monkeypatch.setattr(in_flight, "_FAULTS", 3)

    def conclude(self: Message, result: object) -> Any:
        raise RuntimeError("a fault of outbox")

    monkeypatch.setattr(Message, "conclude", conclude)
    runs = Runs()
    with place.publisher() as publisher:
        with working(publisher, of(made(place, name), runs, is_async=is_async)):
            send(publisher, name, 1)
            wait_until(lambda: place.count(dead_letter_queue(name)) == 1)
    assert len(runs.begun) == 3
    assert place.count(name) == 0
