"""Supervising workers that misbehave, and workers that have lost their parent."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outbox import exit_codes
from outbox.system.child_process import ChildProcess, Parent
from tests.waiting import wait_until

DRIVER = """
import logging, sys
from outbox.consumers.command.supervisor import Supervisor
logging.basicConfig(level="INFO", format="%(message)s")
command = [sys.executable, "worker.py"] if {command!r} is None else {command!r}
sys.exit(Supervisor(command, {processes}, shutdown_timeout=0.2, margin=0.2, load_limit=2).run())
"""

WORKER = """
import os, signal, subprocess, sys, time
from outbox.consumers.command.supervised_worker import LOADED, READY, RETIRING, STOPPING
from outbox.system.child_process import Parent
parent = Parent.inherited()
"""


class Driven:
    """A supervisor in a separate process, whose log is a file."""

    def __init__(self, folder: Path, worker: str, command: list[str] | None, processes: int):
        self.folder = folder
        (folder / "worker.py").write_text(WORKER + worker)
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", DRIVER.format(command=command, processes=processes)],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stderr=log,
                start_new_session=True,
            )

    def wait_for(self, text: str, count: int = 1) -> None:
        wait_until(lambda: self.log().count(text) >= count, 20)

    def log(self) -> str:
        return self._log.read_text()

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(10)


@pytest.fixture
def drive(tmp_path: Path) -> Iterator[Callable[..., Driven]]:
    started: list[Driven] = []

    def start(worker: str, *, command: list[str] | None = None, processes: int = 1) -> Driven:
        started.append(Driven(tmp_path, worker, command, processes))
        return started[-1]

    yield start
    for one in started:
        if one.process.poll() is None:
            os.killpg(one.process.pid, signal.SIGKILL)
            one.process.wait(10)


@pytest.mark.hazard("G7")
def test_a_worker_that_does_not_exit_in_time_is_killed(
    drive: Callable[..., Driven],
) -> None:
    driven = drive("""
signal.signal(signal.SIGTERM, signal.SIG_IGN)
parent.report(READY)
print("here", file=sys.stderr, flush=True)
time.sleep(60)
""")
    driven.wait_for("here")
    assert driven.stop() == exit_codes.UNFINISHED
    assert "did not exit in time; killing it" in driven.log()
    assert "was killed by SIGKILL" in driven.log()


def test_a_worker_that_does_not_exit_when_recycled_is_killed_and_replaced(
    drive: Callable[..., Driven],
) -> None:
    driven = drive("""
parent.report(READY)
parent.report(STOPPING)
time.sleep(60)
""")
    driven.wait_for("did not exit in time; killing it")
    driven.wait_for(" started", 2)
    driven.stop()


def test_only_one_worker_of_a_slot_retires_at_a_time(drive: Callable[..., Driven]) -> None:
    driven = drive("""
parent.report(READY)
parent.report(RETIRING)
while not os.path.exists(f"go {os.getpid()}"):
    time.sleep(0.01)
parent.report(STOPPING)
sys.exit(4)
""")
    driven.wait_for("is retiring; starting another")
    driven.wait_for(" started", 2)
    time.sleep(1)
    assert driven.log().count(" started") == 2
    first, second = re.findall(r"\(process (\d+)\) started", driven.log())
    (driven.folder / f"go {first}").touch()
    driven.wait_for(" started", 3)
    assert driven.log().count(f"(process {second}) is retiring") == 1
    assert "did not exit in time" not in driven.log()
    driven.stop()


def test_a_program_that_cannot_be_started_is_retried_slowly(
    drive: Callable[..., Driven],
) -> None:
    driven = drive("", command=["/nonexistent/python"])
    driven.wait_for("worker 1 cannot be started: [Errno 2]", 2)
    assert driven.stop() == exit_codes.SUCCESS


VERSIONS = """
version = open("version").read().strip() if os.path.exists("version") else "one"
print("version", version, file=sys.stderr, flush=True)
if version == "hangs":
    time.sleep(60)
parent.report(LOADED)
if version == "waits":
    time.sleep(60)
if version == "wrong":
    sys.exit(2)
parent.report(READY)
print("consuming", version, file=sys.stderr, flush=True)
while not (version == "one" and os.path.exists("go")):
    time.sleep(0.01)
