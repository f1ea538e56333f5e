"""The events that a publisher still has when the program forgets it, or its process ends."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import make_url

from outbox import Event, Publisher
from outbox.storage.notifications import channel_of
from outbox.testing.broker import PrivateBroker
from outbox.transports.database.routing import add, of_queue
from tests.amqp import Inspector
from tests.relaying import opened
from tests.waiting import wait_until

CLOSED_PORT = "amqp://127.0.0.1:1/"

FORGETTING = """
import sys
from outbox import Event, Publisher, auto_publishing, enqueue_event
_, url, exchange, how = sys.argv

def announce():
    publisher = Publisher(url, exchange=exchange, timeout=0.2, drain_timeout=1)
    event = Event(id="forgotten", target="x", exchange=exchange, body=b"0")
    if how == "publish":
        publisher.publish([event])
    elif how == "submit":
        publisher.submit([event])
    else:
        with auto_publishing(publisher=publisher):
            enqueue_event(0, "x", id="forgotten")

announce()
"""

AT_EXIT = """
import atexit, sys
from outbox import auto_publishing, configure, enqueue_event
_, url, exchange = sys.argv
configure(url, exchange=exchange)

@atexit.register
def announce():
    with auto_publishing() as block:
        enqueue_event(0, "x", id="at exit")
    print(block.report)
"""

STORING_AT_EXIT = """
import atexit, sys
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from outbox import auto_publishing, configure, enqueue_event
_, url, how = sys.argv
configure(url).make_ready()
engine = create_engine(url)

@atexit.register
def announce():
    if how == "publish":
        with auto_publishing():
            enqueue_event(0, "orders", exchange="")
        return
    with Session(engine) as session:
        enqueue_event(0, "orders", exchange="", session=session)
        session.commit()
"""

STORING = """
import atexit, multiprocessing, sys

def store():
    with Session(engine) as session:
        enqueue_event(0, "x", session=session)
        session.commit()

if sys.argv[1] == "late exit handler":
    atexit.register(store)  # runs after those of outbox
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
import outbox.sql
from outbox import configure, enqueue_event

engine = create_engine(f"sqlite:///{sys.path[0]}/shop.db")
outbox.sql.metadata.create_all(engine)
configure("memory://")
store()
if sys.argv[1] == "child":
    child = multiprocessing.get_context("fork").Process(target=store)
    child.start()
    child.join()
"""

CELERY = """
import sys
from celery import Celery
import outbox
folder = {folder!r}
app = Celery("tasks", broker="filesystem://", broker_connection_retry_on_startup=True)
app.conf.update(
    broker_transport_options=dict(
        data_folder_in=folder + "/queue",
        data_folder_out=folder + "/queue",
        processed_folder=folder + "/done",
    ),
    worker_hijack_root_logger=False,
)
outbox.configure({url!r}, exchange={exchange!r}, timeout=0.2, drain_timeout={drain_timeout})

@app.task
def place(number):
    with outbox.auto_publishing():
        outbox.enqueue_event(number, "x", id=f"order-{{number}}")
