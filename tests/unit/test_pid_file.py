"""The pid file of a service: who has the id, by a lock that outlives no process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox import UsageError
from outbox.service.identity.folder import default_folder, open_folder
from outbox.service.identity.pid_file import ELSEWHERE, check_id, holder_of, pid_path
from outbox.system.disk.private_folder import file_system
from tests.waiting import wait_until

_PROGRAM = """
import os, sys, time
from pathlib import Path
from outbox.service.identity.pid_file import PidFile, holder_of
file = PidFile(Path(sys.argv[1]), "1")
print(os.getpid(), flush=True)
for line in sys.stdin:
    word = line.strip()
    if word == "fork":
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        print(child, flush=True)
    elif word == "holder":
        print(holder_of(file.path), flush=True)
    else:
        print(getattr(file, word)(), flush=True)
"""


class Process:
    """Another process with a pid file for the id 1."""

    def __init__(self, folder: Path, *wrapped_in: str) -> None:
        self.process = subprocess.Popen(
            [*wrapped_in, sys.executable, "-c", _PROGRAM, str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = int(self._answer())

    def _answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def ask(self, word: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()
        return self._answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)

    def close(self) -> None:
        self.kill()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()


class Processes:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = pid_path(folder, "1")
        self._started: list[Process] = []

    def start(self, *wrapped_in: str) -> Process:
        self._started.append(Process(self.folder, *wrapped_in))
        return self._started[-1]

    def close(self) -> None:
        for process in self._started:
            process.close()


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    processes = Processes(tmp_path / "pids")
    yield processes
    processes.close()


def test_the_file_holds_a_number_alone_and_its_lock_names_the_holder(processes: Processes) -> None:
    first = processes.start()
    assert first.ask("standing") == "absent"
    assert holder_of(processes.path) is None
    first.ask("take")
    assert processes.path.read_text() == f"{first.pid}\n"
    assert holder_of(processes.path) == first.pid
    assert first.ask("standing") == "own"
    assert holder_of(processes.path) == first.pid  # it asked without losing the lock
    assert processes.folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.hazard("G10")
def test_who_takes_last_stays_and_the_other_sees_it(processes: Processes) -> None:
    first, second, third = (processes.start() for _ in range(3))
    first.ask("take")
    for successor in (second, third):
        assert successor.ask("standing") == "held"
    second.ask("take")
    third.ask("take")
    assert [one.ask("standing") for one in (first, second, third)] == ["held", "held", "own"]
    # The files of those that leave stay, locked, so that they can be found.
    for one in (first, second, third):
        assert holder_of(processes.folder / f"outbox-1.pid.{one.pid}") == one.pid
    second.ask("close")
    first.ask("close")
    assert third.ask("standing") == "own"
    assert processes.path.read_text() == f"{third.pid}\n"
    third.ask("close")
    assert os.listdir(processes.folder) == []


@pytest.mark.hazard("G10")
def test_a_dead_holder_leaves_a_stale_file_even_if_it_had_forked(processes: Processes) -> None:
    first, second = processes.start(), processes.start()
    first.ask("take")
    child = int(first.ask("fork"))
    try:
        first.kill()
        assert holder_of(processes.path) is None
        assert second.ask("standing") == "stale"
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.hazard("G10")
def test_a_file_with_the_number_of_a_stranger_is_stale(processes: Processes) -> None:
    processes.folder.mkdir(mode=0o700)
    processes.path.write_text(f"{os.getpid()}\n")
    process = processes.start()
    assert process.ask("standing") == "stale"
    process.ask("take")
    assert process.ask("standing") == "own"


def test_a_successor_that_dies_after_its_take_over_leaves_the_id_to_the_first(
    processes: Processes,
) -> None:
    first, second = processes.start(), processes.start()
    first.ask("take")
    second.ask("take")
    second.kill()
    assert first.ask("standing") == "stale"
    first.ask("take")
    assert first.ask("standing") == "own"
    assert holder_of(processes.path) == first.pid


@pytest.mark.parametrize("gone", ["the pid file", "all files", "the folder"])
def test_a_file_that_was_removed_is_absent_and_can_be_written_again(
    processes: Processes, gone: str
) -> None:
    process = processes.start()
    process.ask("take")
    if gone == "the pid file":
        processes.path.unlink()
    elif gone == "all files":
        for path in processes.folder.iterdir():
            path.unlink()
    else:
        shutil.rmtree(processes.folder)
    assert process.ask("standing") == "absent"
    process.ask("take")
    assert process.ask("standing") == "own"
    assert holder_of(processes.path) == process.pid
    process.ask("close")
    assert os.listdir(processes.folder) == []


@pytest.mark.one_python
@pytest.mark.skipif(os.geteuid() != 0, reason="makes PID namespaces")
def test_processes_in_other_containers_are_seen_and_not_confused(processes: Processes) -> None:
    apart = ("unshare", "--pid", "--fork", "--kill-child")
    first, second = processes.start(*apart), processes.start(*apart)
    assert first.pid == second.pid == 1
    first.ask("take")
    assert int(second.ask("holder")) == ELSEWHERE
    assert holder_of(processes.path) not in (None, ELSEWHERE, 1)  # seen from the namespace above
    assert second.ask("standing") == "held"
    second.ask("take")
    assert first.ask("standing") == "held"
    assert second.ask("standing") == "own"
    second.kill()
    wait_until(lambda: first.ask("standing") == "stale")


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "pids"
    open_folder(folder)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert open_folder(folder) == folder
    folder.chmod(0o770)
    with pytest.raises(UsageError, match="may be written to by other users; choose another"):
        open_folder(folder)
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(UsageError, match="is a symbolic link"):
        open_folder(link)
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is not a folder"):
        open_folder(tmp_path / "file")
    with pytest.raises(UsageError, match="cannot use the folder"):
        open_folder(tmp_path / "file" / "below")
    if os.geteuid() == 0:
        folder.chmod(0o700)
        os.chown(folder, 12345, 12345)
        with pytest.raises(UsageError, match=r"belongs to another user \(uid 12345\)"):
            open_folder(folder)


def test_the_kind_of_file_system_is_found_by_its_device(tmp_path: Path) -> None:
    mounts = tmp_path / "mountinfo"
    mounts.write_text(
        "22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n"
        "40 22 0:52 / /srv/shared rw - nfs4 server:/x rw,vers=4.2\n"
    )
    assert file_system(os.makedev(0, 52), str(mounts)) == "nfs4"
    assert file_system(os.makedev(254, 0), str(mounts)) == "ext4"
    assert file_system(os.makedev(9, 9), str(mounts)) == ""
    assert file_system(0, str(tmp_path / "nothing")) == ""


def test_a_folder_on_a_network_file_system_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("outbox.system.disk.private_folder.file_system", lambda device: "nfs4")
    with pytest.raises(UsageError, match=r"network file system \(nfs4\)"):
        open_folder(tmp_path)


def test_the_folder_is_that_of_the_environment_or_of_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OUTBOX_PID_DIR", raising=False)
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert default_folder() == tmp_path / f"outbox-{os.geteuid()}"
    monkeypatch.setenv("RUNTIME_DIRECTORY", "/run/mail:/run/other")
    assert default_folder() == Path("/run/mail")
    monkeypatch.setenv("OUTBOX_PID_DIR", "/srv/pids")
    assert default_folder() == Path("/srv/pids")


@pytest.mark.parametrize("text", ["", "a/b", "..\n", "a b", "x" * 65, "é"])
def test_what_can_be_no_id_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not an id"):
        check_id(text)
    assert check_id("mail-2.b_c") == "mail-2.b_c"
