"""``outbox-consume --isolate process``: handlers that hang or crash."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from outbox import Event, exit_codes
from outbox.consumers import ACK
from outbox.consumers.isolation import process_pool
from outbox.messages.delivery import Delivery, as_delivered, dead_letter_queue
from tests.consuming import Command
from tests.places import Place, reading
from tests.waiting import wait_until

MODULE = """
import ctypes, logging, os, subprocess, sys, threading, time
from outbox import enqueue_event, publish
from outbox.consumers import Consumer, RetryPolicy


def note(*words):
    with open("done", "a", buffering=1) as file:
        file.write(" ".join(map(str, words)) + "\\n")


if "outbox.consumers.isolation.process_main" in sys.orig_argv and os.path.exists("broken"):
    raise RuntimeError("half deployed")


leaked = []


class Unportable(Exception):
    def __init__(self, one, two):
        super().__init__(lambda: one)


class Work(Consumer):
    queue = "{name}"
    timeout = 1
    retry = RetryPolicy(max_attempts=2, delay=0, on=(Unportable, TimeoutError))

    def process(self, event):
        do = event.payload["do"]
        note("began", event.id, os.getpid())
        if do == "hang":
            ctypes.CDLL(None).sleep(30)
        elif do == "crash":
            os.abort()
        elif do == "program":
            program = subprocess.Popen(["sleep", "30"])
            note("began", event.id, program.pid)
            program.wait()
        elif do == "leave a process and crash":
            if os.fork() == 0:
                time.sleep(30)
                os._exit(0)
            os.abort()
        elif do == "leak":
            leaked.append(b"x" * (250 << 20))
        elif do == "leave a thread":
            threading.Thread(target=time.sleep, args=(30,)).start()
        elif do == "raise":
            raise Unportable(1, 2)
        elif do == "follow":
            enqueue_event({{"n": event.attempt}}, "{name}-next")
            publish()
        elif do == "nap":
            time.sleep(0.8)
        logging.getLogger("mine").info("inside")
        note("done", event.id, os.getpid())

    def on_timeout(self, event):
        logging.getLogger("mine").info("too slow")

    def on_dead(self, event, reason):
        note("dead", event.id, os.getpid())
        enqueue_event({{}}, "{name}-dead")
