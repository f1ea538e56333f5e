"""``--id`` and ``outbox workers`` as their users run them: start, take over, show, stop."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from outbox import Event, Publisher, exit_codes
from outbox.ids import new_id
from outbox.service.identity.listing import Listed, listed
from proving.bounds import take_over
from tests.commands import Done, outbox_command
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

ROOT = Path(__file__).parents[2]

_MODULE = """
    import os, time
    from outbox.consumers import consumer

    @consumer("work")
    def work(event):
        with open("notes", "a", buffering=1) as notes:
            notes.write(f"began {{os.getpid()}} {version}\\n")
            while event.payload["waits"] and not os.path.exists("go"):
                time.sleep(0.05)
            notes.write(f"ended {{os.getpid()}} {version}\\n")
"""


class Machine:
    """A folder with an application, its broker in a file, and the folder of its services."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.pids = folder / "pids"
        self.url = f"sqlite:///{folder / 'outbox.db'}"
        self._foreground: list[subprocess.Popen[str]] = []
        self.write("work")

    def write(self, module: str, text: str = _MODULE, version: str = "1") -> None:
        (self.folder / f"{module}.py").write_text(textwrap.dedent(text).format(version=version))

    def options(self) -> dict[str, object]:
        return {
            "cwd": self.folder,
            "env": {
                **os.environ,
                "OUTBOX_URL": self.url,
                "OUTBOX_PID_DIR": str(self.pids),
                "PWD": str(self.folder),
                "PYTHONPATH": os.pathsep.join((str(ROOT), ".")),
                "PYTHONDONTWRITEBYTECODE": "1",
            },
            "stdin": subprocess.DEVNULL,
            "text": True,
        }

    def run(self, *arguments: str, cwd: Path | None = None, wrapped_in: Sequence[str] = ()) -> Done:
        options = {**self.options(), **({} if cwd is None else {"cwd": cwd})}
        return subprocess.run(  # type: ignore[no-any-return,call-overload]
            [*wrapped_in, *outbox_command("workers", *arguments)],
            capture_output=True,
            timeout=60,
            check=False,
            **options,
        )

    def foreground(self, *arguments: str, wrapped_in: Sequence[str] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(  # type: ignore[call-overload]
            [*wrapped_in, sys.executable, "-m", "outbox.consumers", *arguments],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            **self.options(),
        )
        self._foreground.append(process)
        return process  # type: ignore[no-any-return]

    def owner(self, id: str = "1") -> Listed | None:
        for one in listed(self.pids, id):
            if one.is_owner and one.is_alive and one.status is not None and one.status.ready:
                return one
        return None

    def wait_for_owner(self, pid: int | None = None, id: str = "1") -> int:
        def is_there() -> bool:
            owner = self.owner(id)
            return owner is not None and pid in (None, owner.holder)

        wait_until(is_there, 30)
        owner = self.owner(id)
        assert owner is not None
        assert owner.holder
        return owner.holder

    def publish(self, *, waits: bool = False) -> None:
        """Publish a message, which ends at once, or when there is a file ``go``."""
        body = json.dumps({"waits": waits}).encode()
        event = Event(id=new_id(), target="work", exchange="", body=body, unroutable="fail")
        with Publisher(self.url) as publisher:
            publisher.publish([event]).raise_for_failure()

    def notes(self) -> list[list[str]]:
        with contextlib.suppress(FileNotFoundError):
            return [line.split() for line in (self.folder / "notes").read_text().splitlines()]
        return []

    def close(self) -> None:
        for one in listed(self.pids):
            if one.holder:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.holder, signal.SIGKILL)
        for process in self._foreground:
            process.kill()
            process.communicate(timeout=10)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    machine = Machine(tmp_path)
    yield machine
    machine.close()


@pytest.mark.slow
def test_take_overs_under_load_lose_repeat_and_interrupt_nothing(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'outbox.db'}"
    outcome = take_over.run(
        url, tmp_path, rounds=5, kills=True, workers=True, processes=2, long=3.0
    )
    assert outcome.kept, f"{outcome}\n{(tmp_path / 'log').read_text()}"
    assert outcome.sent > 10
    assert set(outcome.rounds.values()) == {1}
    assert len(outcome.killed) == 1


