"""Messages that kill the worker process they run in, among many that don't."""

from __future__ import annotations

import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox import exit_codes
from outbox.messages.delivery import dead_letter_queue
from tests.consuming import Command
from tests.places import Place, SQLitePlace, reading
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

GOOD = 60

MODULE = """
import asyncio, ctypes, os, signal, time
from outbox.consumers import RetryPolicy, consumer


def note(*words):
    with open("done", "a", buffering=1) as file:
        file.write(" ".join(map(str, words)) + "\\n")


def act(do, attempt=1):
    match do:
        case "exit":
            os._exit(1)
        case "exit as if all was well":
            os._exit(0)
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(5)
        case "crash":
            ctypes.string_at(0)
        case "exit at the second attempt":
            if attempt == 1:
                raise ValueError("the first attempt")
            os._exit(1)


@consumer("{name}", retry=RetryPolicy(max_attempts=3, delay=0.1), **OPTIONS)
PROCESS
"""
PLAIN = """
def work(event):
    note("began", event.id, os.getpid())
    if event.payload["do"] == "exit late":
        time.sleep(0.5)
        os._exit(1)
    act(event.payload["do"], event.attempt)
    time.sleep(0.03)
    note("done", event.id, os.getpid())
"""
ASYNC = """
async def work(event):
    note("began", event.id, os.getpid())
    if event.payload["do"] == "exit late":
        await asyncio.sleep(0.5)
        os._exit(1)
    act(event.payload["do"], event.attempt)
    await asyncio.sleep(0.03)
    note("done", event.id, os.getpid())
"""


def module(name: str, process: str, options: str = "{}") -> str:
    text = MODULE.replace("{name}", name).replace("OPTIONS", options)
    return text.replace("PROCESS", process.strip())


@pytest.fixture
def command(tmp_path: Path, place: Place, name: str) -> Iterator[Command]:
    found = Command(tmp_path, place, name)
    yield found
    found.close()


@pytest.fixture
def on_a_file(tmp_path: Path, name: str) -> Iterator[Command]:
    found = Command(tmp_path, SQLitePlace(str(tmp_path / "outbox.db"), name), name)
    yield found
    found.close()


def dead_letters(command: Command, count: int) -> dict[str, str]:
    """Wait for ``count`` dead letters; return their reasons by the ids of their messages."""
    queue = dead_letter_queue(command.queue)
    wait_until(lambda: command.place.count(queue) >= count, 40)
    with reading(command.place, queue, again=True) as reader:
        letters = reader.get(count)
    return {
        letter.message_id or "": (letter.headers or {})["outbox-dead-reason"] for letter in letters
    }


@pytest.mark.hazard("G2", "G7")
@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("poisons", "process"),
    [
        pytest.param(["exit"], PLAIN, id="one"),
        pytest.param(["kill", "crash"], PLAIN, id="two"),
        pytest.param(["exit late", "exit at the second attempt"], PLAIN, id="late"),
        pytest.param(["exit as if all was well", "exit late"], ASYNC, id="async"),
    ],
)
@pytest.mark.slow
def test_a_message_that_kills_its_process_is_dead_lettered_and_costs_the_others_one_attempt(
    command: Command, poisons: list[str], process: str
) -> None:
    command.write(module(command.queue, process))
    command.start("-p", "2", "-t", "4")
    # The first is sent alone until the queue exists; the poison comes after a few good ones.
    sent = command.publish(*["good"] * 5, *poisons, *["good"] * (GOOD - 5))
    deadly = dict(zip(sent[5 : 5 + len(poisons)], poisons, strict=True))
    good = {each for each in sent if each not in deadly}
    wait_until(lambda: {each for each, _ in command.did()} >= good, 60)
    reasons = dead_letters(command, len(poisons))
    assert reasons.keys() == deadly.keys()
    assert all(why.startswith("lost with its process 3 times") for why in reasons.values())
    assert command.stop() == exit_codes.SUCCESS, command.text()
    begun = Counter(each for each, _ in command.did("began"))
    assert max(begun[each] for each in good) <= 2
    for each, poison in deadly.items():
        most = 3 + (poison == "exit at the second attempt")
        # Another one may kill the process between its begin and its first line.
        assert most - len(poisons) + 1 <= begun[each] <= most
    assert command.left() == 0
    assert all(repr(each) in command.text() for each in deadly)


@pytest.mark.slow
def test_a_poison_with_the_inbox_is_dead_lettered_too(on_a_file: Command) -> None:
    on_a_file.write(module(on_a_file.queue, PLAIN, '{"deduplicate": True}'))
    on_a_file.start("-p", "2", "-t", "2")
    poison, *good = on_a_file.publish("kill", *["good"] * 10)
    wait_until(lambda: {each for each, _ in on_a_file.did()} == set(good), 30)
    [(found, reason)] = dead_letters(on_a_file, 1).items()
    assert (found, reason) == (
        poison,
        "lost with its process 3 times (the last one ended with signal 9)",
    )
    assert len(on_a_file.did()) == len(good)  # none twice
    assert on_a_file.stop() == exit_codes.SUCCESS, on_a_file.text()


@pytest.mark.slow
def test_what_a_killed_process_held_of_a_file_is_delivered_at_once_and_has_lost_nothing(
    on_a_file: Command,
) -> None:
    on_a_file.start("-p", "1", "-t", "1")
    on_a_file.consuming(1)
    first, *others = on_a_file.publish("sleep 2", "nothing", "nothing")
    on_a_file.wait_done(1, "began")
    [(_, victim)] = on_a_file.did("began")
    killed = time.monotonic()
    os.kill(victim, signal.SIGKILL)
    on_a_file.wait_done(2, "began")
    assert time.monotonic() - killed < 15  # well before the leases end
    place = on_a_file.place
    assert isinstance(place, SQLitePlace)
    [(losses,)] = place.execute(
        "SELECT deliveries - 1 - attempts FROM outbox_events WHERE id = ?", first
    )
    assert losses == 1
    on_a_file.wait_done(3)
    assert sorted(each for each, _ in on_a_file.did()) == sorted([first, *others])
