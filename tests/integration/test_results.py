"""The results of tasks: written by workers, read by handles, in each kind of database."""

from __future__ import annotations

import asyncio
import datetime
import decimal
import gc
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event, func, select, update
from sqlalchemy.orm import sessionmaker

import outbox.sql
from outbox import Publisher, UsageError, auto_publishing, configure
from outbox.consumers import Worker
from outbox.consumers.discovery import load
from outbox.messages.delivery import dead_letter_queue
from outbox.results.open_results import results_store_of
from outbox.results.results_store import ResultsStore
from outbox.results.results_writer import ResultsWriter
from outbox.settings import Settings
from outbox.sql.inbox import done as inbox_table
from outbox.storage.clock import in_seconds
from outbox.storage.engines import open_engine
from outbox.storage.results_table import results as results_table
from outbox.tasks import (
    NoResults,
    ResultLost,
    ResultTimeout,
    TaskCancelled,
    TaskFailed,
    TaskHandle,
    later,
)
from proving.proxy import FaultProxy
from tests import accounting
from tests.amqp import Inspector, properties_of
from tests.databases import Base, Effect
from tests.places import Place, SQLitePlace, place_of
from tests.waiting import wait_until

# ------------------------------------------------------------------------ the store


@pytest.fixture
def kept(database_url: str) -> Iterator[ResultsStore]:
    """An empty table, in each kind of database."""
    engine = open_engine(database_url)
    outbox.sql.metadata_of(engine.dialect.name).create_all(engine)
    yield ResultsStore(engine)
    engine.dispose()


def begun(id_: str, task: str = "shop:pay") -> dict[str, Any]:
    return {
        "id": id_,
        "task": task,
        "queue": "tasks",
        "args": '{"args":[1]}',
        "attempt": 1,
        "token": uuid.uuid4().hex,
        "worker": "host:1",
        "enqueued": time.time(),
        "keep": 60.0,
    }


def ended(attempt: dict[str, Any], status: str, **values: Any) -> dict[str, Any]:
    names = ("id", "task", "queue", "attempt", "token")
    return {
        **{name: attempt[name] for name in names},
        "status": status,
        "value": None,
        "is_typed": 0,
        "error_type": None,
        "error": None,
        "traceback": None,
        "is_over": int(status != "retrying"),
        "keep": 60.0,
        **values,
    }


def status_of(store: ResultsStore, id_: str) -> str:
    row = store.read([id_]).get(id_)
    return "" if row is None else row.status


def set_lease(store: ResultsStore, seconds: float) -> None:
    with store.engine.begin() as connection:
        connection.execute(
            update(results_table)
            .where(results_table.c.running_until.is_not(None))
            .values(running_until=in_seconds(seconds))
        )


def test_an_attempt_begins_and_ends_and_only_its_own_end_counts(kept: ResultsStore) -> None:
    first = begun("a")
    assert kept.write([first, begun("b")], []) == {}
    row = kept.read(["a", "b", "c"])["a"]
    assert (row.status, row.task, row.queue, row.args) == (
        "running",
        "shop:pay",
        "tasks",
        '{"args":[1]}',
    )
    assert row.enqueued_at is not None
    assert abs((row.enqueued_at - datetime.datetime.now(datetime.UTC)).total_seconds()) < 60
    kept.write([], [ended(first, "retrying", error_type="KeyError", error="x")])
    row = kept.read(["a"])["a"]
    assert (row.status, row.is_final, row.error_type, row.error) == (
        "retrying",
        False,
        "KeyError",
        "x",
    )
    second = begun("a")
    assert kept.write([second], []) == {}
    kept.write([], [ended(first, "succeeded", value="1")])  # it was given up, and returns late
    assert status_of(kept, "a") == "running"
    text = "\\u0000 \N{PILE OF POO} 'quoted'"
    kept.write([], [ended(second, "succeeded", value=f'"{text}"')])
    row = kept.read(["a"])["a"]
    assert (row.status, row.is_final, row.value, row.error_type) == (
        "succeeded",
        True,
        f'"{text}"',
        "",
    )
    kept.write([], [ended(second, "failed"), ended({**begun("b"), "token": ""}, "failed")])
    assert (status_of(kept, "a"), status_of(kept, "b")) == ("succeeded", "failed")
    assert kept.counts() == {"failed": 1, "succeeded": 1}
    assert [found.id for found in kept.find(statuses=["failed"], task="shop:pay")] == ["b"]
    assert kept.forget(["a", "b", "c"]) == 2


