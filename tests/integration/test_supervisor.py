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
import logging, os, sys
from outbox.service.supervisor import Supervisor
logging.basicConfig(level="INFO", format="%(message)s")
command = [sys.executable, "worker.py"] if {command!r} is None else {command!r}
class Face:
    # Leaves when a file says so, and logs each change of the state.
    shown = None
    def turn(self, service):
        if os.path.exists("leave"):
            service.leave(float(open("leave").read()))
        state = service.state
        workers = [(one.phase, one.report and one.report.get("in_flight")) for one in state.workers]
        text = f"state {{state.phase}} {{state.ready}} {{workers}} {{state.base}} {{state.reasons}}"
        if text != self.shown:
            self.shown = text
            logging.info(text)
    def close(self):
        logging.info("face closed")
faces = [Face()] if {with_face} else []
sys.exit(
    Supervisor(
        command, {processes}, shutdown_timeout=0.2, margin=0.2, load_limit=2, faces=faces
    ).run()
)
"""

WORKER = """
import os, signal, subprocess, sys, time
from outbox.service.supervised import LEAVING, LOADED, READY, STOPPING, Supervised
from outbox.system.child_process import Parent
import logging
parent = Supervised(Parent.inherited(), logging.getLogger())
"""


class Driven:
    """A supervisor in a separate process, whose log is a file."""

    def __init__(
        self,
        folder: Path,
        worker: str,
        command: list[str] | None,
        processes: int,
        with_face: bool,
    ):
        self.folder = folder
        (folder / "worker.py").write_text(WORKER + worker)
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    DRIVER.format(command=command, processes=processes, with_face=with_face),
                ],
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

    def start(
        worker: str,
        *,
        command: list[str] | None = None,
        processes: int = 1,
        with_face: bool = False,
    ) -> Driven:
        started.append(Driven(tmp_path, worker, command, processes, with_face))
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
parent.say(READY)
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
parent.say(READY)
parent.say(STOPPING)
time.sleep(60)
""")
    driven.wait_for("did not exit in time; killing it")
    driven.wait_for(" started", 2)
    driven.stop()


def test_only_one_worker_of_a_slot_leaves_at_a_time(drive: Callable[..., Driven]) -> None:
    driven = drive("""
parent.say(READY)
parent.say(LEAVING)
while not os.path.exists(f"go {os.getpid()}"):
    time.sleep(0.01)
parent.say(STOPPING)
sys.exit(4)
""")
    driven.wait_for("is leaving; starting another")
    driven.wait_for(" started", 2)
    time.sleep(1)
    assert driven.log().count(" started") == 2
    first, second = re.findall(r"\(process (\d+)\) started", driven.log())
    (driven.folder / f"go {first}").touch()
    driven.wait_for(" started", 3)
    assert driven.log().count(f"(process {second}) is leaving") == 1
    assert "did not exit in time" not in driven.log()
    driven.stop()


LEAVER = """
from outbox.system.signals import Stop
stop = Stop()
parent.stop_with_parent(stop, 5)
parent.say(LOADED)
parent.say(READY)
parent.report(counts={"messages": 2}, in_flight=1)
while not stop.leaving:
    time.sleep(0.01)
parent.say(LEAVING)
print("leaves", file=sys.stderr, flush=True)
for _ in range(100):
    time.sleep(0.1)
    if os.path.exists("go"):
        break
parent.say(STOPPING)
sys.exit(4)
"""


def test_a_service_that_leaves_waits_for_what_runs_and_starts_nothing(
    drive: Callable[..., Driven],
) -> None:
    driven = drive(LEAVER, processes=2, with_face=True)
    driven.wait_for("state ready True [('ready', 1), ('ready', 1)] None ()")
    (driven.folder / "leave").write_text("30")
    driven.wait_for("state leaving False [('leaving', 1), ('leaving', 1)] None ('leaving',)")
    driven.wait_for("leaves", 2)
    time.sleep(1)  # beyond the shutdown timeout and its margin
    assert driven.process.poll() is None
    (driven.folder / "go").touch()
    assert driven.process.wait(10) == exit_codes.SUCCESS
    assert driven.log().count(" started") == 2
    assert "killing it" not in driven.log()
    assert "state leaving False [] {'messages': 4}" in driven.log()
    assert driven.log().rstrip().endswith("face closed")


@pytest.mark.parametrize("by_signal", [False, True])
def test_a_stop_ends_what_a_leaving_service_waits_for(
    drive: Callable[..., Driven], by_signal: bool
) -> None:
    driven = drive(LEAVER, with_face=True)
    driven.wait_for("state ready True")
    (driven.folder / "leave").write_text("60" if by_signal else "0.3")
    driven.wait_for("leaves")
    if by_signal:
        driven.process.send_signal(signal.SIGTERM)
        driven.wait_for("received SIGTERM; stopping")
    else:
        driven.wait_for("what runs has not ended in time; stopping")
    driven.wait_for("state stopping False")
    assert driven.process.wait(5) == exit_codes.UNFINISHED


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
parent.say(LOADED)
if version == "waits":
    time.sleep(60)
if version == "wrong":
    sys.exit(2)
parent.say(READY)
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
parent.say(READY)
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
import logging, time
from outbox.service.supervised import Supervised
from outbox.system.child_process import Parent
from outbox.system.signals import Stop
stop = Stop()
Supervised(Parent.inherited(), logging.getLogger()).stop_with_parent(stop, 0.3)
time.sleep(60)
"""
    status_reader, status = os.pipe()
    child = ChildProcess([sys.executable, "-c", program], status)
    os.close(status_reader)
    child.close()
    assert child.wait(15) == exit_codes.KILLED
