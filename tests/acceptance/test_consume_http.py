"""``outbox-consume --http`` as orchestrators and Prometheus use it."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox import exit_codes
from tests.consuming import Command
from tests.places import SQLitePlace
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python


@pytest.fixture
def command(tmp_path: Path, name: str) -> Iterator[Command]:
    found = Command(tmp_path, SQLitePlace(str(tmp_path / "outbox.db"), name), name)
    yield found
    found.close()


def address_of(command: Command) -> str:
    [address] = command.wait_for(r"listening on (http://127\.0\.0\.1:\d+)")
    return str(address)


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"{address}{path}", timeout=10) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.slow
def test_a_worker_that_dies_is_not_ready_but_live(command: Command) -> None:
    command.start("--http", "127.0.0.1:0", "-p", "2", "-t", "1")
    address = address_of(command)
    assert get(address, "/livez") == (200, "live\n")
    wait_until(lambda: get(address, "/readyz") == (200, "ready\n"), 20)
    status = json.loads(get(address, "/status")[1])
    pids = [worker["pid"] for worker in status["workers"]]
    assert sorted(pids) == sorted(command.consuming(2))
    assert (status["pid"], status["phase"]) == (command.process.pid, "ready")

    os.kill(pids[0], signal.SIGKILL)
    seen: list[int] = []

    def is_ready_again() -> bool:
        assert get(address, "/livez")[0] == 200
        seen.append(get(address, "/readyz")[0])
        return seen[-1] == 200 and 503 in seen

    wait_until(is_ready_again, 20)
    text = get(address, "/metrics")[1]
    assert 'outbox_workers{state="ready"} 2\n' in text
    assert re.search(r'^outbox_worker_restarts_total\{reason="died"\} 1$', text, re.MULTILINE)
    assert command.stop() == exit_codes.SUCCESS


def counted(address: str, name: str) -> dict[str, int]:
    """Return the numbers of a queue's messages by outcome."""
    pattern = rf'^outbox_messages_total\{{queue="{name}",consumer="work",outcome="(\w+)"\}} (\d+)$'
    found = re.findall(pattern, get(address, "/metrics")[1], re.MULTILINE)
    return {outcome: int(number) for outcome, number in found if int(number)}


@pytest.mark.slow
def test_what_workers_count_outlives_them(command: Command, name: str) -> None:
    command.start("--http", "127.0.0.1:0", "-t", "1", "--max-messages", "4")
    address = address_of(command)
    command.publish(*["work"] * 10)
    command.wait_done(10)
    wait_until(lambda: counted(address, name) == {"acked": 10}, 10)
    assert len(command.workers()) >= 3  # two have reached their limit
    text = get(address, "/metrics")[1]
    [waits] = re.findall(rf'outbox_message_wait_seconds_count{{queue="{name}"}} (\d+)\n', text)
    assert 4 <= int(waits) <= 10  # those that a worker has given back aren't known to begin first
    assert 'outbox_connected{link="consumer"} 1\n' in text
    assert "outbox_worker_resident_bytes " in text
    status = json.loads(get(address, "/status")[1])
    assert status["workers"][-1]["in_flight"] == 0


@pytest.mark.parametrize("signalled", [False, True])
@pytest.mark.slow
def test_counts_never_fall_while_workers_are_killed(
    command: Command, name: str, signalled: bool
) -> None:
    command.start("--http", "127.0.0.1:0", "-t", "1")
    address = address_of(command)
    command.publish(*["work"] * 5)
    wait_until(lambda: counted(address, name) == {"acked": 5}, 20)
    os.kill(command.workers()[0], signal.SIGTERM if signalled else signal.SIGKILL)
    seen = [5]

    def is_replaced() -> bool:
        seen.append(counted(address, name).get("acked", 0))
        return len(command.workers()) == 2

    wait_until(is_replaced, 20)
    command.publish("work")
    wait_until(lambda: counted(address, name) == {"acked": 6}, 20)
    assert min(seen) == 5


def test_a_used_port_is_wrong_usage_before_anything_starts(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        command.start("--http", f"127.0.0.1:{port}")
        assert command.process.wait(20) == exit_codes.USAGE
    assert f"outbox-consume: cannot listen on 127.0.0.1:{port}: " in command.text()
    assert not command.workers()


def test_a_used_port_leaves_the_id_free(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        folder = command.folder / "ids"
        command.start("--id", "x", "--pid-dir", str(folder), "--http", f"127.0.0.1:{port}")
        assert command.process.wait(20) == exit_codes.USAGE
    assert not list(folder.iterdir())


@pytest.mark.slow
def test_a_successor_answers_at_the_address_of_its_predecessor(
    command: Command, tmp_path: Path, name: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    options = ("--id", "x", "--pid-dir", str(tmp_path / "ids"), "--http", f"127.0.0.1:{port}")
    command.start(*options)
    address = address_of(command)
    wait_until(lambda: get(address, "/readyz")[0] == 200, 20)
    predecessor = command.process
    folder = tmp_path / "successor"
    folder.mkdir()
    successor = Command(folder, command.place, name)
    try:
        successor.start(*options)
        assert predecessor.wait(30) == exit_codes.SUCCESS
        successor.wait_for("listening on ")
        assert get(address, "/readyz") == (200, "ready\n")
        assert json.loads(get(address, "/status")[1])["pid"] == successor.process.pid
        assert successor.stop() == exit_codes.SUCCESS
    finally:
        successor.close()


def test_an_address_that_is_none_is_wrong_usage(command: Command) -> None:
    command.start("--http", "9100")
    assert command.process.wait(20) == exit_codes.USAGE
    assert "--http: '9100' is not an address; use HOST:PORT" in command.text()


@pytest.mark.slow
def test_the_variable_is_the_default(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_HTTP", "127.0.0.1:0")
    command.start()
    address = address_of(command)
    wait_until(lambda: get(address, "/readyz")[0] == 200, 20)
    assert command.stop() == exit_codes.SUCCESS
    with pytest.raises(OSError):
        get(address, "/livez")


def test_a_program_that_a_handler_leaves_behind_does_not_keep_the_port(command: Command) -> None:
    command.write(
        command.folder.joinpath("work.py").read_text()
        + "\nimport subprocess\nsubprocess.Popen(['sleep', '30'], close_fds=False)\n"
    )
    command.start("--http", "127.0.0.1:0")
    address = address_of(command)
    wait_until(lambda: get(address, "/readyz")[0] == 200, 20)
    port = int(address.rpartition(":")[2])
    os.kill(command.process.pid, signal.SIGKILL)
    command.process.wait(10)

    def is_free() -> bool:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return sock.connect_ex(("127.0.0.1", port)) != 0

    wait_until(is_free, 5)
