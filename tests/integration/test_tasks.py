"""Tasks over every transport: called here, run by a worker."""

from __future__ import annotations

import datetime
import decimal
import json
import os
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.orm import Session, scoped_session, sessionmaker

import outbox.sql
from outbox import Event, Publisher, UsageError, auto_publishing, configure, publish
from outbox.consumers import Worker, consumer
from outbox.consumers.discovery import load
from outbox.messages.delivery import dead_letter_queue
from outbox.messages.headers import TASK
from outbox.results.results_store import ResultsStore
from outbox.sinks import bind
from outbox.sql.mapped_instances import MAPPING
from outbox.storage.engines import open_engine
from outbox.tasks import NoResults, TaskHandle, later, options, schedule
from tests import counting, shipping
from tests.places import Place, SQLitePlace, reading
from tests.shipping import Box, Colour, Customer, Newsletter, Order, Parcel, Special
from tests.waiting import wait_until


@pytest.fixture(autouse=True)
def noted() -> list[Any]:
    shipping.log.clear()
    shipping.runs.clear()
    return shipping.log


@pytest.fixture
def publisher(place: Place, name: str) -> Publisher:
    place.will_clean_up(name)
    place.will_clean_up(dead_letter_queue(name))
    return configure(
        place.url, exchange=place.exchange, tasks_queue=name, task_session=sessionmaker()
    )


@pytest.fixture
def worker(publisher: Publisher) -> Iterator[Worker]:
    worker = Worker(load(["tests.shipping"]), publisher=publisher, threads=2)
    worker.start()
    wait_until(lambda: worker.is_consuming)
    yield worker
    assert worker.stop(10)


def dead(place: Place, name: str, count: int = 1) -> list[str]:
    """Return the reasons of dead letters."""
    with reading(place, dead_letter_queue(name), again=True) as reader:
        letters = reader.get(count)
    return [(letter.headers or {})["outbox-dead-reason"] for letter in letters]


def hostile(publisher: Publisher, queue: str, task: Any, body: bytes) -> None:
    """Publish what any program could, to the queue of tasks."""
    headers = {} if task is None else {TASK: task}
    event = Event(id=f"x{time.monotonic_ns()}", target=queue, exchange="", body=body)
    object.__setattr__(event, "headers", headers)
    assert publisher.publish([event]).ok


def test_the_first_task_of_a_fresh_installation_waits_for_its_worker(
    place: Place, publisher: Publisher, name: str, noted: list[Any]
) -> None:
    with auto_publishing() as block:
        handles = [shipping.greet.later(number) for number in range(300)]
    assert block.report is not None
    assert len(block.report.published) == 300
    assert handles[0].status == ("waiting" if isinstance(place, SQLitePlace) else "unknown")
    worker = Worker(load(["tests.shipping"]), publisher=publisher)
    worker.start()
    wait_until(lambda: len(noted) == 300, 20)
    assert worker.stop(10)
    assert sorted(noted) == [(number, "hello") for number in range(300)]
    assert handles[0].status == ("succeeded" if isinstance(place, SQLitePlace) else "unknown")


def test_a_delayed_task_of_a_fresh_installation_waits_too(
    place: Place, publisher: Publisher, name: str, noted: list[Any]
) -> None:
    with auto_publishing() as block:
        schedule(datetime.timedelta(seconds=1), shipping.greet, 1)
    assert block.report is not None
    assert block.report.published
    worker = Worker(load(["tests.shipping"]), publisher=publisher)
    worker.start()
    wait_until(lambda: noted == [(1, "hello")], 20)
    assert worker.stop(10)