"""


def run(tmp_path: Path, program: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = tmp_path / "program.py"
    path.write_text(program)
    return subprocess.run(
        [sys.executable, str(path), *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )


@pytest.mark.parametrize("how", ["publish", "submit", "block"])
def test_what_a_forgotten_publisher_has_is_published(
    amqp_url: str, inspector: Inspector, name: str, tmp_path: Path, how: str
) -> None:
    queue = inspector.queue(name, name)
    done = run(tmp_path, FORGETTING, amqp_url, name, how)
    assert done.returncode == 0, done.stderr
    assert inspector.get(queue).id == "forgotten"


@pytest.mark.parametrize("how", ["publish", "submit", "block"])
def test_what_a_forgotten_publisher_cannot_publish_is_named(
    name: str, tmp_path: Path, how: str
) -> None:
    done = run(tmp_path, FORGETTING, CLOSED_PORT, name, how)
    assert "1 event(s) lost, never confirmed: 'forgotten'" in done.stderr


def test_a_forgotten_publisher_is_closed_when_it_has_published(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    publisher = Publisher(amqp_url, exchange=name)
    thread = publisher._own_transport()._link._thread  # type: ignore[attr-defined]
    publisher.submit([Event(id="one", target="x", exchange=name, body=b"0")])
    del publisher
    gc.collect()
    assert inspector.get(queue).id == "one"
    wait_until(lambda: thread.ended)


def test_an_exit_handler_may_publish_the_first_event(
    amqp_url: str, inspector: Inspector, name: str, tmp_path: Path
) -> None:
    queue = inspector.queue(name, name)
    done = run(tmp_path, AT_EXIT, amqp_url, name)
    if sys.version_info[:2] == (3, 12):  # which starts no thread once it has begun to exit
        assert "call publisher.make_ready() before" in done.stderr
        return
    assert done.stdout == "1 published\n", done.stderr
    assert inspector.get(queue).id == "at exit"


@pytest.mark.parametrize("where", ["child", "late exit handler"])
def test_an_event_that_is_stored_at_the_end_is_published_or_named(
    tmp_path: Path, where: str
) -> None:
    done = run(tmp_path, STORING, where)
    assert done.returncode == 0, done.stderr
    with contextlib.closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        [(left,)] = connection.execute("SELECT count(*) FROM outbox_events")
    assert left == (where != "child")
    assert ("leaving 1 stored event(s) to the relay" in done.stderr) == left


def test_a_process_that_publishes_nothing_does_not_connect_at_its_end(
    name: str, tmp_path: Path
) -> None:
    program = f"import outbox; outbox.configure({CLOSED_PORT!r}, exchange={name!r})"
    done = run(tmp_path, program)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.one_python
@pytest.mark.parametrize("recovers", [True, False])
@pytest.mark.slow
def test_a_child_of_celery_drains_what_it_keeps_or_names_it(
    private_broker: PrivateBroker, name: str, tmp_path: Path, recovers: bool
) -> None:
    inspector = Inspector(private_broker.url)
    queue = inspector.queue(name, name)
    for folder in ("queue", "done"):
        (tmp_path / folder).mkdir()
    settings = {
        "folder": str(tmp_path),
        "url": private_broker.url,
        "exchange": name,
        "drain_timeout": 20 if recovers else 0.5,
    }
    (tmp_path / "tasks.py").write_text(CELERY.format(**settings))
    private_broker.pause()
    log = tmp_path / "log"
    enqueue = "import tasks; tasks.place.delay(1)"
    subprocess.run([sys.executable, "-c", enqueue], cwd=tmp_path, check=True, timeout=20)
    command = [sys.executable, "-m", "celery", "-A", "tasks", "worker", "--concurrency", "1"]
    command += ["--max-tasks-per-child", "1", "--without-gossip", "--without-mingle"]
    with log.open("w") as output:
        worker = subprocess.Popen(
            command, cwd=tmp_path, stdout=output, stderr=output, start_new_session=True
        )
    try:
        wait_until(lambda: "'order-1'" in log.read_text(), 20)
        if recovers:
            time.sleep(0.5)
            private_broker.resume()
            assert inspector.get(queue, 30).id == "order-1"
            assert "lost" not in log.read_text()
        else:
            wait_until(lambda: "1 event(s) lost, never confirmed: 'order-1'" in log.read_text(), 30)
    finally:
        private_broker.resume()
        os.killpg(worker.pid, signal.SIGKILL)  # a warm shutdown may hang, in billiard
        worker.wait(30)
        inspector.close()


def test_a_log_line_names_all_that_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    publisher = Publisher(CLOSED_PORT, timeout=0.1)
    events = [Event(id=f"id-{n}", target="x", exchange="", body=b"0") for n in range(30)]
    publisher.submit(events)
    lost = publisher.close(0.1)
    assert lost == tuple(events)
    assert all(repr(event.id) in caplog.text for event in events)


@pytest.mark.parametrize("how", ["publish", "store"])
def test_what_is_committed_at_exit_wakes_workers(postgresql_url: str, how: str) -> None:
    store = opened(postgresql_url)
    with store.engine.begin() as connection:
        add(connection, [of_queue("orders")])
    address = make_url(postgresql_url).set(drivername="postgresql").render_as_string(False)
    with psycopg.connect(address, autocommit=True) as listener:
        listener.execute(f'LISTEN "{channel_of("orders")}"')
        command = [sys.executable, "-c", STORING_AT_EXIT, postgresql_url, how]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=30)
        assert (ended.returncode, ended.stderr) == (0, "")
        [_] = list(listener.notifies(timeout=5, stop_after=1))
    store.engine.dispose()