def test_of_two_copies_of_a_message_the_one_that_noted_it_writes_the_value(
    kept: ResultsStore,
) -> None:
    """A broker delivers a message again when a connection is lost, while its task still runs."""

    def note(attempt: dict[str, Any]) -> None:
        with kept.engine.begin() as connection:
            kept.note_on(connection, attempt["id"], attempt["token"])

    def success(attempt: dict[str, Any]) -> dict[str, Any]:
        return ended({**attempt, "token": ""}, "succeeded", value="1")

    ids = ["begun before the note", "begun after the note", "begun after the value"]
    first, second = [begun(each) for each in ids], [begun(each) for each in ids]
    kept.write(first, [])
    kept.write(second[:1], [])
    note(first[0])
    assert not kept.read(ids)[ids[0]].is_final
    note(first[1])
    kept.write(second[1:2], [])
    kept.write([], [ended(second[0], "retrying"), *map(success, first)])
    kept.write(second[2:], [])
    for each in ids:
        kept.complete(each)
        row = kept.read([each])[each]
        assert (row.status, row.is_final, row.value) == ("succeeded", True, "1"), each


def test_a_batch_that_may_begin_is_not_read_back(kept: ResultsStore) -> None:
    statements: list[str] = []
    kept.prepare()
    event.listen(
        kept.engine, "before_cursor_execute", lambda *args: statements.append(args[2].split()[0])
    )
    attempts = [begun(f"t{number}") for number in range(3)]
    assert kept.write(attempts, []) == {}
    reads = kept.engine.dialect.name in ("mysql", "mariadb")  # where counts don't say it
    assert statements.count("SELECT") == reads
    other = begun("t0", "shop:refund")
    assert kept.write([other], []) == {other["token"]: "shop:pay"}
    assert statements.count("SELECT") == reads + 1


def test_an_id_belongs_to_one_task(kept: ResultsStore) -> None:
    first, other = begun("a"), begun("a", "shop:refund")
    assert kept.write([first], []) == {}
    assert kept.write([other], []) == {other["token"]: "shop:pay"}
    kept.write([], [ended(other, "failed")])
    assert status_of(kept, "a") == "running"


def test_what_was_cancelled_does_not_begin(kept: ResultsStore) -> None:
    assert kept.cancel("a")
    assert kept.cancel("a")
    attempt = begun("a")
    assert kept.write([attempt], []) == {attempt["token"]: "cancelled"}
    running = begun("b")
    kept.write([running], [])
    assert not kept.cancel("b")
    kept.write([], [ended(running, "retrying")])
    assert kept.cancel("b")
    kept.write([], [ended(running, "succeeded", value="1")])
    assert status_of(kept, "b") == "cancelled"
    again = begun("c")
    kept.write([again], [ended(again, "succeeded", value="1")])
    kept.write([], [ended(again, "succeeded", value="1")])
    assert not kept.cancel("c")


def test_what_was_cancelled_runs_again_by_its_message_or_by_another_call(
    kept: ResultsStore,
) -> None:
    kept.cancel("waits")
    kept.cancel("dropped")
    between = begun("between")
    kept.write([between], [])
    kept.write([], [ended(between, "retrying")])
    kept.cancel("between")
    attempt, other = begun("dropped"), begun("other")
    assert kept.write([attempt, other], []) == {attempt["token"]: "cancelled"}
    rows = kept.read(["waits", "dropped", "between"])
    assert {id_ for id_, row in rows.items() if row.is_dropped} == {"dropped"}
    dropped = rows["dropped"]
    assert (dropped.task, dropped.queue, dropped.args) == ("shop:pay", "tasks", attempt["args"])
    assert not kept.revive("dropped", is_dropped=False)
    for id_ in ("waits", "between"):
        assert not kept.revive(id_, is_dropped=True)
        assert kept.revive(id_, is_dropped=False)
        assert not kept.revive(id_, is_dropped=False)
    assert (status_of(kept, "waits"), status_of(kept, "between")) == ("", "retrying")
    assert kept.revive("dropped", is_dropped=True)
    again = [begun(id_) for id_ in ("waits", "dropped", "between")]
    assert kept.write(again, []) == {}
    assert kept.counts() == {"running": 4}

    call = {"task": "shop:pay", "queue": "tasks", "args": "{}"}
    assert not kept.cancel("other", call=call)  # it runs
    assert kept.cancel("row", call=call)
    assert kept.read(["row"])["row"].is_dropped
    first, second = begun("mine"), begun("mine", "shop:refund")
    kept.write([first], [ended(first, "retrying")])
    kept.write([], [ended(first, "retrying")])
    kept.cancel("mine")
    assert kept.write([second], []) == {second["token"]: "shop:pay"}
    assert not kept.read(["mine"])["mine"].is_dropped


