"""Real applications on real servers, publishing to a real broker."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.amqp import Inspector

ROOT = Path(__file__).parents[2]
APPS = "tests.integration.apps"

GRACEFUL = "unix_signal:15 gracefully_kill_them_all"
UWSGI = "import pyuwsgi, sys; pyuwsgi.run(sys.argv[1:])"

SERVERS = {
    "gunicorn sync, Flask": ["gunicorn", "-k", "sync", f"{APPS}.flask_app:app"],
    "gunicorn gthread, Flask": ["gunicorn", "--threads", "4", f"{APPS}.flask_app:app"],
    "gunicorn preload, Django": ["gunicorn", "--preload", "-w", "2", f"{APPS}.django_app:app"],
    "gunicorn gevent, Flask": ["gunicorn", "-k", "gevent", f"{APPS}.flask_app:app"],
    "waitress, Flask": ["waitress", f"{APPS}.flask_app:app"],
    "uWSGI, Django": ["uwsgi", "--enable-threads", "--module", f"{APPS}.django_app:app"],
    "uvicorn, Starlette": ["uvicorn", f"{APPS}.starlette_app:app"],
    "uvicorn, FastAPI": ["uvicorn", f"{APPS}.fastapi_app:app"],
    "hypercorn, Starlette": ["hypercorn", f"{APPS}.starlette_app:app"],
}


class Served:
    def __init__(self, command: list[str], url: str, name: str, folder: Path) -> None:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            self.port: int = taken.getsockname()[1]
        program, *arguments = command
        address = f"127.0.0.1:{self.port}"
        start = {
            "gunicorn": ["-m", "gunicorn", "--bind", address],
            "waitress": ["-m", "waitress", f"--listen={address}"],
            "uwsgi": [
                "-c",
                UWSGI,
                "--master",
                "--hook-master-start",
                GRACEFUL,
                "--http-socket",
                address,
            ],
            "uvicorn": ["-m", "uvicorn", "--port", str(self.port)],
            "hypercorn": ["-m", "hypercorn", "--bind", address],
        }[program]
        # waitress leaves SIGTERM to its default action, which ends the process then and there.
        self._stops_on = signal.SIGINT if program == "waitress" else signal.SIGTERM
        self._log = folder / "server.log"
        with self._log.open("wb") as output:
            self._child = subprocess.Popen(
                [sys.executable, *start, *arguments],
                cwd=ROOT,
                env={**os.environ, "OUTBOX_URL": url, "OUTBOX_EXCHANGE": name},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + 20
        while True:
            with contextlib.suppress(OSError), self.connect():
                return
            assert self._child.poll() is None, self.log
            assert time.monotonic() < deadline, self.log
            time.sleep(0.05)

    @property
    def log(self) -> str:
        return self._log.read_text()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), 5)

    def get(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=20) as found:
                return found.status, found.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()

    def ask_to_stop(self) -> None:
        self._child.send_signal(self._stops_on)

    def wait(self, timeout: float = 20) -> int:
        """Return its exit code; uvicorn ends by the signal that it has handled."""
        return self._child.wait(timeout)

    def stop(self) -> int:
        if self._child.poll() is None:
            self.ask_to_stop()
            try:
                self._child.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self._child.pid, signal.SIGKILL)  # its own session: it and its workers
        return self._child.wait(10)


@pytest.fixture(params=SERVERS, scope="module")
def command(request: pytest.FixtureRequest) -> list[str]:
    return SERVERS[request.param]


@pytest.fixture
def served(command: list[str], amqp_url: str, name: str, tmp_path: Path) -> Iterator[Served]:
    found = Served(command, amqp_url, name, tmp_path)
    yield found
    found.stop()


def test_requests_publish_only_when_they_succeed(
    served: Served, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    for n in range(20):
        assert served.get(f"/ok/{n}")[0] == 200
        if n % 5 == 0:
            assert served.get("/boom")[0] == 500
    assert sorted(m.payload for m in inspector.messages(queue, 20)) == list(range(20))
    status, body = served.get("/stream")
    assert (status, len(body)) == (200, 2_000_000)
    assert [m.payload for m in inspector.messages(queue, 200)] == list(range(200))
    assert inspector.all(queue) == []
    assert served.stop() in (0, -signal.SIGTERM), served.log


@pytest.mark.hazard("D4", "E5")
def test_a_stream_whose_client_disconnects_is_published_as_a_whole_or_dropped_as_a_whole(
    served: Served, inspector: Inspector, name: str
) -> None:
    """Servers that notice end the generator, and with it a transaction around it; others don't."""
    queue = inspector.queue(name, name)
    with served.connect() as client:
        client.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert client.recv(1000)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
    deadline = time.monotonic() + 20
    arrived: list[object] = []
    while not arrived and not (dropped := "event(s) dropped because" in served.log):
        assert time.monotonic() < deadline, served.log
        arrived = [m.payload for m in inspector.messages(queue, 200, 0.2)]
    assert arrived == ([] if dropped else list(range(200)))
    assert served.get("/ok/7")[0] == 200
    assert inspector.get(queue).payload == 7


@pytest.mark.hazard("E7")
def test_a_request_during_shutdown_is_finished_and_published(
    served: Served, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    with served.connect() as client:
        client.sendall(b"GET /stream HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        assert client.recv(1000)
        served.ask_to_stop()
        while client.recv(100_000):
            pass
    assert served.wait() in (0, -signal.SIGTERM), served.log
    assert [m.payload for m in inspector.messages(queue, 200)] == list(range(200))
