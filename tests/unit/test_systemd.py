"""What a service says to systemd, over real sockets."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from outbox.service.state import ServiceState, WorkerState
from outbox.service.systemd import SystemdFace
from tests.services import Service

STARTING = ServiceState(
    workers=(WorkerState(1, 10, "starting", 0.1),), reasons=("worker 1 is starting",)
)
READY = ServiceState(workers=(WorkerState(1, 10, "ready", 1.0),), ready=True, phase="ready")


@contextlib.contextmanager
def listening(address: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind("\0" + address[1:] if address.startswith("@") else address)
        manager.setblocking(False)
        yield manager


def heard(manager: socket.socket) -> list[str]:
    said = []
    with contextlib.suppress(BlockingIOError):
        while True:
            said.append(manager.recv(4096).decode())
    return said


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "path":
        return str(tmp_path / "notify")
    return f"@outbox-test-{os.getpid()}"


def test_a_service_says_when_it_is_ready_reloads_and_stops(address: str) -> None:
    service = Service(STARTING)
    with listening(address) as manager:
        face = SystemdFace(address)
        face.turn(service)
        assert heard(manager) == [
            "STATUS=starting: 0 of 1 processes are ready (worker 1 is starting)"
        ]
        service.state = READY
        face.turn(service)
        face.turn(service)
        assert heard(manager) == ["READY=1"]
        before = time.monotonic_ns() // 1000
        service.state = replace(READY, reloads=1, reloading=True)
        face.turn(service)
        face.turn(service)
        [reloading] = heard(manager)
        found = re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=(\d+)", reloading)
        assert found is not None
        assert before <= int(found[1]) <= time.monotonic_ns() // 1000
        service.state = replace(READY, reloads=1)
        face.turn(service)
        assert heard(manager) == ["READY=1"]
        service.state = replace(READY, reloads=2)  # it was over at once
        face.turn(service)
        assert [said.partition("\n")[0] for said in heard(manager)] == ["RELOADING=1", "READY=1"]
        service.state = replace(READY, reloads=2, phase="leaving", ready=False)
        face.turn(service)
        face.turn(service)
        assert heard(manager) == ["STOPPING=1"]
        face.close()


def test_a_service_says_that_it_is_alive_only_while_it_can_mend_what_breaks(address: str) -> None:
    service = Service(STARTING)
    service.state = READY
    with listening(address) as manager:
        face = SystemdFace(address, 0.3)
        for _ in range(5):
            face.turn(service)
            time.sleep(0.11)
        assert 4 <= heard(manager).count("WATCHDOG=1") <= 5
        service.state = replace(READY, mends=False)
        for _ in range(3):
            face.turn(service)
            time.sleep(0.11)
        assert "WATCHDOG=1" not in heard(manager)
        face.close()


@pytest.mark.parametrize(
    ("pid", "is_watched"), [("own", True), ("", True), ("1", False)], ids=["own", "any", "other"]
)
def test_the_variables_of_systemd_are_taken_out_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, address: str, pid: str, is_watched: bool
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()) if pid == "own" else pid)
    face = SystemdFace.inherited()
    assert face is not None
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & set(os.environ)
    service = Service(STARTING)
    service.state = READY
    with listening(address) as manager:
        face.turn(service)
        assert ("WATCHDOG=1" in heard(manager)) == is_watched
    face.close()
    assert SystemdFace.inherited() is None


def test_a_systemd_that_is_away_or_slow_holds_nothing_up(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    service = Service(STARTING)
    face = SystemdFace(str(tmp_path / "none"), 0.001)
    for _ in range(3):
        face.turn(service)
        time.sleep(0.001)
    assert caplog.text.count("cannot notify systemd") == 1
    face.close()
    with listening(str(tmp_path / "full")):
        face = SystemdFace(str(tmp_path / "full"), 0.0)
        began = time.monotonic()
        for _ in range(1000):
            face.turn(service)
        assert time.monotonic() - began < 5
        face.close()


def test_what_systemd_has_no_room_for_is_said_later(address: str) -> None:
    service = Service(STARTING)
    with listening(address) as manager:
        face = SystemdFace(address, 0.0)
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # other units say much at the boot
                while True:
                    other.sendto(b"x", manager.getsockname())
        service.state = READY
        face.turn(service)
        service.state = replace(READY, reloads=1)
        for _ in range(100):
            face.turn(service)
        assert set(heard(manager)) == {"x"}
        face.turn(service)
        said = [each.partition("\n")[0] for each in heard(manager)]
        assert said[:3] == ["READY=1", "RELOADING=1", "READY=1"]
        assert len(said) <= 5  # a status and a sign of life, which are not kept
        face.close()
