"""Processes that share one file: they publish, consume, fork, and are killed."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.transports.database.sqlite import sqlite_file
from tests.integration.test_processes import WAYS, start
from tests.places import SQLitePlace, events_for, reading
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

WORKER = """
import logging, sys, threading
from outbox import Publisher
from outbox.consumers import Worker, consumer

_, url, exchange, queue, seen, pause = sys.argv
logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
log = open(seen, "a", buffering=1)
stop = threading.Event()


@consumer(queue, topics=["n.*"])
def act(event):
    log.write(f"{event.payload['n']} {event.redelivered}\\n")
    stop.wait(float(pause))


with Publisher(url, exchange=exchange) as publisher:
    worker = Worker([act], publisher=publisher, threads=4)
    worker.start()
    print("started", flush=True)
    sys.stdin.read()
    stop.set()
    assert worker.stop(20)
"""

PUBLISHER = """
import logging, sys
from outbox import EventCollector, Publisher

_, url, exchange, who = sys.argv
logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
print("started", flush=True)
sys.stdin.readline()
with Publisher(url, exchange=exchange) as publisher:
    for start in range(0, 250, 5):
        collector = EventCollector(publisher=publisher)
        for n in range(start, start + 5):
            collector.enqueue_event({"n": f"{who}-{n}"}, f"n.{who}")
        collector.publish().raise_for_failure()
