"""Consumers that fail, hang, wait or are asynchronous, on real transports."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import dataclasses
import datetime
import itertools
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.orm import scoped_session, sessionmaker

import outbox.sql
from outbox import (
    CollectorClosed,
    EventCollector,
    Publisher,
    enqueue_event,
    publish,
    publish_async,
)
from outbox.consumers import (
    Consumer,
    ProcessTimeout,
    ReceivedEvent,
    Retry,
    RetryPolicy,
    Worker,
    around,
    consumer,
    current_message,
)
from outbox.consumers.message.message import Message
from outbox.consumers.worker.thread_engine import ThreadEngine
from outbox.messages.delivery import Delivery, dead_letter_queue
from tests.places import Place, events_for, made, reading, replay, working
from tests.waiting import wait_until


@pytest.fixture
def publisher(place: Place) -> Iterator[Publisher]:
    with place.publisher() as found:
        yield found


def send(publisher: Publisher, queue: str, count: int = 1, **options: Any) -> list[str]:
    """Publish to a queue, and return the ids."""
    events = events_for(publisher, [queue] * count, exchange="", **options)
    assert publisher.publish(events).ok
    return [event.id for event in events]


def dead_letters(place: Place, queue: str, count: int = 1) -> list[Delivery]:
    with reading(place, dead_letter_queue(queue), again=True) as reader:
        return reader.get(count)


# ------------------------------------------------------------------------------- retries


def test_a_failed_attempt_is_retried_after_its_delay_with_the_same_message(
    place: Place, publisher: Publisher, name: str
) -> None:
    seen: list[tuple[float, ReceivedEvent]] = []
    done = threading.Event()

    @consumer(made(place, name, "a.*"), topics=["a.*"], retry=RetryPolicy(delay=1))
    def flaky(event: ReceivedEvent) -> None:
        seen.append((time.monotonic(), event))
        if len(seen) < 3:
            raise ValueError("not yet")
        done.set()

    with working(publisher, flaky):
        [sent] = events_for(publisher, ["a.b"], headers={"mine": "x"}, key="k", priority=3)
        publisher.publish([sent])
        assert done.wait(10)
    times, events = zip(*seen, strict=True)
    assert [event.attempt for event in events] == [1, 2, 3]
    for event in events:
        assert (event.id, event.target, event.exchange) == (sent.id, "a.b", place.exchange)
        assert (event.headers, event.key, event.payload) == ({"mine": "x"}, "k", sent.payload)
        assert (event.priority, event.queue) == (3, name)
        assert event.occurred_at == sent.occurred_at
    assert events[0].first_failure is None
    assert events[1].first_failure == events[2].first_failure is not None
    for earlier, later in itertools.pairwise(times):
        assert 0.99 <= later - earlier < 2.5
    assert place.count(name) == place.count(dead_letter_queue(name)) == 0


@pytest.mark.hazard("C6")
def test_after_the_last_attempt_the_dead_letter_reports_everything(
    place: Place, publisher: Publisher, name: str
) -> None:
    @consumer(made(place, name), retry=RetryPolicy(max_attempts=3, delay=0))
    def fails(event: ReceivedEvent) -> None:
        try:
            raise KeyError("inner")
        except KeyError as error:
            raise ValueError(f"attempt {event.attempt}") from error

    begin = datetime.datetime.now(datetime.UTC)
    with working(publisher, fails):
        [sent] = send(publisher, name)
        [letter] = dead_letters(place, name)
    headers = dict(letter.headers or {})
    assert letter.message_id == sent
    assert headers["outbox-dead-reason"] == "ValueError: attempt 3"
    assert headers["outbox-dead-error"] == "ValueError"
    assert headers["outbox-attempt"] == 3
    assert (headers["outbox-dead-exchange"], headers["outbox-dead-target"]) == ("", name)
    first, last = (
        datetime.datetime.fromisoformat(headers[header])
        for header in ("outbox-dead-first-at", "outbox-dead-at")
    )
    assert begin <= first < last
    traced = headers["outbox-dead-traceback"]
    assert "KeyError: 'inner'" in traced
    assert traced.endswith("ValueError: attempt 3")
    assert "in fails" in traced
    assert "life.py" not in traced


def test_a_handler_can_ask_for_a_retry_with_its_own_delay(
    place: Place, publisher: Publisher, name: str
) -> None:
    times: list[float] = []

    @consumer(made(place, name))
    def waits(event: ReceivedEvent) -> None:
        times.append(time.monotonic())
        if event.attempt == 1:
            raise Retry("the other side is busy", delay=2)

    with working(publisher, waits):
        send(publisher, name)
        wait_until(lambda: len(times) == 2)
    assert 1.99 <= times[1] - times[0] < 4


def test_poison_messages_do_not_hold_up_good_ones_and_are_dead_lettered_with_their_reasons(
    place: Place, publisher: Publisher, name: str
) -> None:
    done: Counter[int] = Counter()
    policy = RetryPolicy(max_attempts=2, delay=0)

    @consumer(made(place, name), retry=policy)
    def picky(event: ReceivedEvent) -> None:
        if event.payload["n"] % 10 == 0:
            raise ValueError(f"poison {event.payload['n']}")
        done[event.payload["n"]] += 1

    with working(publisher, picky, threads=4):
        publisher.publish(events_for(publisher, [name] * 500, exchange=""))
        letters = dead_letters(place, name, 50)
        wait_until(lambda: sum(done.values()) >= 450)
    assert set(done.values()) == {1}
    assert len(done) == 450
    reasons = {(letter.headers or {})["outbox-dead-reason"] for letter in letters}
    assert reasons == {f"ValueError: poison {n}" for n in range(0, 500, 10)}
    assert place.count(name) == 0


def test_a_replayed_dead_letter_starts_again_at_the_first_attempt(
    place: Place, publisher: Publisher, name: str
) -> None:

    attempts: list[int] = []

    @consumer(made(place, name), retry=RetryPolicy(max_attempts=2, delay=0))
    def fails(event: ReceivedEvent) -> None:
        attempts.append(event.attempt)
        if len(attempts) <= 2:
            raise ValueError

    with working(publisher, fails):
        send(publisher, name)
        wait_until(lambda: place.count(dead_letter_queue(name)) == 1)
        assert replay(place, dead_letter_queue(name)) == []
        wait_until(lambda: len(attempts) == 3)
    assert attempts == [1, 2, 1]


def test_follow_ons_of_a_failed_attempt_are_dropped_and_those_of_the_next_are_published(
    place: Place, publisher: Publisher, name: str
) -> None:
    made(place, name)
    ids: list[str] = []

    @consumer(name, retry=RetryPolicy(delay=0), auto_publish=True)
    def act(event: ReceivedEvent) -> None:
        ids.append(enqueue_event({"follow": 1}, f"{name}-next").id)
        if event.attempt == 1:
            raise ValueError

    with reading(place, f"{name}-all", ["#"]) as reader, working(publisher, act):
        send(publisher, name)
        [follow_on] = reader.get()
        wait_until(lambda: place.count(name) == 0)
    assert ids == [follow_on.message_id] * 2


# ------------------------------------------------------------------------------- timeouts


@pytest.mark.hazard("C8", "G4")
def test_a_handler_that_takes_too_long_is_retried_and_its_thread_replaced(
    place: Place, publisher: Publisher, name: str
) -> None:
    release = threading.Event()
    ends: list[str] = []
    calls: list[str] = []

    class Slow(Consumer):
        queue = name
        timeout = 0.2
        retry = RetryPolicy(max_attempts=2, delay=0)

        def process(self, event: ReceivedEvent) -> None:
            if event.attempt == 1 and not release.is_set():
                enqueue_event("late", f"{name}-late")
                release.wait(10)
                assert publish().published == ()
                try:
                    enqueue_event("later", f"{name}-late")
                except CollectorClosed:
                    ends.append("refused")
            else:
                ends.append("second")

        def on_timeout(self, event: ReceivedEvent) -> None:
            calls.append("timeout")

        def on_failure(self, event: ReceivedEvent, error: BaseException) -> None:
            calls.append(type(error).__name__)

        def on_success(self, event: ReceivedEvent) -> None:
            calls.append("success")

    made(place, name)
    with reading(place, f"{name}-late"), working(publisher, Slow, threads=1) as worker:
        send(publisher, name)
        wait_until(lambda: ends == ["second"])
        assert worker.late == 1
        release.set()
        wait_until(lambda: len(ends) == 2)
        wait_until(lambda: worker.late == 0)
        send(publisher, name)  # there is still exactly one free place
        wait_until(lambda: place.count(name) == 0)
    assert ends[:2] == ["second", "refused"]
    assert calls == ["timeout", "ProcessTimeout", "success", *calls[3:]]
    assert place.count(f"{name}-late") == 0


def test_a_timeout_without_a_retry_policy_is_dead_lettered_and_settles_once(
    place: Place, publisher: Publisher, name: str
) -> None:
    release = threading.Event()

    @consumer(made(place, name), timeout=0.1)
    def slow(event: ReceivedEvent) -> None:
        release.wait(10)

    with working(publisher, slow):
        [sent] = send(publisher, name)
        [letter] = dead_letters(place, name)
        release.set()
        assert letter.message_id == sent
        assert (letter.headers or {})["outbox-dead-error"] == "ProcessTimeout"
    assert place.count(name) == place.count(dead_letter_queue(name)) == 0


@pytest.mark.hazard("G4")
def test_too_many_late_handlers_reduce_the_concurrency_until_they_end(
    place: Place, publisher: Publisher, name: str
) -> None:
    release = threading.Event()
    done: list[Any] = []

    @consumer(made(place, name), timeout=0.1)
    def hangs(event: ReceivedEvent) -> None:
        if event.headers.get("hang"):
            release.wait(20)
        else:
            done.append(event.id)

    with working(publisher, hangs, threads=1) as worker:
        send(publisher, name, 2, headers={"hang": True})
        wait_until(lambda: worker.late == 2)
        [after] = send(publisher, name)
        time.sleep(0.3)
        assert done == []
        release.set()
        wait_until(lambda: done == [after])
        wait_until(lambda: worker.late == 0)


def test_a_handler_within_its_timeout_is_left_alone(
    place: Place, publisher: Publisher, name: str
) -> None:
    done: list[str] = []

    @consumer(made(place, name), timeout=datetime.timedelta(seconds=1))
    def quick(event: ReceivedEvent) -> None:
        time.sleep(0.01)
        done.append(event.id)

    with working(publisher, quick) as worker:
        sent = send(publisher, name, 50)
        wait_until(lambda: len(done) == 50)
        time.sleep(1.1)
        assert worker.late == 0
    assert sorted(done) == sorted(sent)


# ------------------------------------------------------------------------------- asyncio


@pytest.mark.hazard("B12")
def test_coroutines_run_concurrently_up_to_the_limit(
    place: Place, publisher: Publisher, name: str
) -> None:
    running: set[str] = set()
    most = 0
    done: list[str] = []

    @consumer(made(place, name))
    async def gentle(event: ReceivedEvent) -> None:
        nonlocal most
        running.add(event.id)
        most = max(most, len(running))
        await asyncio.sleep(0.05)
        running.discard(event.id)
        done.append(event.id)

    with working(publisher, gentle, concurrency=10):
        sent = send(publisher, name, 40)
        wait_until(lambda: len(done) == 40)
    assert most == 10
    assert sorted(done) == sorted(sent)
    assert place.count(name) == 0


def test_a_coroutine_publishes_its_follow_ons_before_its_message_is_acked(
    place: Place, publisher: Publisher, name: str
) -> None:
    made(place, name)

    class Async(Consumer):
        queue = name

        async def process(self, event: ReceivedEvent) -> None:
            enqueue_event({"n": 1}, f"{name}-next")
            report = await publish_async()
            assert report.ok

    with reading(place, f"{name}-all", ["#"]) as reader, working(publisher, Async):
        send(publisher, name)
        [follow_on] = reader.get()
        assert follow_on.target == f"{name}-next"
        wait_until(lambda: place.count(name) == 0)


def test_a_coroutine_that_takes_too_long_is_cancelled_and_retried(
    place: Place, publisher: Publisher, name: str
) -> None:
    ends: list[str] = []
    errors: list[BaseException] = []

    class Slow(Consumer):
        queue = name
        timeout = 0.1
        retry = RetryPolicy(max_attempts=2, delay=0)

        async def process(self, event: ReceivedEvent) -> None:
            try:
                await asyncio.sleep(0 if event.attempt == 2 else 30)
                ends.append("done")
            except asyncio.CancelledError:
                ends.append("cancelled")
                raise

        async def on_failure(self, event: ReceivedEvent, error: BaseException) -> None:
            errors.append(error)

    made(place, name)
    with working(publisher, Slow):
        send(publisher, name)
        wait_until(lambda: ends == ["cancelled", "done"])
    [error] = errors
    assert isinstance(error, ProcessTimeout)


@pytest.mark.parametrize("how", ["returns", "raises"])
def test_a_coroutine_that_times_out_has_failed_however_it_reacts(
    place: Place, publisher: Publisher, name: str, how: str
) -> None:
    calls: list[str] = []

    class Stubborn(Consumer):
        queue = made(place, name)
        timeout = 0.1

        async def process(self, event: ReceivedEvent) -> None:
            try:
                await asyncio.sleep(30)
            except asyncio.CancelledError:
                if how == "raises":
                    raise ValueError("in a hurry") from None

        def on_success(self, event: ReceivedEvent) -> None:
            calls.append("success")

        def on_timeout(self, event: ReceivedEvent) -> None:
            calls.append("timeout")

    with working(publisher, Stubborn):
        send(publisher, name)
        [letter] = dead_letters(place, name)
    assert (letter.headers or {})["outbox-dead-error"] == "ProcessTimeout"
    assert calls == ["timeout"]


def test_a_coroutine_that_ignores_its_cancellation_is_abandoned_and_replaced(
    place: Place, publisher: Publisher, name: str
) -> None:
    done: list[str] = []
    refused: list[BaseException] = []
    release = asyncio.Event()

    class Deaf(Consumer):
        queue = made(place, name)
        timeout = 0.1

        async def process(self, event: ReceivedEvent) -> None:
            if event.payload["n"]:
                done.append(event.id)
                return
            while not release.is_set():
                with contextlib.suppress(asyncio.CancelledError):
                    await release.wait()
            try:
                enqueue_event({}, f"{name}-next")
            except CollectorClosed as error:
                refused.append(error)

    worker = Worker([Deaf], publisher=publisher, concurrency=1)
    worker.start()
    deaf, *others = send(publisher, name, 3)
    [letter] = dead_letters(place, name)
    assert letter.message_id == deaf
    assert (letter.headers or {})["outbox-dead-error"] == "ProcessTimeout"
    wait_until(lambda: done == others)
    assert worker.late == 1
    assert worker._tasks is not None
    worker._tasks._call(release.set)
    wait_until(lambda: bool(refused))
    wait_until(lambda: worker.late == 0)
    assert worker.stop(10)
    assert place.count(name) == 0


def test_a_stop_does_not_wait_for_an_abandoned_coroutine(
    place: Place, publisher: Publisher, name: str
) -> None:
    release = asyncio.Event()

    @consumer(made(place, name), timeout=0.1)
    async def deaf(event: ReceivedEvent) -> None:
        while not release.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await release.wait()

    worker = Worker([deaf], publisher=publisher)
    worker.start()
    send(publisher, name)
    wait_until(lambda: worker.late == 1)
    wait_until(lambda: place.count(dead_letter_queue(name)) == 1)
    begin = time.monotonic()
    assert worker.stop(30)
    assert time.monotonic() - begin < 10
    assert worker._tasks is not None
    worker._tasks._call(release.set)


def test_a_coroutine_that_cancels_itself_has_failed(
    place: Place, publisher: Publisher, name: str
) -> None:
    @consumer(made(place, name))
    async def odd(event: ReceivedEvent) -> None:
        raise asyncio.CancelledError

    with working(publisher, odd):
        send(publisher, name)
        [letter] = dead_letters(place, name)
        assert (letter.headers or {})["outbox-dead-error"] == "HandlerCancelled"


@pytest.mark.hazard("B8", "B15")
def test_a_stop_lets_coroutines_finish_and_gives_back_unfinished_messages(
    place: Place, publisher: Publisher, name: str
) -> None:
    done: list[int] = []
    began = threading.Semaphore(0)

    @consumer(made(place, name))
    async def work(event: ReceivedEvent) -> None:
        began.release()
        await asyncio.sleep(event.headers["seconds"])
        done.append(event.headers["seconds"])

    worker = Worker([work], publisher=publisher)
    worker.start()
    send(publisher, name, headers={"seconds": 1})
    send(publisher, name, headers={"seconds": 60})
    assert began.acquire(timeout=10)
    assert began.acquire(timeout=10)
    begin = time.monotonic()
    assert not worker.stop(2)
    assert time.monotonic() - begin < 5
    assert done == [1]
    with reading(place, name, again=True) as reader:
        [left] = reader.get()
        assert (left.headers or {})["seconds"] == 60
    assert place.count(dead_letter_queue(name)) == 0


def test_each_coroutine_has_its_own_context_and_collector(
    place: Place, publisher: Publisher, name: str
) -> None:
    mine: contextvars.ContextVar[str] = contextvars.ContextVar("mine", default="nobody's")
    found: list[tuple[str, int]] = []

    @consumer(made(place, name), auto_publish=True)
    async def act(event: ReceivedEvent) -> None:
        before = mine.get()
        mine.set(event.id)
        enqueue_event(event.id, f"{name}-next")
        await asyncio.sleep(0.02)
        assert mine.get() == event.id
        found.append((before, len(EventCollector.current())))

    with reading(place, f"{name}-all", ["#"]) as reader, working(publisher, act):
        sent = send(publisher, name, 20)
        follow_ons = reader.get(20)
        wait_until(lambda: len(found) == 20)
    assert set(found) == {("nobody's", 1)}
    assert {one.target for one in follow_ons} == {f"{name}-next"}
    assert len({one.message_id for one in follow_ons}) == len(sent)


def test_synchronous_and_asynchronous_consumers_share_a_worker(
    place: Place, publisher: Publisher, name: str
) -> None:
    done: list[str] = []

    @consumer(made(place, f"{name}-a"))
    async def asynchronous(event: ReceivedEvent) -> None:
        await asyncio.sleep(0)
        done.append("async")

    @consumer(made(place, f"{name}-b"))
    def plain(event: ReceivedEvent) -> None:
        with pytest.raises(RuntimeError):
            asyncio.get_running_loop()
        done.append("plain")

    with working(publisher, asynchronous, plain):
        send(publisher, f"{name}-a")
        send(publisher, f"{name}-b")
        wait_until(lambda: sorted(done) == ["async", "plain"])


# ------------------------------------------------------------------------------- databases


def test_a_broken_session_of_one_handler_is_not_passed_to_the_next(
    place: Place, publisher: Publisher, tmp_path: Path, name: str
) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/shop.db")
    sessions = scoped_session(sessionmaker(engine))
    seen: list[tuple[int, bool]] = []

    @consumer(made(place, name))
    def act(event: ReceivedEvent) -> None:
        session = sessions()
        seen.append((id(session), session.in_transaction()))
        session.execute(text("SELECT no_such_column"))

    outbox.sql.bind(sessions)
    try:
        with working(publisher, act, threads=1):
            send(publisher, name, 3)
            wait_until(lambda: len(seen) == 3)
            wait_until(lambda: place.count(dead_letter_queue(name)) == 3)
    finally:
        outbox.sql.bind(None)
    assert [in_transaction for _, in_transaction in seen] == [False] * 3
    engine.dispose()


DJANGO = """
import threading, time
from django.conf import settings