def test_a_message_is_dropped_or_its_task_is_cancelled_no_longer_never_both(
    kept: ResultsStore,
) -> None:
    count = 60
    barrier = threading.Barrier(2)
    revived: list[bool] = []

    def revive() -> None:
        for number in range(count):
            barrier.wait(10)
            revived.append(kept.revive(f"t{number}", is_dropped=False))
            barrier.wait(10)

    thread = threading.Thread(target=revive)
    thread.start()
    begun_too: list[bool] = []
    for number in range(count):
        attempt = begun(f"t{number}")
        if number % 2:  # it had begun before
            kept.write([attempt], [])
            kept.write([], [ended(attempt, "retrying")])
        kept.cancel(f"t{number}")
        attempt = begun(f"t{number}")
        barrier.wait(10)
        begun_too.append(kept.write([attempt], []) == {})
        barrier.wait(10)
    thread.join()
    assert revived == begun_too
    left = kept.read([f"t{number}" for number in range(count)])
    assert {row.is_dropped for row in left.values() if row.status == "cancelled"} <= {True}


def test_a_cancelled_task_is_remembered_until_it_is_due(kept: ResultsStore) -> None:
    kept.cancel("soon", due_in=0)
    kept.cancel("late", due_in=30 * 86_400)
    rows = kept.read(["soon", "late"])
    now = datetime.datetime.now(datetime.UTC)
    for id_, days in (("soon", 7), ("late", 37)):
        until = rows[id_].kept_until
        assert until is not None
        assert abs((until - now) / datetime.timedelta(days=1) - days) < 0.01
    assert not kept.purge_some()
    assert len(kept.read(["soon", "late"])) == 2


def test_cancelling_and_beginning_at_once_never_both_succeed(kept: ResultsStore) -> None:
    """Each task begins on one thread and is cancelled on another, both at the same time."""
    count, winners = 60, []
    barrier = threading.Barrier(2)
    cancelled: list[bool] = []

    def cancel() -> None:
        for number in range(count):
            barrier.wait(10)
            cancelled.append(kept.cancel(f"t{number}"))
            barrier.wait(10)

    thread = threading.Thread(target=cancel)
    thread.start()
    for number in range(count):
        attempt = begun(f"t{number}")
        barrier.wait(10)
        winners.append(kept.write([attempt], []) == {})
        barrier.wait(10)
    thread.join()
    assert [*map(bool.__xor__, winners, cancelled)] == [True] * count


def test_another_copy_that_is_left_without_an_end_takes_no_success_back(
    kept: ResultsStore,
) -> None:
    first, second, third = begun("a"), begun("a"), begun("a")
    kept.write([first], [])
    kept.write([], [ended(first, "succeeded", value="1")])
    ended_at = kept.read(["a"])["a"].ended_at
    assert ended_at is not None
    assert kept.write([second], []) == {}
    row = kept.read(["a"])["a"]
    assert (row.status, row.is_final, row.value) == (
        "succeeded",
        False,
        "1",
    )  # it may end otherwise
    set_lease(kept, -1)
    row = kept.read(["a"])["a"]
    assert (row.status, row.is_final, row.value) == ("succeeded", True, "1")
    assert (row.ended_at, row.error) == (ended_at, "")
    assert not kept.cancel("a")
    kept.write([third], [])
    kept.write([], [ended(third, "failed")])
    assert status_of(kept, "a") == "failed"


def test_a_row_ends_with_its_worker(kept: ResultsStore) -> None:
    running, noted = begun("a"), begun("b")
    kept.write([running, noted], [])
    with kept.engine.begin() as connection:
        kept.note_on(connection, "b", noted["token"])
    row = kept.read(["b"])["b"]
    assert (row.status, row.is_final) == ("succeeded", False)  # its value may follow
    set_lease(kept, -1)
    assert status_of(kept, "a") == "retrying"
    row = kept.read(["b"])["b"]
    assert (row.status, row.is_final) == ("succeeded", True)
    assert "before its value was written" in row.error
    kept.renew(["a", "b"], [running["token"], noted["token"]])
    assert status_of(kept, "a") == "running"
    kept.write([], [ended(noted, "succeeded", value="3")])
    assert kept.read(["b"])["b"].value == "3"
    set_lease(kept, -1)
    assert kept.cancel("a")  # nothing runs any more


def test_the_latest_rows_are_found_whatever_their_ids(kept: ResultsStore) -> None:
    running, retried, done = begun("z-running"), begun("y-retried"), begun("x-done")
    never = begun("never")
    kept.write([], [ended({**never, "token": ""}, "retrying")])  # it has no time at all
    for id_ in ("b", "c"):
        kept.cancel(id_)
    for attempt in (retried, done, running):
        kept.write([attempt], [])
    kept.cancel("a")
    kept.write([], [ended(done, "succeeded", value="1")])
    assert kept.write([begun("y-retried")], []) == {}
    newest = ["y-retried", "x-done", "a", "z-running", "c", "b", "never"]
    assert [row.id for row in kept.find()] == newest
    assert [row.id for row in kept.find(limit=2)] == newest[:2]
    assert [row.id for row in kept.find(statuses=["cancelled"])] == ["a", "c", "b"]


