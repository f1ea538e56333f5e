"""All workers are killed while their tasks run: no result stays ``running``."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import outbox.sql
from outbox import configure
from outbox.storage.engines import open_engine
from outbox.tasks import TaskHandle
from tests.commands import outbox_command
from tests.consuming import Command
from tests.places import Place, ServerPlace, place_of
from tests.waiting import wait_until

LEASE = 2.0

MODULE = """
import os, time
from outbox.results import results_statements
from outbox.transports.database.server.server_database import ServerDatabase

results_statements.LEASE = {lease}  # before those are imported that use it
ServerDatabase.lease = {lease}

from outbox.tasks import task


@task(queue="{name}")
def wait_for_go() -> str:
    with open("began", "a") as file:
        file.write("x")
    while not os.path.exists("go"):
        time.sleep(0.05)
    return "done"
"""

CALLS = """
from outbox import auto_publishing
from work import wait_for_go

with auto_publishing():
    handles = [wait_for_go.later() for _ in range(2)]
print(*(handle.id for handle in handles))
"""


@pytest.fixture(params=["rabbitmq", "postgresql"])
def place(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> Place:
    return place_of(request.param, request, name, tmp_path)


@pytest.fixture
def results(place: Place, request: pytest.FixtureRequest) -> str:
    """The database of the results: that of the queues, or one beside RabbitMQ."""
    if isinstance(place, ServerPlace):
        return place.url
    url: str = request.getfixturevalue("postgresql_url")
    engine = open_engine(url)
    outbox.sql.metadata.create_all(engine)
    engine.dispose()
    return url


@pytest.mark.one_python
@pytest.mark.slow
def test_no_result_runs_two_leases_after_all_workers_were_killed(
    place: Place, results: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OUTBOX_RESULTS", results)
    command = Command(tmp_path, place, name)
    command.write(MODULE.format(lease=LEASE, name=name))
    configure(place.url, exchange=place.exchange, results=results)
    try:
        command.start("-p", "2", "-t", "1")
        command.consuming(2)
        handles: list[TaskHandle[Any]] = [TaskHandle(id_) for id_ in called(place, tmp_path)]
        wait_until(lambda: (tmp_path / "began").exists(), 20)
        wait_until(lambda: [one.status for one in handles] == ["running"] * 2, 20)
        time.sleep(LEASE)  # they have extended their leases by now
        assert [one.status for one in handles] == ["running"] * 2

        os.killpg(command.process.pid, signal.SIGKILL)  # the parent and both workers
        assert command.process.wait(10) == -signal.SIGKILL
        killed_at = time.monotonic()
        wait_until(lambda: [one.status for one in handles] == ["retrying"] * 2, 20)
        assert time.monotonic() - killed_at < 2 * LEASE
        assert sorted(listed(results, name)) == ["retrying"] * 2

        (tmp_path / "go").touch()
        command.start("-p", "1", "-t", "1")
        assert [one.result(30) for one in handles] == ["done"] * 2
    finally:
        command.close()


def called(place: Place, folder: Path) -> list[str]:
    """Call the task twice, in another process; return the ids."""
    environment = {"OUTBOX_URL": place.url, "OUTBOX_EXCHANGE": place.exchange}
    done = subprocess.run(
        [sys.executable, "-c", CALLS],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        check=True,
        timeout=30,
    )
    return done.stdout.decode().split()


def listed(results: str, queue: str) -> list[str]:
    """The statuses that another process finds."""
    done = subprocess.run(
        outbox_command("tasks", "list", "--json"),
        env={**os.environ, "OUTBOX_RESULTS": results, "OUTBOX_URL": "memory://"},
        capture_output=True,
        check=True,
        timeout=30,
    )
    rows = map(json.loads, done.stdout.splitlines())
    return [row["status"] for row in rows if row["queue"] == queue]
