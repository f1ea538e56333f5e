"""Workers that no longer react, as users of ``outbox-consume`` see them."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox import exit_codes
from tests.consuming import Command
from tests.places import SQLitePlace
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

DEADLOCK = """
import os, threading
from outbox.consumers import consumer
from work_notes import note
lock = threading.Lock()

@consumer("{name}", timeout=0.3)
def work(event):
    note("began", event.id, os.getpid())
    if event.payload["do"] == "deadlock":
        lock.acquire()
        wait_for_lock()

def wait_for_lock():
    with lock:
        pass
"""

BLOCKED_LOOP = """
import os, time
from outbox.consumers import consumer
from work_notes import note

@consumer("{name}")
async def work(event):
    note("began", event.id, os.getpid())
    if event.payload["do"] == "block" and not os.path.exists("blocked"):
        open("blocked", "w").close()
        block()
    note("done", event.id, os.getpid())

def block():
    time.sleep(600)
"""

WAITING = """
import asyncio, os
from outbox.consumers import consumer
from work_notes import note

@consumer("{name}")
async def work(event):
    note("began", event.id, os.getpid())
    await asyncio.sleep(600)
"""

NOTES = """
def note(*words):
    with open("done", "a", buffering=1) as file:
        file.write(" ".join(map(str, words)) + "\\n")
"""


@pytest.fixture
def command(tmp_path: Path, name: str) -> Iterator[Command]:
    command = Command(tmp_path, SQLitePlace(str(tmp_path / "outbox.db"), name), name)
    (tmp_path / "work_notes.py").write_text(NOTES)
    yield command
    command.close()


@pytest.mark.slow
def test_a_worker_whose_handlers_are_deadlocked_is_replaced(command: Command) -> None:
    command.write(DEADLOCK.format(name=command.queue))
    command.start("-p", "2", "-t", "2", "--stuck-after", "2s")
    workers = command.consuming(2)
    command.publish(*["deadlock"] * 8)
    found = command.wait_for(
        r"\(process (\d+)\) is stuck: as many handlers as it may run have exceeded their timeout, "
        r"and none has ended for \d s; killing it"
    )
    assert {int(pid) for pid in found} <= set(workers)
    command.wait_for("in wait_for_lock")
    assert len(command.consuming(3)) >= 3
    assert "handlers without a timeout" not in command.text()
    command.stop()


@pytest.mark.slow
def test_a_worker_whose_event_loop_is_blocked_is_replaced_and_the_others_go_on(
    command: Command,
) -> None:
    command.write(BLOCKED_LOOP.format(name=command.queue))
    command.start("-p", "2", "--prefetch", "1", "--stuck-after", "2s")
    command.consuming(2)
    [blocked] = command.publish("block")
    command.wait_done(1, "began")
    [(_, victim)] = command.did("began")
    others = command.publish(*["nothing"] * 5)
    command.wait_for(rf"\(process {victim}\) is stuck: its event loop has been blocked for \d s")
    command.wait_for(rf"stacks of worker \d \(process {victim}\):.*in block")
    command.wait_for(rf"\(process {victim}\) died while \d+ message\(s\) ran: .*{blocked}")
    wait_until(lambda: {pid for message, pid in command.did() if message in others} - {victim}, 20)
    command.consuming(3)
    assert not re.search(rf"\(process (?!{victim})\d+\) is stuck", command.text())
    command.stop()


@pytest.mark.slow
def test_sigusr1_logs_the_stacks_and_tasks_of_a_worker(command: Command) -> None:
    command.write(WAITING.format(name=command.queue))
    command.start("-p", "1", "--shutdown-timeout", "0.2")
    command.consuming(1)
    command.wait_for(rf"handlers without a timeout, .* taken to be stuck: '{command.queue}'")
    [message] = command.publish("block")
    command.wait_done(1, "began")
    command.process.send_signal(signal.SIGUSR1)
    command.wait_for(r"stacks of worker 1 \(process \d+\):")
    command.wait_for(rf"task\(s\) of the event loop:.*message '{message}' of .*work.py:\d+")
    assert command.stop() == exit_codes.UNFINISHED