def test_old_rows_are_deleted_unless_they_run(kept: ResultsStore) -> None:
    rows = [begun(f"r{number:04}") for number in range(1200)]
    kept.write(rows, [])
    kept.write([], [ended(row, "succeeded", value="1", keep=-1.0) for row in rows[1:]])
    with kept.engine.begin() as connection:
        connection.execute(update(results_table).values(kept_until=in_seconds(-1.0)))
    assert kept.purge_some()
    assert not kept.purge_some()
    assert kept.counts() == {"running": 1}


def test_a_row_that_a_database_refuses_holds_up_no_other(postgresql_url: str) -> None:
    engine = open_engine(postgresql_url)
    outbox.sql.metadata.create_all(engine)
    writer = ResultsWriter(ResultsStore(engine))
    writer.start()
    good, bad = begun("good"), begun("bad")
    for write in [writer.begin(good), writer.begin(bad)]:
        write.wait()
        assert write.error is None
    writes = [
        writer.end(ended(bad, "failed", error="\0")),
        writer.end(ended(good, "succeeded", value="1")),
    ]
    for write in writes:
        write.wait()
    assert status_of(writer.store, "good") == "succeeded"
    writer.stop(time.monotonic() + 5)
    engine.dispose()


@pytest.mark.parametrize("database_url", ["postgresql", "mariadb"], indirect=True)
def test_what_a_database_refuses_to_note_of_a_task_holds_up_no_other(kept: ResultsStore) -> None:
    writer = ResultsWriter(kept)
    running = begun("running")
    kept.write([running], [])
    others = [begun(f"r{number}") for number in range(20)]
    bad = [{**begun(f"bad{number}"), "keep": 1e20} for number in range(2)]
    end = writer.end(ended(running, "succeeded", value="1"))
    attempts = [*others[:13], bad[0], *others[13:], bad[1]]
    writes = {attempt["id"]: writer.begin(attempt) for attempt in attempts}
    writer.start()  # now, so that they are in one statement
    for write in (end, *writes.values()):
        write.wait()
        assert write.error is None
    assert end.rejection == ""
    assert {id_ for id_, write in writes.items() if write.rejection} == {"bad0", "bad1"}
    assert "overflow" in writes["bad0"].rejection or "out of range" in writes["bad0"].rejection
    assert kept.counts() == {"running": 20, "succeeded": 1}
    writer.stop(time.monotonic() + 5)


def test_looking_waits_for_no_writer_of_a_file(tmp_path: Path) -> None:
    engines = [open_engine(f"sqlite:///{tmp_path / 'shop.db'}") for _ in range(3)]
    first, application, another = engines
    ResultsStore(first).prepare()
    with application.connect() as connection:
        connection.exec_driver_sql("CREATE TABLE orders (id INTEGER)")  # it has the lock
        started = time.monotonic()
        assert ResultsStore(another).read(["1"]) == {}
        assert time.monotonic() - started < 2
    for engine in engines:
        engine.dispose()


# ------------------------------------------------------------------------ workers and handles


@pytest.fixture(autouse=True)
def fresh() -> None:
    accounting.runs.clear()
    accounting.began.clear()
    accounting.may_end.clear()


@pytest.fixture
def publisher(place: Place, name: str, tmp_path: Path) -> Publisher:
    """Queues in each place; the results of those in RabbitMQ are in a file."""
    place.will_clean_up(name)
    place.will_clean_up(dead_letter_queue(name))
    results = "" if isinstance(place, SQLitePlace) else f"sqlite:///{tmp_path / 'results.db'}"
    return configure(
        place.url,
        exchange=place.exchange,
        tasks_queue=name,
        results=results,
        task_session=sessionmaker(),
    )


@pytest.fixture
def worker(publisher: Publisher) -> Iterator[Worker]:
    with_inbox: dict[str, Any] = {}
    if publisher.settings.results:
        with_inbox["inbox"] = outbox.sql.Inbox(publisher.settings.results)
        with_inbox["inbox"].create()
    worker = Worker(load(["tests.accounting"]), publisher=publisher, threads=2, **with_inbox)
    worker.start()
    wait_until(lambda: worker.is_consuming)
    yield worker
    accounting.may_end.set()
    assert worker.stop(10)