sys.exit(int(open("go").read()))
"""


def deploy(driven: Driven, version: str) -> None:
    (driven.folder / "version").write_text(version)
    driven.process.send_signal(signal.SIGHUP)


def test_a_successor_that_hangs_in_its_import_is_killed_and_the_workers_stay(
    drive: Callable[..., Driven],
) -> None:
    driven = drive(VERSIONS, processes=2)
    driven.wait_for("consuming one", 2)
    deploy(driven, "hangs")
    driven.wait_for("did not import the application within 2 s; killing it")
    driven.wait_for("was killed by SIGKILL")
    deploy(driven, "two")
    driven.wait_for("consuming two", 2)
    assert driven.log().count("version hangs") == 1
    driven.stop()


def test_a_successor_that_waits_for_the_broker_is_not_killed(
    drive: Callable[..., Driven],
) -> None:
    driven = drive(VERSIONS)
    driven.wait_for("consuming one")
    deploy(driven, "waits")
    driven.wait_for("version waits")
    time.sleep(3)
    assert "killed" not in driven.log()
    driven.stop()


@pytest.mark.parametrize("first", ["hangs", "waits"])
def test_another_sighup_replaces_with_the_code_of_its_time(
    drive: Callable[..., Driven], first: str
) -> None:
    driven = drive(VERSIONS, processes=2)
    driven.wait_for("consuming one", 2)
    deploy(driven, first)
    driven.wait_for(f"version {first}")
    deploy(driven, "two")
    driven.wait_for("consuming two", 2)
    assert "did not import" not in driven.log()
    driven.stop()


def test_wrong_usage_stops_all_only_before_a_worker_has_consumed(
    drive: Callable[..., Driven],
) -> None:
    driven = drive(VERSIONS, processes=2)
    driven.wait_for("consuming one", 2)
    (driven.folder / "version").write_text("wrong")
    (driven.folder / "go").write_text("2")
    driven.wait_for("ended with exit code 2 (wrong usage)", 4)
    (driven.folder / "version").write_text("three")
    driven.wait_for("consuming three", 2)
    assert "stopping" not in driven.log()
    driven.stop()


@pytest.mark.hazard("G7")
def test_a_crash_of_one_worker_does_not_touch_the_others(drive: Callable[..., Driven]) -> None:
    driven = drive(
        """
parent.report(READY)
print("up", file=sys.stderr, flush=True)
try:
    os.mkdir("taken")
except FileExistsError:
    time.sleep(60)
while not os.path.exists("go"):
    time.sleep(0.01)
os.rmdir("taken")
os.kill(os.getpid(), signal.SIGSEGV)
""",
        processes=3,
    )
    driven.wait_for("up", 3)
    (driven.folder / "go").touch()
    driven.wait_for("was killed by SIGSEGV")
    driven.wait_for("up", 4)
    assert len(set(re.findall(r"worker (\d) \(process \d+\) was killed", driven.log()))) == 1
    driven.stop()


def test_a_workers_subprocess_is_not_taken_for_a_worker_and_inherits_no_pipe(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lifeline, held = os.pipe()
    status_reader, status = os.pipe()
    for descriptor in (lifeline, status):
        os.set_inheritable(descriptor, True)
    monkeypatch.setenv("_OUTBOX_PARENT", f"{lifeline}:{status}")
    assert Parent.inherited() is not None
    assert Parent.inherited() is None
    assert not os.get_inheritable(lifeline)
    assert not os.get_inheritable(status)
    for descriptor in (lifeline, held, status_reader, status):
        os.close(descriptor)


def test_a_worker_that_cannot_stop_still_exits_when_its_parent_is_gone() -> None:
    program = """
import os, sys, time
from outbox.consumers.command.supervised_worker import stop_with
from outbox.system.child_process import Parent
from outbox.system.signals import Stop
stop = Stop()
stop_with(Parent.inherited(), stop, 0.3)
time.sleep(60)
"""
    status_reader, status = os.pipe()
    child = ChildProcess([sys.executable, "-c", program], status)
    os.close(status_reader)
    child.close()
    assert child.wait(15) == exit_codes.KILLED
