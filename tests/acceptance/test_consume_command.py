"""``outbox-consume`` as its users run it: a process, signals, exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from outbox import exit_codes
from outbox.system.signals import BURST
from tests.amqp import Inspector, properties_of
from tests.waiting import wait_until

MODULE = """
import asyncio, gc, pathlib, time
from outbox import enqueue_event, publish, publish_async
from outbox.consumers import Consumer, consumer

class Slow(Consumer):
    queue = "{name}"
    exchange = "{name}"

    def process(self, event):
        pathlib.Path("started").touch()
        time.sleep(event.payload)
        pathlib.Path("frozen").write_text(str(gc.get_freeze_count()))
        enqueue_event({{"slept": event.payload}}, "{name}.done", exchange="{name}")
        publish()

class SlowTask(Consumer):
    queue = "{name}.task"
    exchange = "{name}"

    async def process(self, event):
        pathlib.Path("started").touch()
        await asyncio.sleep(event.payload)
        enqueue_event({{"slept": event.payload}}, "{name}.done", exchange="{name}")
        await publish_async()

class Blocked(Consumer):
    queue = "{name}.blocked"
    exchange = "{name}"

    async def process(self, event):
        pathlib.Path("started").touch()
        await asyncio.to_thread(time.sleep, event.payload)

class Lingering(Consumer):
    queue = "{name}.lingering"
    exchange = "{name}"

    def process(self, event):
        enqueue_event({{"of": event.payload}}, "{name}.done", exchange="{name}")
        publish()
        if not pathlib.Path("hurry").exists():
            time.sleep(60)

@consumer("{name}.other", exchange="{name}")
def other(event):
    pass
"""

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path, amqp_url: str, name: str, inspector: Inspector) -> Iterator[Start]:
    """Start the command in a folder with a module ``work`` of two consumers."""
    (tmp_path / "work.py").write_text(MODULE.format(name=name))
    started: list[subprocess.Popen[str]] = []

    def start(
        *arguments: str, program: Sequence[str] = ("-m", "outbox.consumers")
    ) -> subprocess.Popen[str]:
        child = subprocess.Popen(
            [sys.executable, *program, *arguments],
            cwd=tmp_path,
            env={**os.environ, "OUTBOX_URL": amqp_url, "OUTBOX_EXCHANGE": name},
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(child)
        return child

    yield start
    for child in started:
        if child.poll() is None:
            child.kill()
        child.communicate(timeout=10)
    for queue in (name, f"{name}.other", f"{name}.lingering", f"{name}.task", f"{name}.blocked"):
        inspector.clean_up(queue=queue)
        inspector.clean_up(queue=f"{queue}.dead")
    inspector.clean_up(exchange=name)


def wait_for_consumer(inspector: Inspector, queue: str) -> None:
    inspector.wait_for_queue(queue, 20)
    deadline = time.monotonic() + 20
    while not inspector.consumers(queue):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_file(path: Path) -> None:
    deadline = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_thread_that_cannot_be_stopped_does_not_hold_up_the_exit(
    start: Start, inspector: Inspector, name: str, tmp_path: Path
) -> None:
    impatient = (
        "import sys; from outbox.consumers.command import consume; "
        "consume.MARGIN = 1; sys.exit(consume.main())"
    )
    child = start("work:Blocked", "--shutdown-timeout", "0.2", program=("-c", impatient))
    queue = f"{name}.blocked"
    wait_for_consumer(inspector, queue)
    inspector.publish(queue, b"30")
    wait_for_file(tmp_path / "started")
    child.send_signal(signal.SIGTERM)
    assert child.wait(timeout=10) == exit_codes.UNFINISHED
    wait_until(lambda: inspector.count(queue) == 1)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_lets_running_messages_finish_and_gives_back_the_rest(
    start: Start, inspector: Inspector, name: str, tmp_path: Path, number: signal.Signals
) -> None:
    done = inspector.queue(f"{name}-done", name, (f"{name}.done",))
    child = start("work:Slow", "-t", "1")
    wait_for_consumer(inspector, name)
    for seconds in (b"1", b"2", b"3"):
        inspector.publish(name, seconds, properties=properties_of(delivery_mode=2))
    wait_for_file(tmp_path / "started")
    child.send_signal(number)
    assert child.wait(15) == exit_codes.SUCCESS
    assert inspector.get(done).payload == {"slept": 1}
    assert sorted(m.payload for m in inspector.messages(name, 2)) == [2, 3]
    assert inspector.all(f"{name}.dead") == []
    assert int((tmp_path / "frozen").read_text()) > 10_000  # what garbage collections leave out


@pytest.mark.hazard("G3")
def test_a_message_that_does_not_finish_in_time_is_redelivered(
    start: Start, inspector: Inspector, name: str, tmp_path: Path
) -> None:
    child = start("work:Slow", "--shutdown-timeout", "0.3")
    wait_for_consumer(inspector, name)
    inspector.publish(name, b"30")
    wait_for_file(tmp_path / "started")
    child.send_signal(signal.SIGINT)
    assert child.wait(15) == exit_codes.UNFINISHED
    assert inspector.get(name).redelivered


@pytest.mark.hazard("G3")
def test_a_second_signal_stops_at_once(
    start: Start, inspector: Inspector, name: str, tmp_path: Path
) -> None:
    child = start("work:Slow")
    wait_for_consumer(inspector, name)
    inspector.publish(name, b"30")
    wait_for_file(tmp_path / "started")
    child.send_signal(signal.SIGTERM)
    time.sleep(BURST + 0.2)
    child.send_signal(signal.SIGTERM)
    assert child.wait(5) == exit_codes.KILLED
    assert inspector.get(name).redelivered


def test_a_killed_worker_loses_nothing_and_the_follow_on_keeps_its_id(
    start: Start, inspector: Inspector, name: str, tmp_path: Path
) -> None:
    done = inspector.queue(f"{name}-done", name, (f"{name}.done",))
    child = start("work:Slow")
    wait_for_consumer(inspector, name)
    inspector.publish(name, b"0.5", properties=properties_of(message_id="m-1", delivery_mode=2))
    wait_for_file(tmp_path / "started")
    child.kill()
    child.wait(5)
    start("work")
    first = inspector.get(done, 20)
    inspector.publish(name, b"0.5", properties=properties_of(message_id="m-1", delivery_mode=2))
    assert inspector.get(done, 20).id == first.id


@pytest.mark.hazard("G3")
@pytest.mark.parametrize("consumer", ["Slow", "SlowTask"])
def test_sigterm_under_load_settles_running_messages_and_gives_back_the_rest_unfailed(
    start: Start, inspector: Inspector, name: str, tmp_path: Path, consumer: str
) -> None:
    done = inspector.queue(f"{name}-done", name, (f"{name}.done",))
    child = start(f"work:{consumer}", "-t", "4", "--concurrency", "4")
    queue = name if consumer == "Slow" else f"{name}.task"
    wait_for_consumer(inspector, queue)
    for n in range(10):
        properties = properties_of(message_id=f"m-{n}", delivery_mode=2)
        inspector.publish(queue, b"0.5", properties=properties)
    wait_for_file(tmp_path / "started")
    begin = time.monotonic()
    child.send_signal(signal.SIGTERM)
    assert child.wait(15) == exit_codes.SUCCESS
    assert time.monotonic() - begin < 3
    finished = inspector.all(done)
    left = inspector.all(queue)
    assert 1 <= len(finished) <= 4  # those that ran when the signal came
    assert len(finished) + len(left) == 10  # each is one of the two: done and acked, or not begun
    assert inspector.all(f"{queue}.dead") == []


@pytest.mark.hazard("G1")
def test_a_worker_killed_between_publish_and_ack_repeats_the_follow_on_with_its_id(
    start: Start, inspector: Inspector, name: str, tmp_path: Path
) -> None:
    done = inspector.queue(f"{name}-done", name, (f"{name}.done",))
    child = start("work:Lingering")
    wait_for_consumer(inspector, f"{name}.lingering")
    inspector.publish(f"{name}.lingering", b"1", properties=properties_of(message_id="m-1"))
    first = inspector.get(done)  # confirmed; the message is not acked yet
    child.kill()
    child.wait(5)
    (tmp_path / "hurry").touch()
    child = start("work:Lingering")
    assert inspector.get(done, 20).id == first.id
    child.send_signal(signal.SIGTERM)
    assert child.wait(15) == exit_codes.SUCCESS
    assert inspector.all(f"{name}.lingering") == []


def test_a_module_runs_all_its_consumers_or_only_those_of_selected_queues(
    start: Start, inspector: Inspector, name: str
) -> None:
    start("work", "-Q", f"{name}.other", "--prefetch", "7")
    wait_for_consumer(inspector, f"{name}.other")
    start("work")
    wait_for_consumer(inspector, name)


@pytest.mark.slow
def test_queues_in_one_option_are_emptied_one_after_the_other(
    start: Start, inspector: Inspector, name: str, tmp_path: Path
) -> None:
    first, last = f"{name}.first", f"{name}.last"
    (tmp_path / "ordered.py").write_text(
        f"""
