"""``outbox-consume`` and signals: bursts, whole groups, and the children of handlers."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox import exit_codes
from outbox.messages.delivery import dead_letter_queue
from outbox.system.signals import BURST
from tests.consuming import Command
from tests.places import SQLitePlace

MODULE = """
import os, subprocess, time
from outbox.consumers import Reject, Retry, consumer


def note(*words):
    with open("done", "a", buffering=1) as file:
        file.write(" ".join(map(str, words)) + "\\n")


@consumer("{name}")
def work(event):
    command, _, argument = event.payload["do"].partition(" ")
    note("began", event.id, os.getpid())
    if command == "sleep":
        time.sleep(float(argument))
    elif command == "program":
        subprocess.run(["sleep", argument], check=True)
    elif command == "reject":
        time.sleep(float(argument))
        raise Reject("as asked")
    note("done", event.id, os.getpid())
"""

ALONE: list[str] = []
SUPERVISED = ["-p", "1"]
ISOLATED = ["--isolate", "process"]


@pytest.fixture
def command(tmp_path: Path, name: str) -> Iterator[Command]:
    command = Command(tmp_path, SQLitePlace(str(tmp_path / "outbox.db"), name), name)
    command.write(MODULE.format(name=name))
    yield command
    command.close()


def signal_all(command: Command, number: int) -> None:
    """Signal every process of the command, whatever its group, as a service manager does."""
    for process in Path("/proc").iterdir():
        try:
            if process.name.isdigit() and (process / "cwd").resolve() == command.folder:
                os.kill(int(process.name), number)
        except OSError:
            continue


@pytest.mark.parametrize("arguments", [ALONE, SUPERVISED])
@pytest.mark.parametrize(
    "numbers",
    [
        (signal.SIGINT, signal.SIGINT),  # by the terminal, and by a runner that passes it on
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGTERM, signal.SIGHUP),  # systemd with SendSIGHUP=
        (signal.SIGTERM, signal.SIGTERM, signal.SIGTERM),
    ],
)
def test_signals_in_a_burst_count_as_one(
    command: Command, arguments: list[str], numbers: tuple[signal.Signals, ...]
) -> None:
    command.start(*arguments)
    command.publish("sleep 1")
    command.wait_done(1, "began")
    for number in numbers:
        command.process.send_signal(number)
        time.sleep(0.05)
    assert command.process.wait(20) == exit_codes.SUCCESS
    assert len(command.did()) == 1


@pytest.mark.parametrize("arguments", [ALONE, SUPERVISED])
def test_a_signal_after_a_burst_stops_at_once(command: Command, arguments: list[str]) -> None:
    command.start(*arguments)
    command.publish("sleep 30")
    command.wait_done(1, "began")
    command.process.send_signal(signal.SIGINT)
    command.process.send_signal(signal.SIGTERM)
    time.sleep(BURST + 0.2)
    assert command.stop(signal.SIGINT, 5) == exit_codes.KILLED


@pytest.mark.parametrize("arguments", [ALONE, SUPERVISED, ISOLATED])
def test_a_message_whose_program_is_ended_by_the_stop_is_redelivered(
    command: Command, arguments: list[str]
) -> None:
    command.start(*arguments)
    command.publish("program 30")
    command.wait_done(1, "began")
    time.sleep(0.3)  # for the program
    signal_all(command, signal.SIGTERM)
    assert command.process.wait(20) == exit_codes.SUCCESS
    assert not command.did()
    assert command.left() == 1
    assert command.place.count(dead_letter_queue(command.queue)) == 0


def test_a_rejected_message_is_dead_lettered_while_the_worker_stops(command: Command) -> None:
    command.start()
    command.publish("reject 1")
    command.wait_done(1, "began")
    assert command.stop() == exit_codes.SUCCESS
    assert command.left() == 0
    assert command.place.count(dead_letter_queue(command.queue)) == 1