def test_what_tasks_return_arrives(worker: Worker) -> None:
    with auto_publishing():
        number = accounting.add.later(1, 2)
        awaited = accounting.add_async.later(3, 4)
        empty = accounting.nothing.later()
        typed = accounting.months.later(2030)
    assert (number.result(10), awaited.result(10), empty.result(10)) == (3, 7, None)
    months = {datetime.date(2030, 1, 1): decimal.Decimal("1.50")}
    assert typed.result(10) == months
    again: TaskHandle[Any] = TaskHandle(typed.id)
    assert (again.result(0), again.status, again.cancel()) == (months, "succeeded", False)

    async def wait() -> list[Any]:
        async with auto_publishing():
            handles = [accounting.add.later(each, 1) for each in range(20)]
        return await asyncio.gather(*(handle.result_async(10) for handle in handles))

    assert asyncio.run(wait()) == [*range(1, 21)]


@pytest.mark.parametrize("kind", ["postgresql", "mariadb"])
def test_a_server_that_is_the_broker_keeps_the_results(
    kind: str, request: pytest.FixtureRequest, name: str, tmp_path: Path
) -> None:
    place = place_of(kind, request, name, tmp_path)
    publisher = configure(place.url, tasks_queue=name, task_session=sessionmaker())
    with auto_publishing():
        cancelled, waiting = accounting.add.later(1, 1), accounting.add.later(1, 2)
    assert (waiting.status, cancelled.cancel()) == ("waiting", True)
    assert place.count(name) == 1
    worker = Worker(load(["tests.accounting"]), publisher=publisher, threads=2, inbox=_NoInbox())
    worker.start()
    assert waiting.result(10) == 3
    assert (waiting.status, cancelled.status) == ("succeeded", "cancelled")
    assert worker.stop(10)


def test_failures_arrive_without_the_values_of_variables(worker: Worker) -> None:
    with auto_publishing():
        failed = accounting.fails.later("bad \0 input")
        hidden = accounting.secret.later("card 4711")
        refused = accounting.refuses.later()
    with pytest.raises(TaskFailed) as error:
        failed.result(10)
    assert str(error.value) == "ValueError: bad \\0 input"
    assert "accounting.py" in error.value.traceback
    assert "held in a variable" not in error.value.traceback
    with pytest.raises(TaskFailed) as error:
        hidden.result(10)
    assert (error.value.error_type, error.value.error, error.value.traceback) == (
        "ValueError",
        "(hidden)",
        "",
    )
    with pytest.raises(TaskFailed, match="not wanted"):
        refused.result(10)
    assert {handle.status for handle in (failed, hidden, refused)} == {"failed"}


def test_a_value_that_cannot_be_kept_is_lost_and_the_task_runs_once(
    worker: Worker, caplog: pytest.LogCaptureFixture
) -> None:
    with auto_publishing():
        handles: list[TaskHandle[Any]] = [accounting.odd.later(), accounting.big.later()]
    for handle, reason in zip(handles, ("object", "more than 1 MiB"), strict=True):
        with pytest.raises(ResultLost, match=reason):
            handle.result(10)
    assert accounting.runs == ["odd"]
    assert sum("is lost" in record.getMessage() for record in caplog.records) == 2


def test_what_keeps_no_result_leaves_no_row(worker: Worker) -> None:
    with auto_publishing():
        handles = [
            accounting.forgets.later(),
            accounting.add.options(keep_result=False).later(1, 1),
        ]
    wait_until(lambda: ("add", 1, 1) in accounting.runs)
    for handle in handles:
        with pytest.raises(NoResults, match="keep_result"):
            handle.result(1)
        assert handle.status == "unknown"
    with auto_publishing():
        kept = accounting.forgets.options(keep_result=datetime.timedelta(hours=1)).later()
    assert kept.result(10) == 1


def test_a_worker_that_does_not_know_a_task_keeps_no_result_either(
    place: Place, publisher: Publisher
) -> None:
    worker = Worker(load(["tests.shipping"]), publisher=publisher, threads=1, inbox=_NoInbox())
    worker.start()
    with auto_publishing():
        forgotten = [
            accounting.forgets.later(),
            accounting.add.options(keep_result=False).later(1, 1),
        ]
        kept = [accounting.forgets.options(keep_result=True).later(), accounting.add.later(1, 2)]
    wait_until(lambda: all(handle.status == "retrying" for handle in kept))
    store = results_store_of(publisher.settings)
    assert store is not None
    assert store.read([handle.id for handle in forgotten]) == {}  # they came first
    assert worker.stop(10)


def call_from_outside(inspector: Inspector, queue: str, headers: dict[str, Any]) -> str:
    """Publish a call of ``accounting.add`` as a program that knows no limits; return its id."""
    id_ = uuid.uuid4().hex
    properties = properties_of(
        headers={"outbox-task": "tests.accounting:add", **headers}, message_id=id_
    )
    inspector.channel.basic_publish("", queue, b'{"args": [1, 2]}', properties)
    return id_


