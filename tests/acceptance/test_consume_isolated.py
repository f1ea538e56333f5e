"""``outbox-consume --isolate process``: handlers that hang or crash, and what becomes of them."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.consumers import exit_codes
from outbox.subscription import Delivery, dead_letter_queue
from tests.consuming import Command
from tests.places import Place, reading
from tests.waiting import wait_until

MODULE = """
import ctypes, logging, os, time
from outbox import enqueue_event, publish
from outbox.consumers import Consumer, RetryPolicy


def note(*words):
    with open("done", "a", buffering=1) as file:
        file.write(" ".join(map(str, words)) + "\\n")


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
        elif do == "raise":
            raise Unportable(1, 2)
        elif do == "follow":
            enqueue_event({{"n": event.attempt}}, "{name}-next")
            publish()
        elif do == "nap":
            time.sleep(0.8)
        logging.getLogger("mine").info("inside")
        note("done", event.id, os.getpid())

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


def test_a_handler_that_hangs_is_killed_and_retried_and_then_dead(
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
    for pid in began:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    with reading(place, f"{name}-all", again=True) as reader:
        assert sorted(one.target for one in reader.get(2)) == [f"{name}-dead", f"{name}-next"]


def test_a_handler_that_takes_its_process_down_takes_nothing_else(
    command: Command, place: Place, name: str
) -> None:
    command.start("--isolate", "process", "-t", "2")
    [crashes, *others] = command.publish("crash", *["follow"] * 10)
    letter = dead_letter(place, name)
    assert letter.message_id == crashes
    reason = (letter.headers or {})["outbox-dead-reason"]
    assert reason == (
        f"ProcessDied: the process that ran it has ended with signal {signal.SIGABRT}"
    )
    wait_until(lambda: {one for one, _ in command.did()} == set(others))
    assert command.process.pid not in {pid for _, pid in command.did()}
    assert command.stop() == exit_codes.SUCCESS


def test_an_exception_that_cannot_travel_is_told_all_the_same(
    command: Command, place: Place, name: str
) -> None:
    command.start("--isolate", "process", "-t", "1")
    [raises] = command.publish("raise")
    letter = dead_letter(place, name)
    headers = letter.headers or {}
    assert (letter.message_id, headers["outbox-dead-error"]) == (raises, "Unportable")
    assert headers["outbox-attempt"] == 2
    assert "in process" in headers["outbox-dead-traceback"]


def test_a_stop_lets_handlers_finish_and_leaves_no_process(
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
    for _, pid in command.did("began"):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_that_is_killed_takes_its_processes_along(command: Command) -> None:
    command.start("--isolate", "process", "-t", "1")
    command.publish("nap")
    wait_until(lambda: command.did("began"))
    [(_, pid)] = command.did("began")
    command.process.kill()
    command.process.wait()

    def is_gone() -> bool:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return True
        return False

    begin = time.monotonic()
    wait_until(is_gone)
    assert time.monotonic() - begin < 5
