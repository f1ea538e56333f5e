"""``outbox relay -p``: relays that die, are replaced, and show themselves to systemd and probes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from outbox import exit_codes
from outbox.sql import Store
from tests.amqp import Inspector
from tests.places import SQLitePlace
from tests.relaying import is_empty, many
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

Start = Callable[..., "subprocess.Popen[bytes]"]

HANG = """
import gc, os, threading, time

def hang_once():
    while not os.path.exists("{folder}/hang"):
        time.sleep(0.05)
    from outbox.transports.rabbitmq.link import Link
    for link in [each for each in gc.get_objects() if isinstance(each, Link)]:
        os.rename("{folder}/hang", "{folder}/hung")
        link.call(wait_for_ever)

def wait_for_ever():
    time.sleep(600)

threading.Thread(target=hang_once, daemon=True).start()
"""


@pytest.fixture
def database_url(tmp_path: Path) -> str:
    return f"sqlite:///{tmp_path}/events.db"


@pytest.fixture
def place(tmp_path: Path, name: str) -> SQLitePlace:
    place = SQLitePlace(str(tmp_path / "outbox.db"), name)
    place.bind(name, name, "a")
    return place


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture
def start(database_url: str, place: SQLitePlace, log: Path) -> Iterator[Start]:
    with contextlib.ExitStack() as stack:

        def begin(*arguments: str, **environment: str) -> subprocess.Popen[bytes]:
            variables = {
                **os.environ,
                "OUTBOX_DATABASE_URL": database_url,
                "OUTBOX_URL": place.url,
                **environment,
            }
            with log.open("ab") as output:
                child = subprocess.Popen(
                    [sys.executable, "-m", "outbox", "relay", *arguments],
                    env=variables,
                    stdin=subprocess.DEVNULL,
                    stderr=output,
                    start_new_session=True,
                )
            stack.callback(child.wait, 10)
            stack.callback(kill_session, child.pid)
            return child

        yield begin


def kill_session(leader: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def relays(log: Path, count: int) -> list[int]:
    """Wait until that number of relays has begun in all; return their ids."""
    wait_until(lambda: log.read_text().count(": relaying\n") >= count, 20)
    return [int(pid) for pid in re.findall(r"\(process (\d+)\) started", log.read_text())]


def test_relays_that_die_are_replaced_and_new_code_is_loaded(
    start: Start, store: Store, place: SQLitePlace, log: Path, name: str
) -> None:
    parent = start("-p", "2")
    first = relays(log, 2)
    store.put(many(20, name))
    wait_until(lambda: place.count(name) == 20, 20)
    os.kill(first[0], signal.SIGKILL)
    assert len(relays(log, 3)) == 3
    assert f"(process {first[0]}) was killed by SIGKILL" in log.read_text()
    parent.send_signal(signal.SIGHUP)
    assert len(relays(log, 5)) == 5
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(20) == exit_codes.SUCCESS
    assert is_empty(store)
    assert place.count(name) == 20


@pytest.mark.slow
def test_a_relay_whose_publisher_hangs_is_replaced(
    start: Start, store: Store, amqp_url: str, inspector: Inspector, log: Path, name: str
) -> None:
    inspector.queue(name, name)
    (log.parent / "sitecustomize.py").write_text(HANG.format(folder=log.parent))
    arguments = ("-p", "1", "--stuck-after", "3s")
    parent = start(*arguments, OUTBOX_URL=amqp_url, PYTHONPATH=path_with(log.parent))
    first = relays(log, 1)
    (log.parent / "hang").touch()
    stuck = r"\(process (\d+)\) is stuck: the thread of its publisher's connection has not answered"
    wait_until(lambda: re.search(stuck, log.read_text()), 20)
    assert [int(pid) for pid in re.findall(stuck, log.read_text())] == first
    assert len(relays(log, 2)) >= 2
    assert "in wait_for_ever" in log.read_text()
    store.put(many(20, name))
    assert len(inspector.messages(name, 20)) == 20
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(20) == exit_codes.SUCCESS


def path_with(folder: Path) -> str:
    return os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])


@pytest.mark.slow
def test_a_relay_that_is_quiet_publishes_nothing_and_stays(
    start: Start, store: Store, place: SQLitePlace, log: Path, name: str
) -> None:
    parent = start("-p", "1")
    relays(log, 1)
    parent.send_signal(signal.SIGTSTP)
    wait_until(lambda: "beginning no more messages" in log.read_text(), 10)
    time.sleep(0.5)
    store.put(many(3, name))
    time.sleep(2.5)  # it looks at least every 2 s
    assert place.count(name) == 0
    assert parent.poll() is None
    parent.send_signal(signal.SIGTERM)
    assert parent.wait(20) == exit_codes.SUCCESS
    assert store.status().waiting == 3


@pytest.mark.slow
def test_a_relay_shows_itself_to_systemd_and_to_probes(
    start: Start, store: Store, place: SQLitePlace, log: Path, name: str, tmp_path: Path
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        parent = start("--http", "127.0.0.1:0", NOTIFY_SOCKET=str(tmp_path / "notify"))
        said = []
        while "READY=1" not in said:
            said.append(manager.recv(4096).decode())
        [url] = re.findall(r"listening on (http://\S+)", log.read_text())
        with urllib.request.urlopen(f"{url.rstrip('/')}/readyz", timeout=5) as answer:
            assert answer.status == 200
        [relay] = relays(log, 1)
        with open(f"/proc/{relay}/environ", "rb") as file:
            assert b"NOTIFY_SOCKET" not in file.read()
        parent.send_signal(signal.SIGHUP)
        while not said[-1].startswith("RELOADING=1\nMONOTONIC_USEC="):
            said.append(manager.recv(4096).decode())
        while said[-1] != "READY=1":
            said.append(manager.recv(4096).decode())
        parent.send_signal(signal.SIGTERM)
        while said[-1] != "STOPPING=1":
            said.append(manager.recv(4096).decode())
    assert parent.wait(20) == exit_codes.SUCCESS


def test_once_needs_no_parent(start: Start, store: Store, log: Path) -> None:
    assert start("--once", "-p", "2").wait(20) == exit_codes.USAGE
    assert "--once can't be used with -p" in log.read_text()
    assert start("--once", NOTIFY_SOCKET="/nonexistent").wait(20) == exit_codes.SUCCESS