settings.configure(DATABASES={"default": {
    "ENGINE": "django.db.backends.sqlite3", "NAME": "shop.db", "CONN_MAX_AGE": 0}})
import django
django.setup()
from django.db import connection
import outbox
from outbox.consumers import Consumer, Worker

seen = []

class Plain(Consumer):
    queue = "plain"
    def process(self, event):
        seen.append(connection.connection is None)
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")

outbox.configure("sqlite:///outbox.db")
worker = Worker([Plain], threads=1)
worker.start()
until = time.monotonic() + 20
while len(seen) < 2 and time.monotonic() < until:
    with outbox.auto_publishing():
        outbox.enqueue_event({}, "plain", exchange="", unroutable="ignore")
    time.sleep(0.05)
assert worker.stop(5)
assert seen and all(seen), seen
"""


def test_djangos_connections_are_closed_between_messages(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", DJANGO],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=40,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------- what must not end a worker


@pytest.mark.hazard("G2")
@pytest.mark.parametrize("raised", [KeyboardInterrupt, GeneratorExit, asyncio.CancelledError])
def test_any_exception_of_a_handler_is_a_failed_attempt_and_not_an_endless_one(
    place: Place, publisher: Publisher, name: str, raised: type[BaseException]
) -> None:
    attempts: list[int] = []

    class Odd(Consumer):
        queue = made(place, name)
        retry = RetryPolicy(max_attempts=2, delay=0)

        def process(self, event: ReceivedEvent) -> None:
            attempts.append(event.attempt)
            raise raised

        def on_dead(self, event: ReceivedEvent, reason: str) -> None:
            sys.exit(reason)

    with working(publisher, Odd):
        send(publisher, name)
        [letter] = dead_letters(place, name)
    assert attempts == [1, 2]
    headers = letter.headers or {}
    assert headers["outbox-dead-reason"] == f"HandlerExit: the handler raised {raised.__name__}"
    assert raised.__name__ in headers["outbox-dead-traceback"]


@pytest.mark.hazard("G2")
@pytest.mark.parametrize("raised", [KeyboardInterrupt, GeneratorExit])
def test_any_exception_of_a_coroutine_is_a_failed_attempt_too(
    place: Place, publisher: Publisher, name: str, raised: type[BaseException]
) -> None:
    @consumer(made(place, name))
    async def odd(event: ReceivedEvent) -> None:
        await asyncio.sleep(0)
        raise raised

    with working(publisher, odd):
        send(publisher, name)
        [letter] = dead_letters(place, name)
    assert (letter.headers or {})["outbox-dead-error"] == "HandlerExit"


@pytest.mark.hazard("B8")
def test_a_coroutine_that_cancels_its_own_task_has_failed_and_is_not_retried_forever(
    place: Place, publisher: Publisher, name: str
) -> None:
    @consumer(made(place, name))
    async def odd(event: ReceivedEvent) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(10)

    with working(publisher, odd):
        send(publisher, name)
        [letter] = dead_letters(place, name)
    assert (letter.headers or {})["outbox-dead-error"] == "HandlerCancelled"
    assert place.count(name) == 0


@pytest.mark.hazard("B8", "C6")
def test_a_coroutine_being_stopped_is_not_a_failed_attempt_however_it_reacts(
    place: Place, publisher: Publisher, name: str
) -> None:
    began = threading.Event()
    calls: list[str] = []

    class Stubborn(Consumer):
        queue = made(place, name)
        retry = RetryPolicy(delay=0)

        async def process(self, event: ReceivedEvent) -> None:
            began.set()
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                raise ValueError("interrupted") from None

        def on_failure(self, event: ReceivedEvent, error: BaseException) -> None:
            calls.append("failed")

    worker = Worker([Stubborn], publisher=publisher)
    worker.start()
    [sent] = send(publisher, name)
    assert began.wait(10)
    assert not worker.stop(0.1)
    assert calls == []
    with reading(place, name, again=True) as reader:
        [left] = reader.get()
        assert left.message_id == sent
        assert "outbox-attempt" not in (left.headers or {})
    assert place.count(dead_letter_queue(name)) == 0


@pytest.mark.hazard("G4")
def test_a_stop_waits_for_the_message_of_a_late_handler_to_be_settled(
    place: Place, publisher: Publisher, name: str
) -> None:
    began, release = threading.Event(), threading.Event()

    class Hangs(Consumer):
        queue = made(place, name)
        timeout = 0.5

        def process(self, event: ReceivedEvent) -> None:
            began.set()
            release.wait(20)

        def on_timeout(self, event: ReceivedEvent) -> None:
            time.sleep(0.3)  # the message is being dead-lettered, and not settled yet

    worker = Worker([Hangs], publisher=publisher, threads=1)
    worker.start()
    [sent] = send(publisher, name)
    assert began.wait(10)
    assert worker.stop(10)
    assert place.count(name) == 0
    [letter] = dead_letters(place, name)
    assert letter.message_id == sent
    release.set()


@pytest.mark.hazard("G4")
def test_a_handler_that_ends_just_after_its_timeout_settles_nothing_whatever_its_filters_swallow(
    place: Place, publisher: Publisher, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = threading.Event()
    calls: list[str] = []

    class Swallowing(Consumer):
        queue = made(place, name)
        timeout = 0.1

        @around
        def all_is_well(self, event: ReceivedEvent) -> Iterator[None]:
            with contextlib.suppress(BaseException):
                yield

        def process(self, event: ReceivedEvent) -> None:
            time.sleep(0.3)

        def on_success(self, event: ReceivedEvent) -> None:
            calls.append("success")

        def on_dead(self, event: ReceivedEvent, reason: str) -> None:
            calls.append("dead")

    give_up = Message.give_up

    def give_up_late(message: Message, error: BaseException) -> Any:
        assert ended.wait(10)
        return give_up(message, error)

    live = ThreadEngine._live

    def live_and_signal(*arguments: Any) -> Any:
        try:
            return live(*arguments)
        finally:
            ended.set()

    monkeypatch.setattr(Message, "give_up", give_up_late)
    monkeypatch.setattr(ThreadEngine, "_live", live_and_signal)
    with working(publisher, Swallowing):
        send(publisher, name)
        [letter] = dead_letters(place, name)
    assert calls == ["dead"]
    assert (letter.headers or {})["outbox-dead-error"] == "ProcessTimeout"


@pytest.mark.parametrize("is_async", [False, True])
def test_each_attempt_of_a_held_message_begins_with_what_was_sent(
    place: Place, publisher: Publisher, name: str, is_async: bool
) -> None:
    variable: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
    seen: list[tuple[str, list[str], str]] = []

    def take(event: ReceivedEvent) -> None:
        current = current_message()
        assert current is event
        seen.append((variable.get(), list(event.payload), event.headers["tenant"]))
        variable.set("set by an earlier attempt")
        event.payload.clear()
        cast("dict[str, Any]", event.headers).clear()
        if len(seen) < 3:
            error = sqlite3.OperationalError("database is locked")
            error.sqlite_errorcode = sqlite3.SQLITE_BUSY
            raise error

    class Plain(Consumer):
        queue = made(place, name)

        def process(self, event: ReceivedEvent) -> None:
            take(event)

    class Coroutine(Consumer):
        queue = name

        async def process(self, event: ReceivedEvent) -> None:
            take(event)

    with working(publisher, Coroutine if is_async else Plain):
        [event] = events_for(publisher, [name], exchange="", headers={"tenant": "acme"})
        publisher.publish([dataclasses.replace(event, body=b'["a"]')])
        wait_until(lambda: len(seen) == 3, 15)
    assert seen == [("unset", ["a"], "acme")] * 3