def test_arguments_arrive_as_they_were_given(worker: Worker, noted: list[Any]) -> None:
    now = datetime.datetime.now(datetime.UTC)
    box = Box(decimal.Decimal("1.50"), now, Box(decimal.Decimal(2), now))
    span = datetime.timedelta(days=3, microseconds=1)
    with auto_publishing():
        shipping.carry.later(
            now.date(),
            [box],
            Colour.BLUE,
            span,
            tags=frozenset("ab"),
            by_number={7: ("seven", b"\x00\xff")},
        )
        later(shipping.loose, {"a": [1, None]}, other=1.5)
        later(Newsletter.deliver_all, at="noon", delay=3)
        later(shipping.Weekly.deliver_all, "later")
        later(Newsletter.render, "text")
        later(shipping.plain, 5)
    wait_until(lambda: len(noted) == 6, 10)
    carried = (now.date(), [box], Colour.BLUE, (span,), frozenset("ab"), {7: ("seven", b"\0\xff")})
    assert carried in noted
    for note in (
        ({"a": [1, None]}, 1.5),
        ("Newsletter", "noon", 3),
        ("Weekly", "later", 0),
        "text",
        ("plain", 5),
    ):
        assert note in noted


def test_a_task_knows_what_it_is_and_coroutines_run_on_the_loop(
    worker: Worker, noted: list[Any], name: str
) -> None:
    with auto_publishing():
        handle = shipping.greet.later(1)
        waited = shipping.wait.later(2)
    wait_until(lambda: len(noted) == 2, 10)
    [run] = shipping.runs
    assert run is not None
    assert (run.id, run.name, run.attempt, run.queue) == (
        handle.id,
        "tests.shipping:greet",
        1,
        name,
    )
    [(_, number, thread, here)] = [note for note in noted if note[0] == "waited"]
    assert (number, thread, here.id) == (2, "outbox-worker-loop", waited.id)


def test_filters_callbacks_and_retries_are_the_tasks_own(
    place: Place, worker: Worker, noted: list[Any], name: str
) -> None:
    with auto_publishing():
        shipping.audited.later(False)
    wait_until(lambda: len(noted) == 4, 10)
    full = "tests.shipping:audited"
    assert noted == [("before", full, full), "running", "after", ("succeeded", True)]
    noted.clear()
    with auto_publishing():
        shipping.audited.later(True)
    assert dead(place, name) == ["ValueError: no"]
    assert noted == [("before", full, full), "running", ("dead", "ValueError: no")]
    noted.clear()
    with auto_publishing():
        shipping.fails.later("again")
        shipping.fails.later("reject")
        shipping.slow.later()
    reasons = dead(place, name, 3)
    assert sorted(reasons)[:2] == ["LookupError: again", "ProcessTimeout: it took more than 0.1 s"]
    assert "not wanted" in reasons
    assert sorted(noted) == [("again", 1), ("again", 2), ("reject", 1)]


def test_follow_on_tasks_are_published_with_the_task(worker: Worker, noted: list[Any]) -> None:
    with auto_publishing():
        shipping.follow.later(9)
    wait_until(lambda: noted == [(9, "hello")], 10)


def test_names_and_aliases_and_priorities(
    place: Place, publisher: Publisher, worker: Worker, noted: list[Any], name: str
) -> None:
    with auto_publishing() as block:
        shipping.keep.later(1)
        shipping.keep.options(priority=9, key="k").later(2)
        schedule(datetime.timedelta(0), shipping.plain, 3)
        later(shipping.plain, 4)
        priorities = [one.priority for one in block.events]
    assert priorities == [7, 9, 3, 5]
    hostile(publisher, name, "old.module:keep", b'{"args":[5]}')
    wait_until(lambda: len(noted) == 5, 10)
    assert ("keep", 5) in noted


def test_an_unknown_name_is_put_back_and_counts_no_attempt(
    place: Place, publisher: Publisher, name: str, noted: list[Any], caplog: Any
) -> None:
    other = Worker([load(["tests.greeting"])[0]], publisher=publisher, threads=1)
    with auto_publishing():
        shipping.fails.later("once")
    other.start()
    wait_until(lambda: "retry in 1.0 s" in caplog.text, 10)
    assert other.stop(10)
    assert "no task of this worker is named 'tests.shipping:fails'" in caplog.text
    worker = Worker(load(["tests.shipping"]), publisher=publisher, threads=1)
    worker.start()
    assert dead(place, name) == ["LookupError: once"]
    assert worker.stop(10)
    assert noted == [("once", 1), ("once", 2)]


