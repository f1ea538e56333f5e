"""Recurring tasks with a database as the broker: one call for each time, one row for each task."""

from __future__ import annotations

import datetime
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import Connection

from outbox.event import Event
from outbox.messages.headers import SCHEDULED_FOR, TASK
from outbox.recurring.due import GRACE
from outbox.recurring.recurring_task import RecurringTask, TickRecord
from outbox.settings import Settings
from outbox.storage import tick_statements
from outbox.storage.engines import open_engine
from outbox.storage.schema import events
from outbox.storage.store import Store
from outbox.storage.transactions import own_transaction
from outbox.transports.database.database import Database
from outbox.transports.database.kinds import database_at
from outbox.transports.database.recurring import tick_round
from outbox.transports.database.recurring.tick_round import TickRound
from outbox.transports.registry import open_tick_records, open_ticker
from outbox.transports.ticker import Ticker
from outbox.url import BrokerURL
from tests.conftest import database_of_kind
from tests.recurring import DAILY, QUICK, TICK, recurring
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

UTC = datetime.UTC
SECOND = datetime.timedelta(seconds=1)
QUEUE = "calls"
T = TypeVar("T")


def now() -> datetime.datetime:
    return datetime.datetime.now(UTC)


class Ticking:
    """Workers' tickers over one database, and what is in it."""

    def __init__(self, url: str) -> None:
        if not url.startswith("sqlite"):  # where the tables are made when they are needed
            engine = open_engine(url)
            Store(engine).create()
            engine.dispose()
        self.settings = Settings.load(url, {})
        self._database: Database = database_at(BrokerURL.parse(url))
        self._tickers: list[Ticker] = []

    def run(self, work: Callable[[Connection], T]) -> T:
        return self._database.run(work)

    def start(self, *tasks: RecurringTask) -> Ticker:
        ticker = open_ticker(self.settings, tasks or [recurring(QUEUE)])
        self._tickers.append(ticker)
        ticker.start()
        return ticker

    def stop(self) -> None:
        for ticker in self._tickers:
            ticker.stop()
        self._database.end()

    def calls(self) -> list[tuple[datetime.datetime, str]]:
        """The time and the id of each call that waits, in order."""

        def read(connection: Connection) -> Sequence[Any]:
            rows = connection.execute(events.select().order_by(events.c.seq))
            return [row for row in rows if row.queue == QUEUE]

        return [(scheduled_for(row.headers), row.id) for row in self.run(read)]

    def end_calls(self) -> None:
        """End the calls, as a worker does."""
        self.run(lambda connection: connection.execute(events.delete()) and None)

    def plan(self, schedule: str, next_at: datetime.datetime, seen_at: datetime.datetime) -> None:
        """Write the row of a task, as an earlier worker has left it."""
        self.run(lambda c: tick_statements.add(c, QUEUE, "tick", schedule, next_at, seen_at))

    def record(self) -> TickRecord | None:
        with open_tick_records(self.settings) as records:
            found = records.all(QUEUE)
        return found[0] if found else None


def scheduled_for(headers: str) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(json.loads(headers)[SCHEDULED_FOR] / 1e6, UTC)


@pytest.fixture
def ticking(tmp_path: Path) -> Iterator[Ticking]:
    ticking = Ticking(f"sqlite:///{tmp_path}/outbox.db")
    yield ticking
    ticking.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def ticking_anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ticking]:
    ticking = Ticking(database_of_kind(request, tmp_path))
    yield ticking
    ticking.stop()


def test_each_time_is_called_once_by_whichever_worker(ticking_anywhere: Ticking) -> None:
    ticking = ticking_anywhere
    for _ in range(3):
        ticking.start()
    wait_until(lambda: len(ticking.calls()) >= 2)
    calls = ticking.calls()
    times = [at for at, _ in calls]
    assert times == [times[0] + number * TICK for number in range(len(times))]
    assert len({event_id for _, event_id in calls}) == len(calls)
    assert times[-1] <= now() <= times[-1] + SECOND
    record = ticking.record()
    assert record is not None
    assert (record.schedule, record.has_worker) == (QUICK.text, True)


def test_late_times_are_made_up_for_and_older_ones_left_out(
    ticking: Ticking, caplog: pytest.LogCaptureFixture
) -> None:
    start = now().replace(microsecond=0)
    ticking.plan(QUICK.text, start - 3600 * SECOND, start)
    with caplog.at_level(logging.WARNING, "outbox.ticks"):
        ticking.start()
        wait_until(lambda: len(ticking.calls()) >= 50)
    times = [at for at, _ in ticking.calls()]
    assert times == [times[0] + number * TICK for number in range(len(times))]
    assert (start - times[0]).total_seconds() == pytest.approx(GRACE.total_seconds(), abs=5)
    assert "no worker ran at" in caplog.text