def assert_cheap(machine: Machine) -> None:
    """The status needs neither much CPU time nor asyncio, a driver or the application."""
    program = (
        "import sys; from outbox.commands.cli import main; code = main(['workers', 'status']);"
        "print(sorted({'asyncio', 'pika', 'aio_pika', 'sqlalchemy', 'work'} & set(sys.modules)),"
        "code)"
    )
    used: list[float] = []
    while not used or min(used) >= 0.3:  # a busy machine takes more CPU time for the same work
        assert len(used) < 5, used
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(  # type: ignore[call-overload]
            [sys.executable, "-c", program], capture_output=True, timeout=20, **machine.options()
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.stdout.splitlines()[-1] == "[] 0", done.stderr
        used.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def test_a_service_is_started_shown_replaced_and_stopped(machine: Machine) -> None:
    nothing = machine.run("status")
    assert (nothing.returncode, nothing.stdout) == (3, f"no service in {machine.pids}\n")

    started = machine.run("start", "--id", "1", "--", "outbox-consume", "work", "-p", "2")
    assert started.returncode == 0, started.stderr
    first = machine.wait_for_owner()
    assert started.stdout == f"1: started (process {first})\n"
    assert (machine.pids / "outbox-1.pid").read_text() == f"{first}\n"
    assert os.getsid(first) == first  # it survives its terminal

    machine.publish(waits=True)
    wait_until(lambda: machine.notes(), 20)
    restarted = machine.run("restart")
    assert restarted.returncode == 0, restarted.stderr
    second = machine.wait_for_owner()
    assert second != first

    wait_until(lambda: ": leaving (" in machine.run("status").stdout, 10)
    shown = machine.run("status", "--id", "1", "--id", "2")
    assert shown.returncode == 3
    assert f"1: running (process {second}), 2 of 2 ready" in shown.stdout
    assert f"1: leaving (process {first})" in shown.stdout
    assert shown.stdout.endswith("2: not running (none)\n")
    assert "-p 2" in shown.stdout
    assert_cheap(machine)
    (machine.folder / "go").touch()
    wait_until(lambda: [note[0] for note in machine.notes()] == ["began", "ended"], 20)
    wait_until(lambda: len(listed(machine.pids)) == 1, 20)

    machine.publish()
    wait_until(lambda: len(machine.notes()) == 4, 20)
    assert machine.run("dump").stdout.startswith("1: asked to write its stacks")
    log = machine.pids / "outbox-1.log"
    wait_until(lambda: "Thread 0x" in log.read_text(), 20)
    assert machine.run("quiet").stdout.startswith("1: asked to begin nothing more")
    wait_until(lambda: "1: quiet (" in machine.run("status").stdout, 20)
    stopped = machine.run("stop")
    assert (stopped.returncode, stopped.stdout) == (0, f"1: stopped (process {second})\n")
    assert sorted(path.name for path in machine.pids.iterdir()) == ["outbox-1.log"]
    assert machine.run("stop").returncode == 0


@pytest.mark.slow
def test_stop_reaches_those_that_leave_as_well(machine: Machine) -> None:
    command = ("work", "--id", "1", "--shutdown-timeout", "60")
    first = machine.foreground(*command)
    machine.wait_for_owner(first.pid)
    machine.publish(waits=True)
    wait_until(lambda: machine.notes(), 20)
    second = machine.foreground(*command)
    machine.wait_for_owner(second.pid)
    wait_until(lambda: ": leaving (" in machine.run("status").stdout, 10)
    stopped = machine.run("stop", "--timeout", "5")
    assert stopped.returncode == exit_codes.UNFINISHED
    assert stopped.stdout == f"1: stopped (process {second.pid})\n"
    assert stopped.stderr == f"1: still stopping (process {first.pid})\n"
    assert second.wait(10) == exit_codes.SUCCESS
    stopped = machine.run("stop", "--now")
    assert (stopped.returncode, stopped.stdout) == (0, f"1: stopped (process {first.pid})\n")
    assert first.wait(10) == exit_codes.KILLED


@pytest.mark.slow
def test_handing_over_has_a_bound_if_it_is_given_one(machine: Machine) -> None:
    command = ("work", "--id", "1", "--shutdown-timeout", "0.2", "--handover-timeout", "0.5")
    first = machine.foreground(*command)
    machine.wait_for_owner(first.pid)
    machine.publish(waits=True)
    wait_until(lambda: machine.notes(), 20)
    second = machine.foreground(*command)
    machine.wait_for_owner(second.pid)
    first.wait(20)


@pytest.mark.slow
def test_a_failed_start_shows_the_end_of_the_log_and_its_code(machine: Machine) -> None:
    machine.write("broken", "1 / 0\n")
    started = machine.run(
        "start", "--id", "1", "--start-timeout", "1.5", "--", "outbox-consume", "broken"
    )
    assert started.returncode == exit_codes.NOT_READY, started.stderr
    assert "not ready within 2 s; stopping: " in started.stderr  # the end of its log
    assert "its command ended with 6" in started.stderr
    assert listed(machine.pids) == []

    started = machine.run("start", "--id", "1", "--", "outbox-consume", "missing")
    assert started.returncode == exit_codes.USAGE
    assert "missing" in started.stderr

    started = machine.run(
        "start", "--id", "1", "--", "outbox-consume", "work", "--url", "amqp://me:secret@host/"
    )
    assert started.returncode == exit_codes.USAGE
    assert "give the URL in OUTBOX_URL" in started.stderr
    assert "secret" not in started.stderr


@pytest.mark.slow
def test_restart_and_reload_run_the_code_that_a_link_leads_to_now(machine: Machine) -> None:
    folder = machine.folder
    notes = folder / "notes"
    text = textwrap.dedent(_MODULE).replace('"notes"', repr(str(notes)))
    current = machine.folder = folder / "current"

    def deploy(version: str) -> None:
        release = folder / "releases" / version
        release.mkdir(parents=True)
        (release / "work.py").write_text(text.format(version=version))
        if current.exists():
            shutil.rmtree(current.resolve())
            current.unlink()
        current.symlink_to(release)

    def versions(count: int) -> set[str]:
        machine.publish()
        wait_until(lambda: notes.exists() and notes.read_text().count("ended") >= count, 20)
        return {line.split()[2] for line in notes.read_text().splitlines()}

    deploy("1")
    started = machine.run("start", "--id", "1", "--", "outbox-consume", "work")
    assert started.returncode == 0, started.stderr
    deploy("2")
    restarted = machine.run("restart", cwd=Path("/"))
    assert restarted.returncode == 0, restarted.stderr
    wait_until(lambda: len(listed(machine.pids)) == 1, 20)  # the old one has left
    assert versions(1) == {"2"}
    deploy("3")
    os.kill(int((machine.pids / "outbox-1.pid").read_text()), signal.SIGHUP)
    log = machine.pids / "outbox-1.log"
    wait_until(lambda: log.read_text().count("replaced by another process") == 2, 20)
    assert versions(2) == {"2", "3"}


@pytest.mark.slow
def test_a_parent_that_hangs_is_killed_if_that_is_asked_for(machine: Machine) -> None:
    started = machine.run("start", "--id", "1", "--", "outbox-consume", "work")
    assert started.returncode == 0, started.stderr
    parent = machine.wait_for_owner()
    workers = [worker.pid for worker in listed(machine.pids)[0].status.workers]  # type: ignore[union-attr]
    assert len(workers) == 1
    os.kill(parent, signal.SIGSTOP)
    stopped = machine.run("stop", "--id", "1", "--kill")
    assert stopped.returncode == exit_codes.USAGE
    assert "--kill needs --timeout" in stopped.stderr
    stopped = machine.run("stop", "--id", "1", "--timeout", "0.5")
    assert stopped.returncode == exit_codes.UNFINISHED
    stopped = machine.run("stop", "--id", "1", "--timeout", "0.5", "--kill")
    assert stopped.returncode == 0, stopped.stderr
    assert stopped.stdout == f"1: killed (process {parent})\n"
    wait_until(lambda: all(has_ended(one) for one in (parent, *workers)), 20)


def has_ended(process: int) -> bool:
    try:
        return ") Z " in Path(f"/proc/{process}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True


@pytest.mark.slow
def test_options_that_contradict_each_other_are_refused(machine: Machine) -> None:
    for options, text in (
        (["--id", "1", "--reload"], "--reload is for development"),
        (["--take-over"], "--take-over needs --id"),
        (["--id", "a/b"], "'a/b' is not an id"),
    ):
        process = machine.foreground("work", *options)
        assert process.wait(20) == exit_codes.USAGE
        assert text in process.communicate()[1]
    machine.pids.mkdir(mode=0o755)
    machine.pids.chmod(0o777)
    process = machine.foreground("work", "--id", "1")
    assert process.wait(20) == exit_codes.USAGE
    assert "may be written to by other users" in process.communicate()[1]
    assert machine.run("status").returncode == exit_codes.USAGE


@pytest.mark.slow
def test_a_successor_that_fails_leaves_the_other_alone(machine: Machine) -> None:
    first = machine.foreground("work", "--id", "1")
    machine.wait_for_owner(first.pid)

    machine.write("slow", "import time\ntime.sleep(60)\n")
    second = machine.foreground("work", "slow", "--id", "1", "--start-timeout", "1")
    assert second.wait(30) == exit_codes.NOT_READY
    assert "not ready within 1 s; stopping: the other process goes on" in second.communicate()[1]

    second = machine.foreground("work", "--id", "1")
    first.send_signal(signal.SIGSTOP)  # its workers go on; it doesn't see what happens
    machine.wait_for_owner(second.pid)
    second.kill()  # after its take-over, and before the other one has left
    second.wait()
    first.send_signal(signal.SIGCONT)

    assert machine.wait_for_owner(first.pid) == first.pid
    machine.publish()
    wait_until(lambda: len(machine.notes()) == 2, 20)
    assert first.poll() is None


@pytest.mark.slow
def test_another_application_does_not_take_over_by_mistake(machine: Machine) -> None:
    first = machine.foreground("work", "--id", "1")
    machine.wait_for_owner(first.pid)
    machine.write("other")
    second = machine.foreground("other", "--id", "1")
    assert second.wait(20) == exit_codes.USAGE
    [error] = second.communicate()[1].splitlines()
    assert f"belongs to another application: process {first.pid} runs" in error
    assert "work --id 1" in error
    assert "other --id 1" in error
    assert "--take-over" in error

    # Outside of the unit, systemd would lose sight of it.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("INVOCATION_ID", "0123")
        second = machine.foreground("work", "--id", "1")
    assert second.wait(20) == exit_codes.USAGE
    assert "hand new code over with systemctl reload" in second.communicate()[1]

    command = ["--", "outbox-consume", "other", "--take-over"]
    started = machine.run("start", "--id", "1", *command)
    assert started.returncode == 0, started.stderr
    assert first.wait(20) == exit_codes.SUCCESS


@pytest.mark.hazard("G10")
@pytest.mark.slow
def test_neither_a_cleaned_folder_nor_a_killed_parent_gets_in_the_way(machine: Machine) -> None:
    first = machine.foreground("work", "--id", "1")
    machine.wait_for_owner(first.pid)
    for path in machine.pids.iterdir():
        path.unlink()
    machine.wait_for_owner(first.pid)
    (machine.pids / "outbox-1.pid").unlink()
    (machine.pids / "outbox-1.pid").write_text("1\n")  # by a stranger, without a lock
    machine.wait_for_owner(first.pid)
    assert (machine.pids / "outbox-1.pid").read_text() == f"{first.pid}\n"

    first.kill()
    first.wait()
    status = machine.run("status")
    assert (status.returncode, status.stdout) == (
        1,
        f"1: NOT running (process {first.pid} has died)\n",
    )
    assert machine.run("stop").stdout == "nothing to stop\n"
    restarted = machine.run("restart", "--id", "1")  # its command is still known
    assert restarted.returncode == 0, restarted.stderr
    assert machine.run("status").returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="makes PID namespaces")
@pytest.mark.slow
def test_what_is_held_in_another_container_is_left_alone(machine: Machine) -> None:
    apart = ("unshare", "--pid", "--fork", "--kill-child")
    machine.foreground("work", "--id", "1", wrapped_in=apart)
    machine.wait_for_owner()
    second = machine.foreground("work", "--id", "1", wrapped_in=apart)
    assert second.wait(20) == exit_codes.USAGE
    assert "the id '1' is held in another container; take it over" in second.communicate()[1]
    status = machine.run("status", wrapped_in=apart)
    assert (status.returncode, status.stdout) == (4, "1: held in another container\n")
    stopped = machine.run("stop", wrapped_in=apart)
    assert stopped.returncode == exit_codes.USAGE
    assert "1 is held in another container, where it has to be done" in stopped.stderr
    # From outside of the namespaces it is seen under another number than the file's.
    assert (machine.pids / "outbox-1.pid").read_text() == "2\n"
    assert machine.run("stop").returncode == 0