def test_an_unknown_name_is_a_dead_letter_when_its_time_is_up(
    place: Place, name: str, noted: list[Any]
) -> None:
    place.will_clean_up(name)
    place.will_clean_up(dead_letter_queue(name))
    publisher = configure(
        place.url,
        exchange=place.exchange,
        tasks_queue=name,
        unknown_task_after=0,
        task_session=sessionmaker(),
    )
    worker = Worker(load(["tests.shipping"]), publisher=publisher, threads=1)
    worker.start()
    with auto_publishing():
        shipping.greet.later(1)
    wait_until(lambda: len(noted) == 1, 10)
    hostile(publisher, name, "no:where", b"{}")
    assert dead(place, name) == ["no task is named 'no:where', for 0 s now"]
    assert worker.stop(10)


@pytest.mark.parametrize(
    "task",
    [
        "tests.shipping:run",
        "tests.shipping:log.append",
        "tests.shipping:os.system",
        "tests.shipping:Order.metadata.drop_all",
        "tests.shipping:Order.__init__",
        "tests.shipping:Order._secret",
        "tests.shipping:Order.is_open",
        "tests.shipping:Newsletter.personal",
        "tests.shipping:greet.__globals__.clear",
        "tests.shipping:Base.registry",
        "subprocess:run",
        "tests.shipping:" + "a." * 100,
    ],
)
def test_nothing_else_than_the_table_is_called(task: str) -> None:
    configure("memory://", task_session=sessionmaker())
    table = load(["tests.shipping"])[0]._table  # type: ignore[attr-defined]
    assert task not in table.entries


def test_hostile_messages_are_dead_letters(
    place: Place, publisher: Publisher, worker: Worker, noted: list[Any], name: str
) -> None:
    deep = b'{"args":[' + b"[" * 50_000 + b"]" * 50_000 + b"]}"
    cases: list[tuple[Any, bytes, str]] = [
        (None, b'{"args":[1]}', "names no task"),
        (7, b'{"args":[1]}', "names no task"),
        ("shop:" + "a." * 5000, b'{"args":[1]}', "names no task"),
        ("a\nb", b'{"args":[1]}', "names no task"),
        ("tests.shipping:greet", b"[1]", "must be an object"),
        ("tests.shipping:greet", b'{"args":{}}', "must be lists"),
        ("tests.shipping:greet", b'{"args":[1],"kwargs":[]}', "must be lists"),
        ("tests.shipping:greet", b'{"args":[1,2,3]}', "don't fit"),
        ("tests.shipping:greet", b'{"kwargs":{"other":1}}', "don't fit"),
        ("tests.shipping:greet", b'{"args":[NaN]}', "undecodable"),
        ("tests.shipping:greet", b'{"args":[' + b"9" * 5000 + b"]}", "undecodable"),
        ("tests.shipping:greet", deep, "undecodable"),
        ("tests.shipping:carry", b'{"args":["x",[]],"typed":[0]}', "can't be read"),
        ("tests.shipping:carry", b'{"args":[1,[1]],"typed":[1]}', "can't be read"),
        ("tests.shipping:Order.ship", b'{"args":[1]}', "isn't an instance"),
        (
            "tests.shipping:Order.ship",
            b'{"args":[{"$instance":["os:system",[1]]}],"typed":[0]}',
            "no mapped class",
        ),
        ("tests.shipping:Order.ship", b'{"args":[{"$instance":1}],"typed":[0]}', "can't be read"),
        (
            "tests.shipping:Order.ship",
            b'{"args":[{"$instance":["tests.shipping:Order",[{}]]}],"typed":[0]}',
            "no part of a key",
        ),
    ]
    for task, body, _ in cases:
        hostile(publisher, name, task, body)
    reasons = dead(place, name, len(cases))
    for _, _, reason in cases:
        assert any(reason in found for found in reasons), (reason, reasons)
    assert all(len(reason) <= 2000 for reason in reasons)
    assert noted == []
    with auto_publishing():
        shipping.greet.later(1)
    wait_until(lambda: noted == [(1, "hello")], 10)


