"""The table of endings: what is committed is delivered, and what is not is not.

Under the servers, in commands, in scripts and in tasks; a relay runs beside them, for what no
process can publish itself.
"""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox import Publisher
from outbox.django.connecting import engine_of
from outbox.django.models import StoredEvent
from outbox.sql import Relay
from tests.amqp import Inspector
from tests.django.project.endings import ENDINGS
from tests.django.running import ROOT, environment_of
from tests.django.shop.models import Order
from tests.relaying import running
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

PROJECT = "tests.django.project"
SERVERS = {
    "gunicorn": ["gunicorn", "--threads", "4", f"{PROJECT}.project_wsgi", "--bind"],
    "uvicorn": ["uvicorn", f"{PROJECT}.project_asgi:application", "--port"],
}
LIVES = {
    "command": [f"{PROJECT}.manage", "end", "0"],
    "shell": [f"{PROJECT}.manage", "shell", "-c", f"from {PROJECT}.endings import run; run(0)"],
    "script": [],
    "celery": [f"{PROJECT}.task_worker", "0"],
}
SCRIPT = f"import django; django.setup(); from {PROJECT}.endings import run; run(0)"


class Delivered:
    """Everything that the project's processes publish, whose relays run meanwhile."""

    def __init__(self, inspector: Inspector, url: str, exchange: str) -> None:
        self.outbox = {"URL": url, "EXCHANGE": exchange}
        self._inspector = inspector
        self._queue = inspector.queue(f"{exchange}.all", exchange)

    def numbers(self, count: int) -> list[int]:
        """Return what has arrived when no row is left."""
        for alias in ("default", "other"):
            rows = StoredEvent.objects.using(alias)
            wait_until(lambda rows=rows: not rows.exists(), 20)  # type: ignore[misc]
        messages = self._inspector.messages(self._queue, count)
        return sorted(each.payload["n"] for each in (*messages, *self._inspector.all(self._queue)))


@pytest.fixture
def delivered(
    databases: str, inspector: Inspector, amqp_url: str, name: str
) -> Iterator[Delivered]:
    found = Delivered(inspector, amqp_url, name)
    with contextlib.ExitStack() as stack:
        publisher = stack.enter_context(Publisher(amqp_url, exchange=name))
        for alias in ("default", "other"):
            stack.callback(engine_of(alias).dispose)
            stack.enter_context(running(Relay(engine_of(alias), publisher)))
        yield found


def committed() -> list[int]:
    return sorted(
        number
        for alias in ("default", "other")
        for number in Order.objects.using(alias).values_list("number", flat=True)
    )


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


@contextlib.contextmanager
def serving(server: str, environment: dict[str, str], log: Path) -> Iterator[str]:
    """Run a server; yield its URL."""
    port = free_port()
    command = SERVERS[server]
    address = f"127.0.0.1:{port}" if server == "gunicorn" else str(port)
    with log.open("wb") as output:
        child = subprocess.Popen(
            [sys.executable, "-m", *command, address],
            cwd=ROOT,
            env={**environment, "XDG_RUNTIME_DIR": str(log.parent)},
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 30
        while True:
            with contextlib.suppress(OSError):
                status(url)
                break
            assert child.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield url
    finally:
        child.terminate()
        child.wait(20)


def status(url: str) -> int:
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with direct.open(url, timeout=30) as response:
            response.read()
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            error.read()
            return error.code


@pytest.mark.parametrize("server", SERVERS)
@pytest.mark.parametrize("atomic_requests", [False, True], ids=["autocommit", "atomic requests"])
def test_requests(delivered: Delivered, server: str, atomic_requests: bool, tmp_path: Path) -> None:
    environment = environment_of(delivered.outbox, ATOMIC_REQUESTS=atomic_requests)
    log = tmp_path / "log"
    expected: list[int] = []
    with serving(server, environment, log) as url:
        for index, (name, ending) in enumerate(ENDINGS.items()):
            assert status(f"{url}/{name}/{index * 10}") == ending.status, (name, log.read_text())
            kept = ending.kept
            if atomic_requests and ending.in_request is not None:
                kept = ending.in_request
            expected += [index * 10 + each for each in kept]
        wait_until(lambda: committed() == expected, 20)  # also what runs after a response
    assert delivered.numbers(len(expected)) == expected
    assert committed() == expected


@pytest.mark.parametrize("life", LIVES)
def test_processes_that_serve_nothing(delivered: Delivered, life: str, tmp_path: Path) -> None:
    arguments = ["-m", *LIVES[life]] if LIVES[life] else ["-c", SCRIPT]
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env=environment_of(delivered.outbox),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = [
        index * 10 + each
        for index, ending in enumerate(ENDINGS.values())
        if ending.anywhere
        for each in ending.kept
    ]
    assert committed() == expected
    assert delivered.numbers(len(expected)) == expected
