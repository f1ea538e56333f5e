"""The private broker: alone on its machine, alive again after a kill, gone without a trace."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.testing import broker as module
from outbox.testing import servers
from outbox.testing.broker import BrokerMissing, PrivateBroker
from tests.amqp import Inspector

pytestmark = pytest.mark.one_python

linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's /proc")
needs_setpriv = pytest.mark.skipif(shutil.which("setpriv") is None, reason="there is no setpriv")


@pytest.fixture
def parent(tmp_path: Path) -> Iterator[Path]:
    """An empty folder in the root folder of the server, for nodes' folders."""
    root = servers.rabbitmq_root()
    if tmp_path.is_relative_to(root):
        yield tmp_path
        return
    with tempfile.TemporaryDirectory(dir=root / "tmp") as folder:
        yield Path(folder)


def _folder(directory: Path) -> Path:
    [found] = directory.glob("outbox-rabbitmq-*")
    return found


def _processes_of(folder: Path) -> dict[int, str]:
    """Return the living processes whose home the folder is, and what they run."""
    wanted = f"HOME=/{folder.relative_to(servers.rabbitmq_root())}".encode()
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (process / "environ").read_bytes().split(b"\0"):
                command = (process / "cmdline").read_bytes().split(b"\0")[0].decode()
                found[int(process.name)] = Path(command).name
    return found


def _listeners_of(processes: dict[int, str]) -> list[str]:
    """Return the local addresses, in hexadecimal, that these processes listen on."""
    sockets = set()
    for pid in processes:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with contextlib.suppress(OSError):
                sockets.add(os.readlink(descriptor))
    rows = [
        line.split()
        for table in ("/proc/net/tcp", "/proc/net/tcp6")
        if Path(table).exists()
        for line in Path(table).read_text().splitlines()[1:]
    ]
    return [row[1] for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in sockets]


def _wait_until_gone(folder: Path) -> None:
    deadline = time.monotonic() + 10
    while left := _processes_of(folder):
        assert time.monotonic() < deadline, f"{left} were left running"
        time.sleep(0.02)


@linux
def test_it_listens_on_loopback_only(private_broker: PrivateBroker) -> None:
    environment = Path(f"/proc/{private_broker.pid}/environ").read_bytes().split(b"\0")
    [home] = [one.decode()[5:] for one in environment if one.startswith(b"HOME=")]
    processes = _processes_of(servers.rabbitmq_root() / home.lstrip("/"))
    assert {"beam.smp", "epmd"} <= set(processes.values())
    addresses = {one.rpartition(":")[0] for one in _listeners_of(processes)}
    ports = {int(one.rpartition(":")[2], 16) for one in _listeners_of(processes)}
    # As the kernel prints 127.0.0.1 and ::1 on a little-endian machine.
    assert addresses <= {"0100007F", "00000000000000000000000001000000"}
    assert len(ports) == 3  # AMQP, Erlang's distribution, its port mapper
    assert private_broker.port in ports


def test_a_durable_message_survives_a_kill_and_the_port_stays(
    private_broker: PrivateBroker, name: str
) -> None:
    url = private_broker.url
    inspector = Inspector(url)
    queue = inspector.queue(name, arguments={"x-queue-type": "classic"})
    inspector.channel.confirm_delivery()
    inspector.publish(queue, b'"kept"')
    private_broker.ctl("eval", "mnesia:sync_log().")  # a new queue is written a little later
    private_broker.kill()
    assert not private_broker.running
    private_broker.restart()
    assert private_broker.url == url
    assert inspector.get(queue).payload == "kept"
    inspector.close()


def test_starting_it_again_while_it_runs_changes_nothing(private_broker: PrivateBroker) -> None:
    pid = private_broker.pid
    assert private_broker.start().pid == pid


def test_ctl_speaks_to_this_node(private_broker: PrivateBroker) -> None:
    assert f"outbox-{private_broker.port}@localhost" in private_broker.ctl("cluster_status")


@linux
@pytest.mark.usefixtures("private_broker")  # skipped where that is
@pytest.mark.slow
def test_stopping_leaves_neither_process_nor_folder(parent: Path) -> None:
    with PrivateBroker(directory=parent) as broker:
        folder = _folder(parent)
        assert _processes_of(folder)
    assert not broker.running
    assert _processes_of(folder) == {}
    assert list(parent.iterdir()) == []


@linux
@pytest.mark.usefixtures("private_broker")
@pytest.mark.slow
def test_a_node_that_does_not_start_leaves_nothing_behind(
    parent: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CONFIG", "no.such.setting = {port}\n")
    with pytest.raises(TimeoutError, match=r"no\.such\.setting"):
        PrivateBroker(directory=parent).start()
    assert list(parent.iterdir()) == []


_SCRIPT = """
import sys, time
from pathlib import Path
from outbox.testing.broker import PrivateBroker
broker = PrivateBroker(directory=Path(sys.argv[1])).start()
print("started", flush=True)
sys.stdin.readline()
"""


def _start_script(directory: Path) -> subprocess.Popen[str]:
    script = subprocess.Popen(
        [sys.executable, "-c", _SCRIPT, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert script.stdout is not None
    assert script.stdout.readline() == "started\n"
    return script


@linux
@pytest.mark.usefixtures("private_broker")
@pytest.mark.slow
def test_a_program_that_forgets_to_stop_it_leaves_nothing_behind(parent: Path) -> None:
    with _start_script(parent) as script:
        folder = _folder(parent)
        script.communicate("\n", timeout=30)
        assert script.returncode == 0
    _wait_until_gone(folder)
    assert list(parent.iterdir()) == []


@linux
@needs_setpriv
@pytest.mark.usefixtures("private_broker")
@pytest.mark.slow
def test_no_process_survives_a_program_that_is_killed(parent: Path) -> None:
    with _start_script(parent) as script:
        folder = _folder(parent)
        assert _processes_of(folder)
        script.kill()
    _wait_until_gone(folder)


def test_a_missing_server_is_one_line_that_says_what_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OUTBOX_TEST_RABBITMQ", raising=False)
    monkeypatch.setattr(servers, "_RABBITMQ", ())
    with pytest.raises(BrokerMissing, match="apt-get install rabbitmq-server") as caught:
        PrivateBroker()
    assert "\n" not in str(caught.value)


def test_a_root_folder_without_a_server_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_TEST_RABBITMQ", str(tmp_path))
    with pytest.raises(BrokerMissing, match=r"OUTBOX_TEST_RABBITMQ.*scripts/rabbitmq-4") as caught:
        PrivateBroker()
    assert str(tmp_path) in str(caught.value)


def test_a_folder_that_the_server_cannot_see_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "root"
    monkeypatch.setenv("OUTBOX_TEST_RABBITMQ", str(root))
    with pytest.raises(ValueError, match=f"outside of {root}"):
        PrivateBroker(directory=tmp_path)