"""


@pytest.fixture
def command(place: Place, name: str, tmp_path: Path) -> Iterator[Command]:
    with reading(place, f"{name}-all", [f"{name}-next", f"{name}-dead"]):
        pass
    made = Command(tmp_path, place, name)
    made.write(MODULE.format(name=name))
    yield made
    made.close()


def dead_letter(place: Place, queue: str) -> Delivery:
    with reading(place, dead_letter_queue(queue), again=True) as reader:
        return reader.get()[0]


@pytest.mark.slow
def test_a_handler_that_hangs_is_killed_and_retried_and_then_dead_lettered(
    command: Command, place: Place, name: str
) -> None:
    command.start("--isolate", "process", "-t", "1")
    [hangs, follows] = command.publish("hang", "follow")
    letter = dead_letter(place, name)
    assert letter.message_id == hangs
    assert (letter.headers or {})["outbox-dead-error"] == "ProcessTimeout"
    assert (letter.headers or {})["outbox-attempt"] == 2
    wait_until(lambda: [one for one, _ in command.did()] == [follows])
    began = [pid for one, pid in command.did("began") if one == hangs]
    assert len(set(began)) == 2
    assert not any(map(is_running, began))
    with reading(place, f"{name}-all", again=True) as reader:
        assert sorted(one.target for one in reader.get(2)) == [f"{name}-dead", f"{name}-next"]


def test_a_handler_that_crashes_its_process_affects_nothing_else(
    command: Command, place: Place, name: str
) -> None:
    command.start("--isolate", "process", "-t", "2")
    [crashes, *others] = command.publish("crash", *["follow"] * 10)
    letter = dead_letter(place, name)
    assert letter.message_id == crashes
    reason = (letter.headers or {})["outbox-dead-reason"]
    assert reason == f"ProcessDied: its subprocess ended with signal {signal.SIGABRT}"
    assert "  File " not in (letter.headers or {})["outbox-dead-traceback"]  # all are the engine's
    wait_until(lambda: {one for one, _ in command.did()} == set(others))
    assert command.process.pid not in {pid for _, pid in command.did()}
    assert command.stop() == exit_codes.SUCCESS


def test_an_exception_that_cannot_be_pickled_is_still_reported(
    command: Command, place: Place, name: str
) -> None:
    command.start("--isolate", "process", "-t", "1")
    [raises] = command.publish("raise")
    letter = dead_letter(place, name)
    headers = letter.headers or {}
    assert (letter.message_id, headers["outbox-dead-error"]) == (raises, "Unportable")
    assert headers["outbox-attempt"] == 2
    assert "in process" in headers["outbox-dead-traceback"]


@pytest.mark.slow
def test_a_stop_lets_handlers_finish_and_leaves_no_process_behind(
    command: Command, place: Place, name: str
) -> None:
    command.start("--isolate", "process", "-t", "2")
    [first] = command.publish("follow")
    wait_until(lambda: command.did())
    naps = command.publish("nap", "nap")
    wait_until(lambda: len(command.did("began")) == 3)
    assert command.stop() == exit_codes.SUCCESS
    assert {one for one, _ in command.did()} == {first, *naps}
    assert place.count(name) == place.count(dead_letter_queue(name)) == 0
    assert not any(is_running(pid) for _, pid in command.did("began"))


def test_the_processes_of_a_killed_worker_end_with_it(command: Command) -> None:
    command.start("--isolate", "process", "-t", "1")
    command.publish("nap")
    wait_until(lambda: command.did("began"))
    [(_, pid)] = command.did("began")
    command.process.kill()
    command.process.wait()
    begin = time.monotonic()
    wait_until(lambda: not is_running(pid))
    assert time.monotonic() - begin < 5


@pytest.mark.slow
def test_a_program_started_by_a_handler_ends_with_the_handler(
    command: Command, place: Place, name: str
) -> None:
    command.start("--isolate", "process", "-t", "1")
    command.publish("program")
    dead_letter(place, name)
    pids = [pid for _, pid in command.did("began")]
    assert len(pids) == 4  # two attempts, and their programs
    wait_until(lambda: not any(map(is_running, pids)))


def test_a_crash_is_noticed_even_if_a_process_forked_by_the_handler_lives_on(
    command: Command, place: Place, name: str
) -> None:
    command.write(MODULE.format(name=name).replace("timeout = 1\n", "timeout = None\n"))
    command.start("--isolate", "process", "-t", "1")
    command.publish("leave a process and crash")
    reason = (dead_letter(place, name).headers or {})["outbox-dead-reason"]
    assert reason.startswith("ProcessDied: ")


def test_messages_wait_while_the_application_cannot_be_imported(
    command: Command, place: Place, name: str, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    command.start("--isolate", "process", "-t", "1")
    ids = command.publish("follow", "follow")
    command.wait_for("half deployed", 2)
    assert place.count(dead_letter_queue(name)) == 0
    broken.unlink()
    wait_until(lambda: sorted(one for one, _ in command.did()) == sorted(ids))


@pytest.mark.slow
def test_a_callbacks_log_line_about_a_killed_handler_has_the_message_id(
    command: Command, place: Place, name: str
) -> None:
    command.start("--isolate", "process", "-t", "1")
    [hangs] = command.publish("hang")
    dead_letter(place, name)
    lines = [json.loads(line) for line in command.text().splitlines() if "too slow" in line]
    assert [line.get("message_id") for line in lines] == [hangs, hangs]


@pytest.mark.hazard("G7")
@pytest.mark.slow
def test_a_process_that_leaks_is_replaced_with_its_worker(command: Command, name: str) -> None:
    command.write(MODULE.format(name=name).replace("timeout = 1\n", "timeout = None\n"))
    command.start("--isolate", "process", "-t", "1", "--max-memory", "200M")
    [leaks] = command.publish("leak")
    command.wait_for(r"memory limit exceeded \([0-9]+ MiB\)")
    [follows] = command.publish("follow")
    wait_until(lambda: [one for one, _ in command.did()] == [leaks, follows])
    assert len({pid for _, pid in command.did()}) == 2


@pytest.mark.slow
def test_processes_that_do_not_end_are_waited_for_at_the_same_time(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "leaving.py").write_text(MODULE.format(name=name))
    monkeypatch.setattr(process_pool, "_FINISH", 1.0)
    orders = process_pool.Orders(["leaving"], f"sqlite:///{tmp_path}/outbox.db", "INFO", "text")
    isolated = process_pool.ProcessPool(orders)
    event = Event(id="7", target=name, exchange="", body=b'{"do": "leave a thread"}')
    delivery = as_delivered(event, name, 1, redelivered=False)

    def leave_a_thread() -> None:
        assert isolated.attempt(delivery, None) == ACK

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(leave_a_thread) for _ in range(3)]:
            future.result()
        begin = time.monotonic()
        isolated.end()
    assert time.monotonic() - begin < 2


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        # A zombie that is never reaped, for want of an init, no longer runs.
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (ProcessLookupError, FileNotFoundError):
        return False