"""


@contextlib.contextmanager
def running(program: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program from the moment it has started."""
    with subprocess.Popen(
        [sys.executable, "-c", program, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as child:
        try:
            assert child.stdout is not None
            if child.stdout.readline() != "started\n":
                raise AssertionError(child.communicate()[1])
            yield child
        finally:
            if child.poll() is None:
                child.kill()


@pytest.fixture
def place(tmp_path: Path, name: str) -> SQLitePlace:
    return SQLitePlace(str(tmp_path / "outbox.db"), name)


@pytest.mark.slow
def test_four_processes_publish_and_four_consume_without_an_error_about_a_locked_file(
    place: SQLitePlace, name: str, tmp_path: Path
) -> None:
    with reading(place, name, ["n.*"]):
        pass
    logs = [tmp_path / f"seen-{n}" for n in range(4)]
    with contextlib.ExitStack() as stack:
        workers = [
            stack.enter_context(running(WORKER, place.url, name, name, str(log), "0"))
            for log in logs
        ]
        publishers = [
            stack.enter_context(running(PUBLISHER, place.url, name, str(n))) for n in range(4)
        ]
        for one in publishers:
            assert one.stdin is not None
            one.stdin.write("go\n")
            one.stdin.flush()
        errors = [one.communicate(timeout=60)[1] for one in publishers]
        wait_until(lambda: place.execute("SELECT count(*) FROM outbox_events") == [(0,)], 30)
        errors += [one.communicate(timeout=30)[1] for one in workers]
        assert [one.returncode for one in publishers + workers] == [0] * 8
    assert errors == [""] * 8
    seen = Counter(line.split()[0] for log in logs for line in log.read_text().splitlines())
    assert seen == Counter(f"{who}-{n}" for who in range(4) for n in range(250))


COMES_AND_GOES = """
import logging, sys
from outbox import Event, Publisher

_, url, exchange, who = sys.argv
logging.basicConfig(level="WARNING", format="%(levelname)s %(message)s")
print("started", flush=True)
sys.stdin.readline()
for n in range(15):
    with Publisher(url, exchange=exchange, unroutable="fail") as publisher:
        for m in range(3):
            event = Event(id=f"{who}-{n}-{m}", target="n", exchange="", body=b"")
            publisher.publish([event]).raise_for_failure()
"""


@pytest.mark.slow
def test_several_processes_can_create_the_file_and_come_and_go(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/new.db"
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(running(COMES_AND_GOES, url, "x", str(who))) for who in range(4)
        ]
        place = SQLitePlace(str(tmp_path / "new.db"), "x")
        place.bind("n", "")
        for one in started:
            assert one.stdin is not None
            one.stdin.write("go\n")
            one.stdin.flush()
        errors = [one.communicate(timeout=60)[1] for one in started]
    assert errors == [""] * 4
    rows = place.execute("SELECT id FROM outbox_events")
    assert len(rows) == 4 * 15 * 3
    assert set(rows) == {(f"{a}-{b}-{c}",) for a in range(4) for b in range(15) for c in range(3)}


def test_messages_of_a_killed_worker_are_redelivered_when_its_lease_has_ended(
    place: SQLitePlace, name: str, tmp_path: Path
) -> None:
    with reading(place, name, ["n.*"]):
        pass
    first, second = tmp_path / "first", tmp_path / "second"
    with place.publisher() as publisher:
        publisher.publish(events_for(publisher, ["n.x"] * 6))
    with running(WORKER, place.url, name, name, str(first), "60") as worker:
        wait_until(lambda: first.exists() and len(first.read_text().splitlines()) == 4)
        worker.send_signal(signal.SIGKILL)
        assert worker.wait(10) == -9
    leases = place.execute(
        "SELECT available_at - (julianday('now') - 2440587.5) * 86400 FROM outbox_events"
    )
    assert all(20 < left <= 30 for (left,) in leases)
    place.execute("UPDATE outbox_events SET available_at = available_at - 30")  # time passes
    with running(WORKER, place.url, name, name, str(second), "0") as worker:
        wait_until(lambda: place.execute("SELECT * FROM outbox_events") == [])
        assert worker.communicate(timeout=20)[1] == ""
    again = [line.split() for line in second.read_text().splitlines()]
    assert sorted(again) == [[str(n), "True"] for n in range(6)]


@pytest.mark.parametrize(("how", "method"), WAYS)
def test_a_child_has_its_own_connection_and_does_not_harm_its_parents(
    place: SQLitePlace, name: str, tmp_path: Path, how: str, method: str
) -> None:
    place.bind(name, name, "#")
    program = start(tmp_path, place.url, name, how, method, "10", "5")
    output, errors = program.communicate(timeout=30)
    assert (program.returncode, errors) == (0, "")
    rows = place.execute("SELECT id, payload FROM outbox_events ORDER BY seq")
    assert [json.loads(body) for _, body in rows] == ["parent, before", "child", "parent, after"]
    assert [event_id for event_id, _ in rows] == output.split()
    assert place.execute("PRAGMA integrity_check") == [("ok",)]


FORKS = """
import os, sys, threading, warnings
from outbox import Event, Publisher

warnings.simplefilter("ignore", DeprecationWarning)
_, url, exchange = sys.argv
publisher = Publisher(url, exchange=exchange)
stop = threading.Event()
event = Event(id="p", target="p", exchange=exchange, body=b"")


def publish():
    while not stop.is_set():
        assert publisher.publish([event] * 10).ok


threads = [threading.Thread(target=publish) for _ in range(2)]
for thread in threads:
    thread.start()
for n in range(40):
    child = os.fork()
    if not child:
        assert publisher.publish([Event(id=f"c{n}", target="c", exchange=exchange, body=b"")]).ok
        publisher.close()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
stop.set()
for thread in threads:
    thread.join()
publisher.close()
"""


ORPHAN = """
import os, sys
from outbox import Event, Publisher

_, url, exchange = sys.argv
publisher = Publisher(url, exchange=exchange)
assert publisher.publish([Event(id="parent", target="p", exchange=exchange, body=b"")]).ok
if os.fork():
    os._exit(0)  # as a daemon's parent does
for n in range(2):
    assert publisher.publish([Event(id=f"{n}", target="p", exchange=exchange, body=b"")]).ok
    print("published", flush=True)
    sys.stdin.readline()
publisher.close()
print("closed", flush=True)
"""


def test_the_child_of_a_parent_that_has_ended_has_its_own_locks(
    place: SQLitePlace, name: str
) -> None:
    place.bind(name, name, "#")
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, place.url, name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        assert parent.stdin is not None
        assert parent.stdout is not None
        assert parent.stdout.readline() == "published\n"
        assert parent.wait(10) == 0
        # Another process that looks and goes is not the last: the log must stay.
        look = (
            "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); "
            "c.execute('SELECT 1 FROM outbox_events').fetchall(); c.close()"
        )
        subprocess.run([sys.executable, "-c", look, place.path], check=True)
        assert Path(f"{place.path}-wal").exists()
        parent.stdin.write("\n\n")
        parent.stdin.flush()
        assert parent.stdout.read() == "published\nclosed\n"
    rows = place.execute("SELECT id FROM outbox_events ORDER BY seq")
    assert rows == [("parent",), ("0",), ("1",)]


def test_a_file_that_was_open_during_an_unnoticed_fork_is_not_used(
    place: SQLitePlace, monkeypatch: pytest.MonkeyPatch
) -> None:
    with place.publisher(drain_timeout=0) as publisher:
        publisher.make_ready()
        wait_until(lambda: publisher.connected)
        monkeypatch.setattr(sqlite_file, "_unsafe", {place.path})
        with place.publisher(drain_timeout=0) as other:
            report = other.publish(events_for(other, ["a"]))
            assert len(report.kept) == 1
            assert "was open when this process was forked" in str(report.error)


@pytest.mark.slow
def test_a_process_may_fork_at_any_moment_while_publishing(place: SQLitePlace, name: str) -> None:
    place.bind(name, name, "#")
    done = subprocess.run(
        [sys.executable, "-c", FORKS, place.url, name],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    children = place.execute("SELECT id FROM outbox_events WHERE type = 'c' ORDER BY seq")
    assert children == [(f"c{n}",) for n in range(40)]
    with contextlib.closing(sqlite3.connect(place.path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