def test_headers_beyond_all_bounds_harm_no_task(
    inspector: Inspector, amqp_url: str, database_url: str, name: str
) -> None:
    for queue in (name, dead_letter_queue(name)):
        inspector.clean_up(queue=queue)
    engine = open_engine(database_url)
    outbox.sql.metadata_of(engine.dialect.name).create_all(engine)
    publisher = configure(amqp_url, tasks_queue=name, results=engine, task_session=sessionmaker())
    worker = Worker(load(["tests.accounting"]), publisher=publisher, threads=2, inbox=_NoInbox())
    worker.start()
    wait_until(lambda: worker.is_consuming)
    ids = [
        call_from_outside(inspector, name, headers)
        for headers in (
            {"outbox-keep-result": 2**62},
            {"outbox-attempt": 2**62},
            {"outbox-attempt": 2**31},
            {"outbox-attempt": 2**31 - 1},
            {"outbox-occurred-at-us": 253_402_300_799_999_999},
            {},
        )
    ]
    attributes = {
        f"cloudEvents:{key}": value
        for key, value in {
            "specversion": "1.0",
            "source": "/else",
            "type": "call",
            "id": "x" * 300,
        }.items()
    }
    properties = properties_of(headers={"outbox-task": "tests.accounting:add", **attributes})
    inspector.channel.basic_publish("", name, b'{"args": [2, 2]}', properties)
    handles: list[TaskHandle[int]] = [TaskHandle(id_) for id_ in ids]
    assert [handle.result(10) for handle in handles] == [3] * len(ids)
    wait_until(lambda: ("add", 2, 2) in accounting.runs)
    until = ResultsStore(engine).read([ids[0]])[ids[0]].kept_until
    assert until is not None
    assert until < datetime.datetime.now(datetime.UTC) + datetime.timedelta(days=8)
    assert worker.stop(10)
    engine.dispose()


def test_a_task_whose_record_a_database_refuses_is_a_dead_letter(
    inspector: Inspector, amqp_url: str, postgresql_url: str, name: str
) -> None:
    for queue in (name, dead_letter_queue(name)):
        inspector.clean_up(queue=queue)
    engine = open_engine(postgresql_url)
    outbox.sql.metadata.create_all(engine)
    with engine.begin() as connection:
        connection.exec_driver_sql("ALTER TABLE outbox_results ALTER COLUMN task TYPE varchar(20)")
    publisher = configure(amqp_url, tasks_queue=name, results=engine, task_session=sessionmaker())
    worker = Worker(load(["tests.accounting"]), publisher=publisher, threads=2, inbox=_NoInbox())
    worker.start()
    with auto_publishing():
        refused = [accounting.nothing.later() for _ in range(3)]
        kept = [accounting.add.later(number, 1) for number in range(20)]
    assert [handle.result(10) for handle in kept] == [*range(1, 21)]
    reasons = {
        letter.properties.headers["outbox-dead-reason"]
        for letter in inspector.messages(dead_letter_queue(name), len(refused))
    }
    assert reasons == {"its record can't be written: value too long for type character varying(20)"}
    assert "nothing" not in accounting.runs
    assert worker.stop(10)
    engine.dispose()


def test_a_task_that_runs_is_not_cancelled_and_one_that_waits_for_it_is(
    place: Place, publisher: Publisher
) -> None:
    worker = Worker(load(["tests.accounting"]), publisher=publisher, threads=1, inbox=_NoInbox())
    worker.start()
    with auto_publishing():
        running = accounting.hold.later()
        waiting = accounting.add.later(1, 2)
    assert accounting.began.wait(10)
    assert (running.status, running.cancel()) == ("running", False)
    with pytest.raises(ResultTimeout):
        running.result(0.1)
    assert waiting.cancel()
    accounting.may_end.set()
    assert running.result(10) == "held"
    with pytest.raises(TaskCancelled):
        waiting.result(10)
    wait_until(lambda: place.count(publisher.settings.tasks_queue) == 0)
    assert worker.stop(10)
    assert accounting.runs == ["held"]


class _NoInbox:
    def entry(self, consumer: Any, event: Any) -> Any:
        raise AssertionError


def test_a_task_can_be_cancelled_between_two_attempts(worker: Worker) -> None:
    with auto_publishing():
        handle = accounting.twice.later()
        other = accounting.twice.later()
    wait_until(lambda: handle.status == "retrying")
    assert handle.cancel()
    assert other.result(10) == 2
    with pytest.raises(TaskCancelled):
        handle.result(10)
    assert sorted(accounting.runs) == [("twice", 1), ("twice", 1), ("twice", 2)]


def test_an_attempt_that_was_given_up_writes_nothing(worker: Worker) -> None:
    with auto_publishing():
        handle = accounting.slow.later()
    with pytest.raises(TaskFailed, match="ProcessTimeout"):
        handle.result(10)
    accounting.may_end.set()
    wait_until(lambda: worker.late == 0)
    assert handle.status == "failed"


