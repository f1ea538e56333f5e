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
import logging, os, sys, time
from outbox.service.health import cpu, judge
from outbox.service.health.policy import CPULimit, Policy, RestartBound
from outbox.service.supervisor import Supervisor
from outbox.service.worker_process import WorkerProcess
from outbox.system import backoff
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
        text += f" mends {{state.mends}} reloads {{state.reloads}}"
        if text != self.shown:
            self.shown = text
            logging.info(text)
    def close(self):
        logging.info("face closed")
cpu.INTERVAL = judge.LONGEST_STEP = 0.5
faces = [Face()] if {with_face} else []
{setup}
sys.exit(
    Supervisor(
        command, {processes}, shutdown_timeout=0.2, margin=0.2, load_limit=2, faces=faces,
        policy={policy},
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
        policy: str,
        setup: str,
    ):
        self.folder = folder
        (folder / "worker.py").write_text(WORKER + worker)
        self._log = folder / "log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    DRIVER.format(
                        command=command,
                        processes=processes,
                        with_face=with_face,
                        policy=policy,
                        setup=setup,
                    ),
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
        policy: str = "None",
        setup: str = "",
    ) -> Driven:
        started.append(Driven(tmp_path, worker, command, processes, with_face, policy, setup))
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
counts = {"outbox_events_collected_total": [[[], 2]]}
parent.report_each_second(lambda seconds: {"counts": counts, "in_flight": 1})
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
    assert "state leaving False [] {'outbox_events_collected_total': [[[], 4" in driven.log()
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


REPORTER = """
def report(seconds):
    return {"in_flight": 0, "pulses": pulses}
pulses = {}
parent.say(LOADED)
parent.say(READY)
parent.report_each_second(report)
first = not os.path.exists("first")
open("first", "w").close()
"""


@pytest.mark.slow
def test_a_worker_whose_interpreter_is_held_by_c_code_is_killed_with_its_stacks(
    drive: Callable[..., Driven],
) -> None:
    driven = drive(
        REPORTER
        + """
import re
def in_c_code():
    re.match("(a+)+b", "a" * 34)
if first:
    in_c_code()
time.sleep(60)
""",
        policy="Policy(stuck_after=1.5)",
        with_face=True,
    )
    driven.wait_for("is stuck: none of its threads has run for 2 s; killing it")
    driven.wait_for("state starting False [('stuck', 0)]")
    driven.wait_for("was killed by SIGKILL")
    driven.wait_for("state ready True")
    driven.wait_for(" started", 2)
    [stacks] = re.findall(
        r"stacks of worker 1 \(process \d+\):\n(.*?)\nworker 1", driven.log(), re.S
    )
    assert "in in_c_code" in stacks
    assert driven.stop() == exit_codes.SUCCESS


@pytest.mark.slow
def test_a_worker_whose_part_is_silent_is_killed_unless_it_answers_in_time(
    drive: Callable[..., Driven],
) -> None:
    driven = drive(
        REPORTER
        + """
time.sleep(1.5)
if first:
    pulses.update(loop=9.5)
    time.sleep(1.2)
    pulses.update(loop=0.0)
    time.sleep(3)
    pulses.update(loop=40.0)
time.sleep(60)
""",
        policy="Policy(stuck_after=9)",
    )
    driven.wait_for("is stuck: its event loop has been blocked for 1")
    driven.wait_for(" goes on")
    assert "was killed" not in driven.log()
    driven.wait_for("is stuck: its event loop has been blocked for 4")
    driven.wait_for(" started", 2)
    driven.stop()


@pytest.mark.slow
def test_after_a_stop_of_the_parent_or_of_all_nothing_is_taken_to_be_stuck(
    drive: Callable[..., Driven],
) -> None:
    driven = drive(
        REPORTER + "print('up', file=sys.stderr, flush=True)\ntime.sleep(60)\n",
        processes=2,
        policy="Policy(stuck_after=2.5)",
        with_face=True,
    )
    driven.wait_for("up", 2)
    workers = [int(pid) for pid in re.findall(r"\(process (\d+)\) started", driven.log())]
    for stopped in ([driven.process.pid], [driven.process.pid, *workers]):
        time.sleep(0.5)
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        time.sleep(3)
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
    time.sleep(1.5)
    assert "stuck" not in driven.log()
    os.kill(workers[0], signal.SIGSTOP)
    driven.wait_for(f"(process {workers[0]}) is stuck: none of its threads has run for 3 s")
    driven.wait_for(" started", 3)
    driven.stop()