def test_catching_up_calls_once_for_all_that_was_missed(ticking: Ticking) -> None:
    last = DAILY.next_after(now() - datetime.timedelta(days=1))
    if now() - last < 2 * GRACE:
        pytest.skip("it is midnight, when it isn't missed")
    ticking.plan("every 86400 s", last - datetime.timedelta(days=30), now())
    ticking.start(recurring(QUEUE, schedule=DAILY, catch_up=True))
    wait_until(ticking.calls)
    assert [at for at, _ in ticking.calls()] == [last]
    record = ticking.record()
    assert record is not None
    assert record.next_at == last + datetime.timedelta(days=1)
    assert record.last_at == last


def test_a_call_that_has_not_ended_is_not_overlapped(ticking: Ticking) -> None:
    ticking.start(recurring(QUEUE, skips=True))
    wait_until(ticking.calls)
    time.sleep(0.6)
    assert len(ticking.calls()) == 1
    ticking.end_calls()
    wait_until(ticking.calls, 3)


def test_another_schedule_counts_once_the_old_workers_have_left(
    ticking: Ticking, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tick_round, "LOOK_EVERY", 0.1)
    old = ticking.start(recurring(QUEUE, schedule=DAILY))
    wait_until(ticking.record)
    ticking.start(recurring(QUEUE, schedule=QUICK))
    time.sleep(0.6)
    assert ticking.calls() == []
    left_at = now()
    old.stop()
    wait_until(ticking.calls, 3)
    assert ticking.calls()[0][0] > left_at


def test_killed_workers_have_left_when_they_are_not_seen(ticking: Ticking) -> None:
    ticking.plan("every 7 s", now() + 3600 * SECOND, now() - 31 * SECOND)
    ticking.start()
    wait_until(ticking.calls, 3)


def test_a_transaction_that_fails_calls_nothing_and_is_tried_again(
    ticking: Ticking, caplog: pytest.LogCaptureFixture
) -> None:
    task = recurring(QUEUE)
    failures = iter([RuntimeError("once")])

    def event_of(tick: datetime.datetime) -> Event:
        for error in failures:
            raise error
        return task.event(tick)

    failing = RecurringTask("tick", QUEUE, QUICK, False, False, event_of)
    ticking.start(failing)
    wait_until(lambda: len(ticking.calls()) >= 2)
    times = [at for at, _ in ticking.calls()]
    assert times == [times[0] + number * TICK for number in range(len(times))]
    assert "unexpected error" in caplog.text


def test_the_records_can_be_forgotten(ticking: Ticking) -> None:
    ticking.plan("every 7 s", now(), now() - 60 * SECOND)
    record = ticking.record()
    assert record is not None
    assert (record.name, record.schedule, record.has_worker) == ("tick", "every 7 s", False)
    with open_tick_records(ticking.settings) as records:
        assert records.forget(QUEUE, "tick")
        assert not records.forget(QUEUE, "tick")
    assert ticking.record() is None


def test_workers_compete_for_each_time_in_every_database(store: Store) -> None:
    tasks = [recurring(QUEUE), recurring(QUEUE, "skipping", skips=True)]
    stopping = threading.Event()
    errors: list[Exception] = []

    def work() -> None:
        while not stopping.is_set():
            look = TickRound(store, tasks)
            try:
                with own_transaction(store.engine) as connection:
                    look.run(connection)
            except Exception as error:
                errors.append(error)
                return
            time.sleep(min(look.pause, 0.05))  # more often than needed

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    time.sleep(1)
    stopping.set()
    for worker in workers:
        worker.join()
    assert errors == []
    with own_transaction(store.engine) as connection:
        rows = connection.execute(events.select().order_by(events.c.seq)).all()
    calls: dict[str, list[datetime.datetime]] = {"tick": [], "skipping": []}
    for row in rows:
        calls[json.loads(row.headers)[TASK]].append(scheduled_for(row.headers))
    assert 2 <= len(calls["tick"]) <= 4
    first = calls["tick"][0]
    assert calls["tick"] == [first + number * TICK for number in range(len(calls["tick"]))]
    assert calls["skipping"] == [first]
    assert len({row.id for row in rows}) == len(rows)


def test_a_missing_table_is_said_with_the_remedy(
    postgresql_store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    with postgresql_store.engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE outbox_recurring")
    url = postgresql_store.engine.url.render_as_string(hide_password=False)
    ticker = open_ticker(Settings.load(url, {}), [recurring(QUEUE)])
    ticker.start()
    wait_until(lambda: "add it with `outbox sql upgrade`" in caplog.text)
    postgresql_store.create()
    with postgresql_store.engine.connect() as connection:
        wait_until(lambda: bool(tick_statements.rows(connection, QUEUE)))
    ticker.stop()