def test_a_duplicate_never_leaves_a_result_running(
    worker: Worker, publisher: Publisher, place: Place
) -> None:
    """As if a worker had been killed between its commit and its return."""
    with auto_publishing():
        handle = accounting.book_once.later("first")
    assert handle.result(10) == "first"
    assert worker._results is not None
    store = worker._results.store
    with store.engine.begin() as connection:
        connection.execute(
            update(results_table).values(status="running", value=None, running_until=in_seconds(1))
        )
    with auto_publishing():
        accounting.book_once.options(id=handle.id).later("first")
    with pytest.raises(ResultLost, match="before its value was written"):
        handle.result(10)
    assert accounting.runs == ["first"]
    with store.engine.begin() as connection:
        connection.execute(update(results_table).values(value='"kept"', running_until=None))
    with auto_publishing():
        accounting.book_once.options(id=handle.id).later("first")
        last = accounting.add.later(0, 0)
    last.result(10)
    assert handle.result(10) == "kept"


def test_the_note_of_a_message_says_that_its_task_succeeds(
    publisher: Publisher, tmp_path: Path, place: Place
) -> None:
    """The row and the inbox's note are in one transaction, before the value is there."""
    if isinstance(place, SQLitePlace):
        pytest.skip("the same in every place")
    inbox = outbox.sql.Inbox(publisher.settings.results)
    inbox.create()
    store = ResultsStore(inbox.engine)
    attempt = begun("a")
    store.write([attempt], [])
    writer = ResultsWriter(store)

    class Named:
        id, queue, deduplicate = "a", "tasks", True

    entry = inbox.entry(Named(), Named())

    def note(connection: Any) -> None:
        assert writer.shares(connection)
        writer.note_on(connection, "a", attempt["token"])

    entry.accompany(note)
    entry.note()
    row = store.read(["a"])["a"]
    assert (row.status, row.is_final) == ("succeeded", False)
    with inbox.engine.connect() as connection:
        assert connection.execute(select(func.count()).select_from(inbox_table)).scalar() == 1
    inbox.engine.dispose()


def test_a_handle_waits_for_nothing_that_cannot_come(publisher: Publisher) -> None:
    with auto_publishing() as block:
        handle = accounting.add.later(1, 2)
        with pytest.raises(UsageError, match="publish"):
            handle.result()
        block.clear_events()
    with pytest.raises(UsageError, match="dropped"):
        handle.result()
    with pytest.raises(ResultTimeout):
        TaskHandle("nobody-has-published-it").result(0.05)
    never: TaskHandle[Any] = TaskHandle(str(uuid.uuid4()))
    assert (never.cancel(), never.status) == (True, "cancelled")

    async def wait() -> None:
        with pytest.raises(UsageError, match="result_async"):
            never.result()
        with pytest.raises(TaskCancelled):
            await never.result_async()

    asyncio.run(wait())


# ------------------------------------------------------------------------ sessions


@pytest.fixture(params=["postgresql", "sqlite"])
def shop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """The application's database, with all tables."""
    url = f"sqlite:///{tmp_path / 'shop.db'}"
    if request.param != "sqlite":
        url = request.getfixturevalue("postgresql_url")
    engine = create_engine(url)
    Base.metadata.create_all(engine)
    outbox.sql.metadata.create_all(engine)
    yield engine
    engine.dispose()


def test_a_session_is_committed_with_the_result(shop: Engine, tmp_path: Path, name: str) -> None:
    publisher = configure(
        f"sqlite:///{tmp_path / 'queues.db'}",
        tasks_queue=name,
        results=shop,
        task_session=sessionmaker(shop),
    )
    worker = Worker(
        load(["tests.accounting"]), publisher=publisher, threads=2, inbox=outbox.sql.Inbox(shop)
    )
    worker.start()
    with auto_publishing():
        handle = accounting.book.later("kept", 42)
        refused = later(accounting.book, "not kept", "object")
    assert handle.result(10) == 42
    with pytest.raises(TaskFailed, match=r"TypeError: what tests\.accounting:book returned"):
        refused.result(10)
    assert worker.stop(10)
    with shop.connect() as connection:
        assert connection.execute(select(Effect.of)).scalars().all() == ["kept"]


def test_a_value_survives_that_two_copies_of_its_message_run_at_once(
    shop: Engine, tmp_path: Path, name: str
) -> None:
    publisher = configure(
        f"sqlite:///{tmp_path / 'queues.db'}",
        tasks_queue=name,
        results=shop,
        task_session=sessionmaker(shop),
    )
    worker = Worker(
        load(["tests.accounting"]), publisher=publisher, threads=2, inbox=outbox.sql.Inbox(shop)
    )
    worker.start()
    for number in range(8):  # the one that began first is not always the one that commits
        with auto_publishing():
            handle = accounting.book_together.later(f"{number}")
            accounting.book_together.options(id=handle.id).later(f"{number}")
        assert handle.result(10) == f"{number}"
    assert worker.stop(10)
    with shop.connect() as connection:
        assert connection.execute(select(func.count()).select_from(Effect)).scalar() == 8