@pytest.mark.slow
def test_a_stopped_parent_does_not_stop_its_worker_and_hears_of_its_end(
    drive: Callable[..., Driven],
) -> None:
    driven = drive(
        REPORTER.replace('"in_flight": 0', '"in_flight": 0, "text": "x" * 60_000')
        + """
while True:
    time.sleep(0.1)
    open("turns", "a").write(".")
    if os.path.exists("go"):
        sys.exit(1)
"""
    )
    driven.wait_for(" started")
    time.sleep(1)
    os.kill(driven.process.pid, signal.SIGSTOP)
    time.sleep(3)  # reports beyond the 64 KiB of the pipe
    turns = (driven.folder / "turns").stat().st_size
    time.sleep(1)
    assert (driven.folder / "turns").stat().st_size > turns
    (driven.folder / "go").touch()
    os.kill(driven.process.pid, signal.SIGCONT)
    driven.wait_for("ended with exit code 1")
    driven.stop()


def test_a_service_that_never_works_is_given_up(drive: Callable[..., Driven]) -> None:
    driven = drive(
        "sys.exit(1)",
        processes=2,
        with_face=True,
        policy="Policy(bound=RestartBound(2, 0.0))",
    )
    assert driven.process.wait(20) == exit_codes.FLAPPING
    assert "giving up: worker 1 has never been ready" in driven.log()
    assert driven.log().count(" started") == 2
    assert "(the last one ended with exit code 1)" in driven.log()


def test_a_service_that_was_given_up_is_tried_again_in_the_background(
    drive: Callable[..., Driven],
) -> None:
    driven = drive(
        'open("tries", "a").write(".")\n'
        'if os.path.getsize("tries") < 5:\n'
        "    sys.exit(1)\n" + REPORTER + "time.sleep(60)\n",
        with_face=True,
        policy="Policy(bound=RestartBound(2, 0.0), retries=3, retry_every=0.3)",
    )
    driven.wait_for("state given up False")
    driven.wait_for("the service is not given up any more")
    driven.wait_for("state ready True")
    assert driven.log().count(" started") == 5
    driven.stop()


def test_places_that_never_work_are_given_up_and_tried_again_together(
    drive: Callable[..., Driven],
) -> None:
    driven = drive(
        """
if os.path.exists("broken"):
    sys.exit(1)
parent.say(LOADED)
parent.say(READY)
while not os.path.exists("die"):
    time.sleep(0.01)
sys.exit(1)
""",
        processes=2,
        policy="Policy(bound=RestartBound(2, 0.0), retries=2, retry_every=1.4)",
        setup="backoff._FIRST_DELAY = 0.05",
    )
    driven.wait_for(" started", 2)
    (driven.folder / "broken").touch()
    driven.process.send_signal(signal.SIGHUP)
    driven.wait_for("the other workers are not replaced")
    (driven.folder / "die").touch()
    driven.wait_for("trying again in 1 s")
    time.sleep(1.1)
    began = driven.log().rpartition("trying again")[2].count(" started")
    assert (driven.log().count("trying again"), began) == (1, 0)
    driven.wait_for("trying again in 1 s", 2)
    driven.stop()


def test_a_service_that_was_ready_is_never_given_up_and_its_deaths_have_a_line_each_minute(
    drive: Callable[..., Driven],
) -> None:
    driven = drive(
        "first = not os.path.exists('first')\nopen('first', 'w').close()\n"
        "if first:\n    parent.say(READY)\nsys.exit(1)\n",
        policy="Policy(bound=RestartBound(2, 0.0))",
        setup="backoff._FIRST_DELAY = 0.05",
    )
    driven.wait_for(" started", 6)
    assert "giving up" not in driven.log()
    assert driven.log().count("; starting another in") == 3
    assert "(3 in a row); starting another in" in driven.log()
    driven.process.send_signal(signal.SIGHUP)  # other code
    driven.wait_for("as 2 others since the last such line; starting another in")
    # It may be giving up just now, or be past its signal handlers.
    assert driven.stop() in (exit_codes.SUCCESS, exit_codes.FLAPPING, -signal.SIGTERM)


def test_what_a_process_has_counted_until_its_end_is_kept(drive: Callable[..., Driven]) -> None:
    driven = drive(
        """
parent.say(READY)
for number in range(1, 11):
    parent._writer.report({"counts": {"outbox_events_collected_total": [[[], number]]}})
    time.sleep(0.03)
os._exit(4 if not os.path.exists("first") and not open("first", "w").close() else 0)
""",
        with_face=True,
        setup="""
listen = WorkerProcess.listen
def listen_slowly(worker, grace):
    listen(worker, grace)
    time.sleep(0.5)
WorkerProcess.listen = listen_slowly
""",
    )
    driven.wait_for("] {")
    assert "[[[], 10.0]]" in driven.log()
    driven.stop()