def test_a_call_that_deduplicates_runs_once(
    publisher: Publisher, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_DATABASE_URL", str(engine.url))
    counting.counted.clear()
    with auto_publishing():
        for number in (1, 2):
            options(id="the same").later(counting.count, number)
        counting.count.later(3)
    worker = Worker(load(["tests.counting"]), publisher=publisher, threads=1)
    worker.start()
    wait_until(lambda: len(counting.counted) == 2, 10)
    assert worker.stop(10)
    assert counting.counted == [1, 3]


@pytest.mark.one_python
def test_outbox_consume_runs_the_tasks_of_a_module(tmp_path: Path) -> None:
    source = (
        "import os\nfrom outbox.tasks import current_task, task\n"
        "@task\ndef die():\n    os._exit(3)\n"
        "@task\ndef hello(number):\n"
        "    print('ran', number, current_task().name, flush=True)\n"
        "@task\nasync def wait(number):\n    print('waited', number, flush=True)\n"
    )
    (tmp_path / "shop.py").write_text(source)
    call = (
        "import shop\nfrom outbox import auto_publishing\n"
        "with auto_publishing():\n    shop.hello.later(1); shop.wait.later(2); shop.die.later()\n"
    )
    environment = {
        **os.environ,
        "OUTBOX_URL": f"sqlite:///{tmp_path / 'outbox.db'}",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    subprocess.run(
        [sys.executable, "-c", call], cwd=tmp_path, env=environment, check=True, timeout=20
    )
    output = tmp_path / "output"
    command = ["outbox.consumers", "shop", "--isolate", "process", "--log-format", "json"]
    with output.open("wb") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=tmp_path, env=environment, stdout=log, stderr=log
        )
    try:
        wait_until(lambda: output.read_text().count("finished") == 2, 20)
        wait_until(lambda: "dead-lettered" in output.read_text(), 20)
    finally:
        worker.terminate()
        assert worker.wait(20) == 0
    text = output.read_text()
    assert "ran 1 shop:hello" in text
    assert "waited 2" in text
    assert '"task": "shop:hello"' in text
    store = ResultsStore(open_engine(environment["OUTBOX_URL"]))
    rows = {row.task: row for row in store.find()}
    store.engine.dispose()
    assert (rows["shop:hello"].status, rows["shop:wait"].status) == ("succeeded", "succeeded")
    assert (rows["shop:die"].status, rows["shop:die"].error_type) == ("failed", "ProcessDied")


# ------------------------------------------------------------------------ handles


def test_a_waiting_task_is_cancelled_in_a_file(place: Place, publisher: Publisher) -> None:
    with auto_publishing():
        soon = schedule(datetime.timedelta(hours=1), shipping.greet, 1)
    again: TaskHandle[Any] = TaskHandle(soon.id)
    if not isinstance(place, SQLitePlace):
        assert again.status == "unknown"
        with pytest.raises(NoResults, match="can't be cancelled"):
            again.cancel()
        return
    assert (again.status, soon.status) == ("waiting", "waiting")
    assert again.cancel()
    assert (again.status, again.cancel()) == ("cancelled", True)


@pytest.mark.slow
def test_a_task_that_a_worker_has_is_not_cancelled(
    place: Place, publisher: Publisher, name: str
) -> None:
    if not isinstance(place, SQLitePlace):
        pytest.skip("a broker's queue gives nothing back")
    began, may_end = threading.Event(), threading.Event()

    @consumer(name)
    def hold(event: Any) -> None:
        began.set()
        may_end.wait(10)

    with auto_publishing():
        handle = shipping.greet.options(keep_result=False).later(1)
    worker = Worker([hold], publisher=publisher, threads=1)
    worker.start()
    assert began.wait(10)
    assert (handle.status, handle.cancel()) == ("unknown", False)
    may_end.set()
    assert worker.stop(10)


# ------------------------------------------------------------------------ mapped instances


@pytest.fixture
def engine(tmp_path: Any) -> Iterator[Engine]:
    engine = create_engine(f"sqlite:///{tmp_path / 'shop.db'}")
    shipping.Base.metadata.create_all(engine)
    outbox.sql.metadata.create_all(engine)
    yield engine
    bind(None)
    engine.dispose()


@pytest.fixture(autouse=True)
def stopped_workers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No worker of a test that failed remains."""
    workers: list[Worker] = []
    start = Worker.start

    def noted_start(worker: Worker) -> None:
        workers.append(worker)
        start(worker)

    monkeypatch.setattr(Worker, "start", noted_start)
    yield
    for worker in workers:
        worker.stop(10)


def running(place: Place, name: str, engine: Engine) -> Worker:
    publisher = configure(
        place.url,
        exchange=place.exchange,
        tasks_queue=name,
        task_session=sessionmaker(engine),
    )
    place.will_clean_up(name)
    place.will_clean_up(dead_letter_queue(name))
    worker = Worker(load(["tests.shipping"]), publisher=publisher, threads=2)
    worker.start()
    return worker


def test_methods_of_instances_run_in_a_session_that_is_committed(
    place: Place, name: str, engine: Engine, noted: list[Any]
) -> None:
    worker = running(place, name, engine)
    with Session(engine) as session, session.begin():
        session.add_all([Order(id=1), Special(id=2), Order(id=3), Order(id=4)])
        session.add(Customer(name="Ann"))
    with Session(engine) as session, auto_publishing():
        order, special = session.get_one(Order, 1), session.get_one(Order, 2)
        [ann] = session.query(Customer)
        later(order.ship, ann, fast=True)
        later(special.ship)
        shipping.weigh.later(special, 12)
        later(shipping.loose, order, other=3)
        later(session.get_one(Order, 3).lose)
        later(session.get_one(Order, 4).announce)
    with reading(place, f"{name}-announced", ["order.announced"]):
        assert dead(place, name) == ["LookupError: lost"]
    wait_until(lambda: len(noted) == 4, 10)
    assert ("Order", 1, "Ann", True) in noted
    assert ("Special", 2, None, True) in noted
    assert (2, 12) in noted
    assert any(isinstance(note[0], Order) and note[1] == 3 for note in noted)
    assert worker.stop(10)
    with Session(engine) as session:
        states = {order.id: order.state for order in session.query(Order)}
    assert states == {1: "shipped", 2: "shipped", 3: "new", 4: "announced"}


def test_a_key_arrives_as_its_columns_type_gives_it(
    place: Place, name: str, engine: Engine, noted: list[Any]
) -> None:
    worker = running(place, name, engine)
    serial = shipping.Serial("EU", 7)
    with Session(engine) as session, session.begin():
        session.add(Parcel(id=uuid.uuid4(), serial=serial, state="new"))
    with Session(engine) as session, auto_publishing():
        [parcel] = session.query(Parcel)
        later(parcel.send)
        later(shipping.loose, parcel, other=3)
        assert MAPPING.key_of(parcel) == [parcel.id.hex, "EU-7"]
    wait_until(lambda: len(noted) == 2, 10)
    assert ("sent", parcel.id, serial) in noted
    assert worker.stop(10)


def test_a_missing_instance_is_looked_for_again(
    place: Place, name: str, engine: Engine, noted: list[Any], caplog: Any
) -> None:
    worker = running(place, name, engine)
    with Session(engine) as session:
        order = Order(id=1)
        session.add(order)
        session.flush()
        with auto_publishing():
            later(order.ship)
        wait_until(lambda: "retry in 1.0 s" in caplog.text, 10)
        session.commit()
    wait_until(lambda: noted == [("Order", 1, None, False)], 15)
    assert worker.stop(10)


def test_a_task_of_a_bound_session_is_stored_with_its_instance(
    place: Place, name: str, engine: Engine, noted: list[Any]
) -> None:
    if not isinstance(place, SQLitePlace):
        pytest.skip("what is stored is the same for every broker")
    publisher = configure(place.url, exchange=place.exchange, tasks_queue=name)
    sessions = scoped_session(sessionmaker(engine))
    outbox.sql.bind(sessions)
    worker = Worker(load(["tests.shipping"]), publisher=publisher, threads=2)
    worker.start()
    session = sessions()
    order = Order(id=1)
    session.add(order)
    session.flush()
    handle = later(order.ship)
    [stored] = outbox.sql.transaction.uncommitted_events(session)
    assert stored.payload["args"] == [{"$instance": ["tests.shipping:Order", [1], True]}]
    session.commit()
    wait_until(lambda: noted == [("Order", 1, None, False)], 10)
    wait_until(lambda: handle.status == "succeeded", 10)
    wait_until(lambda: place.count(name) == 0, 10)  # and so the session of the task has ended
    session.delete(order)
    session.commit()
    hostile(publisher, name, "tests.shipping:Order.ship", stored.body)
    [reason] = dead(place, name)
    assert "it was committed with the task, so it was deleted since" in reason
    assert session.query(Order).all() == []
    scheduled = schedule(datetime.timedelta(hours=1), shipping.greet, 1)
    assert scheduled.status == "collected"
    session.commit()
    assert scheduled.status == "waiting"
    assert scheduled.cancel()
    sessions.remove()
    assert worker.stop(10)


def test_a_task_may_be_called_while_its_instance_is_written(
    place: Place, name: str, engine: Engine, noted: list[Any], recwarn: Any
) -> None:
    if not isinstance(place, SQLitePlace):
        pytest.skip("what is stored is the same for every broker")
    configure(place.url, exchange=place.exchange, tasks_queue=name)
    sessions = scoped_session(sessionmaker(engine))
    outbox.sql.bind(sessions)

    def on_insert(mapper: Any, connection: Any, order: Order) -> None:
        later(order.ship)

    event.listen(Order, "after_insert", on_insert)
    try:
        session = sessions()
        session.add(Order())
        session.commit()
        session.add(Order())
        session.flush()
        session.rollback()
    finally:
        event.remove(Order, "after_insert", on_insert)
        sessions.remove()
    worker = Worker(load(["tests.shipping"]), threads=2)
    worker.start()
    wait_until(lambda: noted == [("Order", 1, None, False)], 10)
    assert worker.stop(10)
    assert not recwarn.list


def test_without_a_session_a_worker_refuses_tasks_that_take_instances() -> None:
    configure("memory://")
    with pytest.raises(UsageError, match="takes an instance of Order"):
        load(["tests.shipping"])


def test_the_wire_has_the_name_as_header_and_as_type(
    amqp_url: str, inspector: Any, name: str
) -> None:
    inspector.queue(name)
    configure(amqp_url, tasks_queue=name)
    with auto_publishing():
        shipping.greet.later(17)
    wait_until(lambda: inspector.count(name) == 1)
    _, properties, body = inspector.channel.basic_get(name, auto_ack=True)
    assert properties.type == "tests.shipping:greet"
    assert properties.headers[TASK] == "tests.shipping:greet"
    assert (properties.priority, json.loads(body)) == (5, {"args": [17]})
    options(queue=f"{name}-2", key="k").later(shipping.greet, 18)
    inspector.queue(f"{name}-2")
    assert publish().ok
    wait_until(lambda: inspector.count(f"{name}-2") == 1)