from outbox.consumers import consumer

def note(event):
    with open("begun", "a") as file:
        file.write(event.queue + "\\n")

last = consumer("{last}", exchange="{name}")(note)
first = consumer("{first}", exchange="{name}")(note)
"""
    )
    for queue in (last, first):
        inspector.clean_up(queue=queue)
        inspector.clean_up(queue=f"{queue}.dead")
    child = start("ordered")  # makes the queues
    for queue in (last, first):
        wait_for_consumer(inspector, queue)
    child.send_signal(signal.SIGTERM)
    assert child.wait(15) == exit_codes.SUCCESS
    for queue in (last, first):
        for _ in range(30):
            inspector.publish(queue, b"1", properties=properties_of(delivery_mode=2))
    start("ordered", "-Q", f"{first},{last}")
    begun = tmp_path / "begun"
    deadline = time.monotonic() + 20
    while not begun.exists() or len(begun.read_text().split()) < 60:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    assert begun.read_text().split() == [first] * 30 + [last] * 30


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["no_such_module"], "there is no module 'no_such_module'"),
        (["work:Nobody"], "work:Nobody is not a consumer"),
        (["work", "-Q", "nowhere"], "no consumer has the queue 'nowhere'"),
        (["work", "-Q", "nowhere,elsewhere"], "no consumer has the queue 'nowhere'"),
        (["work", "--url", "amqp://u:hunter2/@h"], "cannot be parsed"),
        (["work", "-t", "0"], "threads is 0"),
        (["work", "--prefetch", "0"], "prefetch is 0"),
        (["json"], "the module 'json' has no consumer"),
    ],
)
def test_wrong_usage_is_reported_in_one_line(
    start: Start, arguments: list[str], expected: str
) -> None:
    child = start(*arguments)
    _, errors = child.communicate(timeout=20)
    assert child.returncode == exit_codes.USAGE
    assert expected in errors
    assert "Traceback" not in errors
    assert "hunter2" not in errors


def test_the_help_shows_real_commands(start: Start) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "outbox.consumers", "--help"],
        capture_output=True,
        text=True,
        timeout=20,
        check=True,
    )
    for text in ("outbox-consume shop.consumers", "-Q invoices", "exit codes", "second signal"):
        assert text in done.stdout