QUIET = """
from outbox.system.signals import Stop
stop = Stop()
parent.stop_with_parent(stop, 5)
parent.say(LOADED)
parent.say(READY)
while not stop.quiet:
    time.sleep(0.01)
print("is quiet", file=sys.stderr, flush=True)
parent.say(LEAVING)
while not stop.leaving:
    time.sleep(0.01)
sys.exit(4)
"""


def test_a_quiet_service_begins_nothing_stays_and_can_still_leave(
    drive: Callable[..., Driven],
) -> None:
    driven = drive(QUIET, with_face=True)
    driven.wait_for("state ready True")
    driven.process.send_signal(signal.SIGTSTP)
    driven.wait_for("state quiet False [('leaving', None)]")
    driven.wait_for("is quiet")
    driven.process.send_signal(signal.SIGHUP)
    driven.wait_for("received SIGHUP, but a quiet service starts no process")
    driven.wait_for("reloads 1")  # systemd waits for it
    time.sleep(0.5)
    assert driven.process.poll() is None
    (driven.folder / "leave").write_text("30")
    assert driven.process.wait(10) == exit_codes.SUCCESS
    assert driven.log().count(" started") == 1


def test_a_dump_has_the_stacks_of_all_workers(drive: Callable[..., Driven]) -> None:
    driven = drive(
        REPORTER
        + """
from outbox.system.signals import Stop
parent.stop_with_parent(Stop(), 5, lambda: print("tasks", file=sys.stderr, flush=True))
def waiting():
    print("waiting", file=sys.stderr, flush=True)
    time.sleep(60)
waiting()
""",
        processes=2,
    )
    driven.wait_for("waiting", 2)
    driven.process.send_signal(signal.SIGUSR1)
    driven.wait_for("stacks of worker", 2)
    assert driven.log().count("in waiting") == 2
    driven.wait_for("tasks", 2)
    driven.stop()


@pytest.mark.slow
def test_many_dumps_do_not_harm_a_busy_worker(drive: Callable[..., Driven]) -> None:
    driven = drive(
        REPORTER
        + """
import threading
from outbox.system.signals import Stop
parent.stop_with_parent(Stop(), 5)
def deep(left):
    return left and deep(left - 1)
def run():
    while True:
        deep(300)
for _ in range(2):
    threading.Thread(target=run, daemon=True).start()
print("busy", file=sys.stderr, flush=True)
time.sleep(60)
""",
        with_face=True,
    )
    driven.wait_for("busy")
    for _ in range(100):
        driven.process.send_signal(signal.SIGUSR1)
        time.sleep(0.01)
    driven.wait_for("stacks of worker 1")
    time.sleep(2.5)
    assert "was killed" not in driven.log()
    assert driven.log().count("in deep") > 100
    driven.stop()


BURNER = """
import subprocess
from outbox.system.signals import Stop
stop = Stop()
parent.stop_with_parent(stop, 5)
parent.say(LOADED)
parent.say(READY)
parent.report_each_second(lambda seconds: {})
first = not os.path.exists("first")
open("first", "w").close()
burn = "import time\\nfor _ in range(200):\\n    time.sleep(0.001)\\n    sum(range(300_000))"
"""


@pytest.mark.parametrize("spins", [False, True])
def test_a_worker_above_its_cpu_limit_leaves_and_is_killed_if_it_spins(
    drive: Callable[..., Driven], spins: bool
) -> None:
    driven = drive(
        BURNER
        + f"""
while first and not (stop.leaving and not {spins}):
    if {spins}:
        sum(range(100_000))
    else:
        subprocess.run([sys.executable, "-c", burn])  # its children count too
parent.say(LEAVING)
sys.exit(4) if first else time.sleep(60)
""",
        policy=f"Policy(stuck_after={1.5 if spins else 60}, cpu=CPULimit(15, 2))",
        with_face=True,
    )
    driven.wait_for("has exceeded its CPU limit")
    driven.wait_for(" started", 2)
    driven.wait_for("state ready True", 2)
    killed = "still exceeds its CPU limit; killing it" in driven.log()
    assert killed == spins
    assert driven.log().count("has exceeded its CPU limit") == 1
    driven.stop()


def test_a_program_that_cannot_be_started_is_retried_slowly(
    drive: Callable[..., Driven],
) -> None:
    driven = drive("", command=["/nonexistent/python"], with_face=True)
    driven.wait_for("worker 1 cannot be started: [Errno 2]", 2)
    assert "mends False" not in driven.log()
    driven.wait_for("mends False")
    assert driven.log().count("; starting another in") == 3
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


@pytest.mark.slow
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
