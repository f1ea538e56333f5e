"""Recurring tasks over RabbitMQ: one call for each time, whatever becomes of the workers."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import logging
import time
from collections.abc import Iterator

import pytest

from outbox import ConnectionLost, Publisher, UsageError, configure
from outbox.consumers import Worker
from outbox.consumers.discovery import load
from outbox.messages.delivery import dead_letter_queue
from outbox.recurring.due import GRACE
from outbox.recurring.recurring_task import RecurringTask, TickRecord
from outbox.settings import Settings
from outbox.transports.rabbitmq import pika_connection
from outbox.transports.rabbitmq.recurring import tick_queue
from outbox.transports.rabbitmq.recurring.schedule_messages import Hello, Planned
from outbox.transports.rabbitmq.recurring.ticker import RabbitMQTicker
from outbox.transports.registry import open_tick_records, open_ticker
from tests import beating
from tests.amqp import Inspector, Message
from tests.places import Place
from tests.recurring import DAILY, QUICK, TICK, recurring
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

UTC = datetime.UTC
SECOND = datetime.timedelta(seconds=1)


def now() -> datetime.datetime:
    return datetime.datetime.now(UTC)


def scheduled_for(message: Message) -> datetime.datetime:
    microseconds = message.properties.headers["outbox-scheduled-for-us"]
    return datetime.datetime.fromtimestamp(microseconds / 1e6, UTC)


class Ticking:
    """Workers' tickers, and the queues of their task."""

    def __init__(self, url: str, name: str, inspector: Inspector) -> None:
        self.settings = Settings.load(url, {"tasks_queue": name})
        self.calls, self.queue = name, f"{name}.every.tick"
        self.inspector = inspector
        self._tickers: list[RabbitMQTicker] = []
        for queue in (dead_letter_queue(name), self.queue, f"{name}.every"):
            inspector.clean_up(queue=queue)

    def start(self, task: RecurringTask | None = None) -> RabbitMQTicker:
        ticker = open_ticker(self.settings, [task or recurring(self.calls)])
        assert isinstance(ticker, RabbitMQTicker)
        self._tickers.append(ticker)
        ticker.start()
        self.inspector.wait_for_queue(self.calls)
        return ticker

    def stop(self) -> None:
        for ticker in self._tickers:
            ticker.stop()

    def plan(self, planned: Planned | Hello | bytes) -> None:
        """Put a message into the task's queue, as an earlier worker has left it."""
        arguments = {"x-queue-type": "quorum", "x-single-active-consumer": True}
        self.inspector.queue(self.queue, arguments=arguments)
        body = planned if isinstance(planned, bytes) else planned.body()
        self.inspector.publish(self.queue, body)

    def planned(self) -> TickRecord:
        """The schedule in the queue, once no ticker has it."""
        with open_tick_records(self.settings) as records:
            [record] = records.all(self.calls)
        return record


@pytest.fixture
def ticking(amqp_url: str, name: str, inspector: Inspector) -> Iterator[Ticking]:
    ticking = Ticking(amqp_url, name, inspector)
    yield ticking
    ticking.stop()


def holds(ticker: RabbitMQTicker) -> bool:
    """Whether it has the schedule, and nothing to do."""
    [queue] = ticker._queues
    return queue._held is not None and not queue._held.is_worn


def stands_by(ticker: RabbitMQTicker) -> bool:
    """Whether it consumes, and another one has the schedule."""
    [queue] = ticker._queues
    return queue._hello != "" and queue._held is None


def cut(ticker: RabbitMQTicker) -> None:
    """End the connection as a kill would."""
    connection = ticker._link._connection
    assert connection is not None
    ticker._link.call(lambda: pika_connection.abort(connection, ConnectionLost("cut")))


def test_each_time_is_called_once_by_whichever_worker(ticking: Ticking) -> None:
    first, second = ticking.start(), ticking.start()
    arrived: list[tuple[datetime.datetime, Message]] = []
    for cuts in range(3):
        arrived += [(now(), each) for each in ticking.inspector.messages(ticking.calls, 1)]
        cut(first if holds(first) else second)
        assert len(arrived) == cuts + 1
    times = [scheduled_for(message) for _, message in arrived]
    assert times == [times[0] + number * TICK for number in range(3)]
    assert len({message.id for _, message in arrived}) == 3
    for at, message in arrived:
        assert scheduled_for(message) <= at <= scheduled_for(message) + SECOND
        assert message.payload == {"args": []}
        assert message.properties.type == "tick"
    for ticker in (first, second):
        ticker.stop()


def test_a_daily_task_survives_its_workers(ticking: Ticking, amqp_url: str) -> None:
    # RabbitMQ 4 gives up a message that has come back 20 times.
    daily = recurring(ticking.calls, schedule=DAILY)
    for _ in range(22):
        ticker = ticking.start(daily)
        wait_until(lambda: holds(ticker))  # noqa: B023
        cut(ticker)
        ticker.stop()
    record = ticking.planned()
    assert record.next_at == DAILY.next_after(now() - 60 * SECOND)
    assert (record.schedule, record.last_at, record.has_worker) == ("every 86400 s", None, False)
    assert ticking.planned() == record  # a look changes nothing