# ------------------------------------------------------------------------ outages and ends


def test_a_result_is_held_while_its_database_is_away(
    postgresql_url: str, tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    engine = open_engine(postgresql_url)
    outbox.sql.metadata.create_all(engine)
    with FaultProxy(postgresql_url) as proxy:
        publisher = configure(
            f"sqlite:///{tmp_path / 'queues.db'}",
            tasks_queue=name,
            results=proxy.url,
            task_session=sessionmaker(),
        )
        worker = Worker(
            load(["tests.accounting"]), publisher=publisher, threads=2, inbox=_NoInbox()
        )
        worker.start()
        with auto_publishing():
            handle = accounting.hold.later()
        assert accounting.began.wait(10)
        proxy.refuse()
        with auto_publishing():
            late = accounting.add.later(1, 1)
        accounting.may_end.set()
        wait_until(lambda: "results can't be written" in caplog.text)
        wait_until(lambda: "can't begin" in caplog.text)
        assert len(worker.running()) == 2
        assert accounting.runs == ["held"]
        proxy.heal()
        assert handle.result(30) == "held"
        assert late.result(30) == 2
        assert worker.stop(10)
    assert accounting.runs == ["held", ("add", 1, 1)]
    engine.dispose()


@pytest.mark.one_python
@pytest.mark.slow
def test_a_worker_that_is_killed_after_its_commit_leaves_no_result_running(
    tmp_path: Path,
) -> None:
    (tmp_path / "bank.py").write_text(
        textwrap.dedent(
            """
            import os, signal
            from sqlalchemy import create_engine, text
            from outbox.tasks import task

            engine = create_engine("sqlite:///outbox.db", connect_args={"timeout": 10})

            @task(deduplicate=True)
            def transfer() -> int:
                with engine.begin() as connection:
                    connection.execute(text("CREATE TABLE IF NOT EXISTS moved (n INTEGER)"))
                    connection.execute(text("INSERT INTO moved VALUES (1)"))
                os.kill(os.getpid(), signal.SIGKILL)
            """
        )
    )
    environment = {
        **os.environ,
        "OUTBOX_URL": "sqlite:///outbox.db",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    call = (
        "from outbox import auto_publishing; import bank\n"
        "with auto_publishing(): handle = bank.transfer.later()\n"
        "print(handle.id)"
    )
    done = subprocess.run(
        [sys.executable, "-c", call],
        cwd=tmp_path,
        env=environment,
        check=True,
        timeout=30,
        capture_output=True,
        text=True,
    )
    command = [sys.executable, "-m", "outbox.consumers", "bank", "--threads", "1"]
    worker = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
    try:
        assert worker.wait(30) == -signal.SIGKILL
        configure(f"sqlite:///{tmp_path / 'outbox.db'}")
        handle: TaskHandle[int] = TaskHandle(done.stdout.strip())
        assert handle.status == "succeeded"  # noted with the message, in the task's transaction
        with outbox_store(tmp_path).engine.begin() as connection:
            connection.execute(update(results_table).values(running_until=in_seconds(-1)))
            connection.exec_driver_sql(
                "UPDATE outbox_events SET available_at = 0, lease_token = NULL"
            )
        worker = subprocess.Popen(command, cwd=tmp_path, env=environment, start_new_session=True)
        store = outbox_store(tmp_path)
        with pytest.raises(ResultLost):
            handle.result(20)

        def is_acked() -> bool:
            with store.engine.begin() as connection:
                return not connection.exec_driver_sql("SELECT 1 FROM outbox_events").all()

        wait_until(is_acked, 20)
        with store.engine.begin() as connection:
            assert connection.exec_driver_sql("SELECT count(*) FROM moved").scalar() == 1
    finally:
        worker.terminate()
        worker.wait(20)


def outbox_store(folder: Path) -> ResultsStore:
    return ResultsStore(open_engine(f"sqlite:///{folder / 'outbox.db'}"))


def test_the_connections_of_a_database_that_is_used_no_more_are_closed(tmp_path: Path) -> None:
    engines = []
    for number in range(20):
        settings = Settings.load(None, {"results": f"sqlite:///{tmp_path}/{number}.db"})
        store = results_store_of(settings)
        assert store is not None
        assert store.read(["a"]) == {}
        engines.append((store.engine, store.engine.pool))
    del store
    gc.collect()
    engine, pool = engines[0]
    assert engine.pool is not pool  # as after dispose()
    newest, pool = engines[-1]
    assert newest.pool is pool
