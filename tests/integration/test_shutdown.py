"""Servers that are stopped while the broker does not answer."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from outbox.testing.broker import PrivateBroker
from tests.amqp import Inspector
from tests.integration.test_servers import APPS, SERVERS, Served

COMMANDS = {**SERVERS, "uvicorn, no lifespan": ["uvicorn", f"{APPS}.bare_asgi_app:app"]}


@pytest.fixture(params=COMMANDS)
def served(
    request: pytest.FixtureRequest,
    private_broker: PrivateBroker,
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Served]:
    monkeypatch.setenv("OUTBOX_TIMEOUT", "0.3")
    monkeypatch.setenv("OUTBOX_DRAIN_TIMEOUT", "15")
    found = Served(COMMANDS[request.param], private_broker.url, name, tmp_path)
    try:
        yield found
    finally:
        private_broker.resume()
        found.stop()


@pytest.fixture
def own_inspector(private_broker: PrivateBroker) -> Iterator[Inspector]:
    with contextlib.closing(Inspector(private_broker.url)) as found:
        yield found


@pytest.mark.hazard("E7")
def test_a_server_that_stops_waits_for_events_in_flight(
    own_inspector: Inspector, served: Served, private_broker: PrivateBroker, name: str
) -> None:
    queue = own_inspector.queue(name, name)
    assert served.get("/ok/1")[0] == 200
    assert own_inspector.get(queue).payload == 1
    private_broker.pause()
    assert served.get("/ok/2")[0] == 200
    served.ask_to_stop()
    with pytest.raises(subprocess.TimeoutExpired):
        served.wait(1)
    private_broker.resume()
    assert served.wait() in (0, -signal.SIGTERM), served.log
    assert own_inspector.get(queue).payload == 2
    assert "lost" not in served.log