def test_a_stopped_worker_hands_over_at_once(ticking: Ticking) -> None:
    first = ticking.start(recurring(ticking.calls, schedule=DAILY))
    wait_until(lambda: holds(first))
    second = ticking.start(recurring(ticking.calls, schedule=DAILY))
    wait_until(lambda: stands_by(second))
    first.stop()
    assert wait_until(lambda: holds(second)) < 1


def test_late_times_are_made_up_for_and_older_ones_left_out(
    ticking: Ticking, caplog: pytest.LogCaptureFixture
) -> None:
    start = now().replace(microsecond=0)
    ticking.plan(Planned(QUICK.text, start - 3600 * SECOND))
    with caplog.at_level(logging.WARNING, "outbox.ticks"):
        ticking.start()
        late = [scheduled_for(each) for each in ticking.inspector.messages(ticking.calls, 50)]
    assert late == [late[0] + number * TICK for number in range(50)]
    assert timedelta_of(start - late[0]) == pytest.approx(GRACE.total_seconds(), abs=5)
    assert "no worker ran at" in caplog.text


def timedelta_of(span: datetime.timedelta) -> float:
    return span.total_seconds()


def test_catching_up_calls_once_for_all_that_was_missed(ticking: Ticking) -> None:
    last = DAILY.next_after(now() - DAILY._interval)
    if now() - last < 2 * GRACE:  # just after midnight, when it isn't missed
        pytest.skip("it is midnight")
    ticking.plan(Planned("every 86400 s", last - 30 * DAILY._interval))
    ticker = ticking.start(recurring(ticking.calls, schedule=DAILY, catch_up=True))
    assert scheduled_for(ticking.inspector.get(ticking.calls)) == last
    wait_until(lambda: holds(ticker))
    assert ticking.inspector.count(ticking.calls) == 0


def test_of_two_schedules_the_later_one_counts(ticking: Ticking) -> None:
    soon, later = now() + TICK, now() + 3 * TICK
    for planned in (soon, later, soon):
        ticking.plan(Planned(QUICK.text, planned))
    ticker = ticking.start()
    assert scheduled_for(ticking.inspector.get(ticking.calls)) == later
    wait_until(lambda: holds(ticker))
    ticker.stop()
    wait_until(lambda: ticking.inspector.count(ticking.queue) == 1)


def test_another_schedule_counts_from_now_once_the_old_workers_have_left(
    ticking: Ticking,
) -> None:
    old = ticking.start(recurring(ticking.calls, schedule=DAILY))
    wait_until(lambda: holds(old))
    new = ticking.start(recurring(ticking.calls, schedule=QUICK))
    wait_until(lambda: stands_by(new))
    assert ticking.inspector.messages(ticking.calls, 1, 0.5) == []
    left_at = now()
    old.stop()
    assert scheduled_for(ticking.inspector.get(ticking.calls)) > left_at
    new.stop()


def test_a_clock_that_was_wrong_is_said(ticking: Ticking, caplog: pytest.LogCaptureFixture) -> None:
    far = now() + 7200 * SECOND
    ticking.plan(Planned(QUICK.text, far))
    ticker = ticking.start()
    wait_until(lambda: holds(ticker))
    assert caplog.text.count(f"runs next at {far.isoformat()}, and not before") == 1
    with open_tick_records(ticking.settings) as records:
        records.forget(ticking.calls, "tick")
    ticking.inspector.get(ticking.calls)


def test_what_others_put_into_its_queue_does_no_harm(
    ticking: Ticking, caplog: pytest.LogCaptureFixture
) -> None:
    for body in (b"", b"[" * 1000, b"{}", b'{"schedule": 5}', Hello("x" * 60_000).body()):
        ticking.plan(body)
    ticker = ticking.start()
    ticking.inspector.get(ticking.calls)
    wait_until(lambda: holds(ticker))
    ticker.stop()
    wait_until(lambda: ticking.inspector.count(ticking.queue) == 1)
    assert caplog.text.count("isn't outbox's") == 4


def test_a_lost_schedule_is_written_anew(ticking: Ticking, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tick_queue, "_RENEWED_EVERY", 0.5)
    task = recurring(ticking.calls, schedule=DAILY)
    ticker = ticking.start(task)
    [queue] = ticker._queues
    wait_until(lambda: holds(ticker))
    channel = queue._channel
    assert channel is not None

    def lose() -> None:
        assert queue._held is not None
        channel.basic_ack(queue._held.tag)
        channel.tx_commit(lambda _frame: setattr(queue, "_held", None))

    ticker._link.call(lose)
    wait_until(lambda: not holds(ticker))
    wait_until(lambda: holds(ticker))
    ticker.stop()
    assert ticking.planned().next_at is not None


def test_a_schedule_that_is_held_is_published_anew_now_and_then(
    ticking: Ticking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tick_queue, "_RENEWED_EVERY", 0.2)
    ticker = ticking.start(recurring(ticking.calls, schedule=DAILY))
    [queue] = ticker._queues
    tags = set()

    def renewed_often() -> bool:
        held = queue._held
        if held is not None:
            tags.add(held.tag)
        return len(tags) >= 2

    wait_until(renewed_often)
    ticker.stop()
    wait_until(lambda: ticking.inspector.count(ticking.queue) == 1)


def test_a_deleted_queue_begins_anew(ticking: Ticking, caplog: pytest.LogCaptureFixture) -> None:
    ticking.start()
    ticking.inspector.get(ticking.calls)
    ticking.inspector.channel.queue_delete(ticking.queue)
    deleted_at = now()
    for message in iter(lambda: ticking.inspector.get(ticking.calls), None):
        if scheduled_for(message) > deleted_at + TICK:
            break
    assert "the broker cancelled the consumer" in caplog.text


def test_a_missing_queue_of_calls_is_made_again(ticking: Ticking) -> None:
    ticking.start()
    before = scheduled_for(ticking.inspector.get(ticking.calls))
    ticking.inspector.channel.queue_delete(ticking.calls)
    ticking.inspector.wait_for_queue(ticking.calls)
    after = scheduled_for(ticking.inspector.get(ticking.calls))
    assert after - before <= SECOND


def test_a_queue_that_is_not_its_own_is_said_once(
    ticking: Ticking, inspector: Inspector, caplog: pytest.LogCaptureFixture
) -> None:
    inspector.queue(ticking.queue)  # without a single active consumer
    ticking.start()
    wait_until(lambda: "cannot run the recurring task 'tick'" in caplog.text)
    time.sleep(0.6)  # until it has tried again
    assert caplog.text.count("cannot run the recurring task 'tick'") == 1
    assert "x-single-active-consumer" in caplog.text


def test_the_records_name_what_runs_and_what_is_past(ticking: Ticking) -> None:
    queues = [f"{ticking.calls}.every.{name}" for name in ("past", "run")]
    for queue in queues:
        ticking.inspector.clean_up(queue=queue)
    with open_tick_records(ticking.settings) as records:
        assert list(records.all(ticking.calls)) == []
        past = ticking.start(recurring(ticking.calls, "past", DAILY))
        wait_until(lambda: holds(past))
        past.stop()
        running = ticking.start(recurring(ticking.calls, "run", DAILY))
        wait_until(lambda: holds(running))
        found = list(records.all(ticking.calls))
        next_at = DAILY.next_after(now())
        assert found == [
            TickRecord("past", "every 86400 s", next_at, None, has_worker=False),
            TickRecord("run", has_worker=True),
        ]
        assert records.forget(ticking.calls, "past")
        assert not records.forget(ticking.calls, "past")
        assert [record.name for record in records.all(ticking.calls)] == ["run"]


def test_a_task_that_needs_a_database_is_refused(amqp_url: str, name: str) -> None:
    settings = Settings.load(amqp_url, {})
    with pytest.raises(UsageError, match="overlap='skip', which needs a database"):
        open_ticker(settings, [recurring(name, skips=True)])
    with pytest.raises(UsageError, match="memory:// has no recurring tasks"):
        open_ticker(Settings.load("memory://", {}), [recurring(name)])


def test_a_worker_calls_its_recurring_tasks(place: Place, name: str) -> None:
    for queue in (name, dead_letter_queue(name), f"{name}.every", f"{name}.every.beat"):
        place.will_clean_up(queue)
    publisher = configure(place.url, exchange=place.exchange, tasks_queue=name)
    beating.runs.clear()
    with working(publisher), working(publisher):
        wait_until(lambda: len(beating.runs) >= 2)
    runs = list(beating.runs)
    times = [run.scheduled_for for _, run in runs]
    assert all(b - a == SECOND for a, b in itertools.pairwise(times) if a and b)
    for at, run in runs:
        assert (run.name, run.queue) == ("beat", name)
        assert run.scheduled_for is not None
        assert 0 <= at - run.scheduled_for.timestamp() < 1


def test_busy_threads_delay_no_call(place: Place, name: str) -> None:
    for queue in (name, dead_letter_queue(name), f"{name}.every", f"{name}.every.beat"):
        place.will_clean_up(queue)
    publisher = configure(place.url, exchange=place.exchange, tasks_queue=name)
    beating.runs.clear()
    beating.may_end.clear()
    worker = Worker(load(["tests.beating"]), publisher=publisher, threads=1, prefetch=1)
    worker.start()
    wait_until(lambda: beating.runs)
    wait_until(lambda: place.count(name) >= 1, 3)  # the thread has the first one
    beating.may_end.set()
    assert worker.stop(10)


@contextlib.contextmanager
def working(publisher: Publisher) -> Iterator[Worker]:
    worker = Worker(load(["tests.beating"]), publisher=publisher, threads=1)
    worker.start()
    yield worker
    assert worker.stop(10)
