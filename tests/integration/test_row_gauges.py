"""What waits in a database, as Prometheus sees it."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from outbox.sql import Store
from outbox.storage.clock import in_seconds
from outbox.storage.schema import events
from outbox.telemetry import metrics, row_gauges
from outbox.telemetry.row_gauges import RowGauges
from outbox.testing.databases.postgresql import PrivatePostgreSQL
from tests.commands import outbox_command
from tests.consuming import Command
from tests.places import ServerPlace
from tests.relaying import opened
from tests.waiting import wait_until


@pytest.fixture
def store(database_url: str) -> Iterator[Store]:
    found = opened(database_url)
    yield found
    found.engine.dispose()


def add(store: Store, queue: str, count: int, age: float = 0.0, due: float = 0.0) -> None:
    values = {
        "aggregatetype": "t",
        "aggregateid": "a",
        "type": "x",
        "payload": b"{}",
        "queue": queue,
        "exchange": "",
        "content_type": "application/json",
        "occurred_at": in_seconds(-age),
        "stored_at": in_seconds(-age),
        "available_at": in_seconds(due),
    }
    with store.engine.begin() as connection:
        for number in range(count):
            connection.execute(events.insert().values(id=f"{queue}-{due}-{number}", **values))


def shown() -> dict[str, float]:
    """The gauges, by the text of their labels."""
    pattern = r"^outbox_backlog_(\w+)(\{.*\}) (\S+)$"
    found = re.findall(pattern, metrics.render(metrics.snapshot()), re.MULTILINE)
    return {name + labels: float(value) for name, labels, value in found}


def test_rows_are_counted_by_queue_and_state_and_not_while_that_is_impossible(
    store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "outbox.metrics")
    monkeypatch.setattr(row_gauges, "_EVERY", 0.05)
    monkeypatch.setattr(row_gauges, "_SHARE", 1)
    add(store, "mail", 3, age=100.0)
    add(store, "mail", 2, due=3600.0)
    add(store, "mail.dead", 1, age=7.0)
    add(store, "", 2, age=50.0)
    assert len(store.claim(1, queue="mail", lease=600.0)) == 1
    store.bury(store.claim(1, queue="", lease=600.0), "NOT_FOUND")
    gauges = RowGauges(store.status, ["mail", "idle"])
    gauges.start()
    try:
        wait_until(shown, 20)
        found = shown()
        ages = {name: found.pop(name) for name in list(found) if name.startswith("age_seconds")}
        assert found == {
            'messages{queue="",state="dead"}': 1,
            'messages{queue="",state="in_flight"}': 0,
            'messages{queue="",state="scheduled"}': 0,
            'messages{queue="",state="waiting"}': 1,
            'messages{queue="idle",state="in_flight"}': 0,
            'messages{queue="idle",state="scheduled"}': 0,
            'messages{queue="idle",state="waiting"}': 0,
            'messages{queue="mail",state="in_flight"}': 1,
            'messages{queue="mail",state="scheduled"}': 2,
            'messages{queue="mail",state="waiting"}': 2,
            'messages{queue="mail.dead",state="in_flight"}': 0,
            'messages{queue="mail.dead",state="scheduled"}': 0,
            'messages{queue="mail.dead",state="waiting"}': 1,
        }
        least = {"": 50, "idle": 0, "mail": 100, "mail.dead": 7}
        assert set(ages) == {f'age_seconds{{queue="{queue}"}}' for queue in least}
        for queue, age in least.items():
            assert age <= ages[f'age_seconds{{queue="{queue}"}}'] < age + (60 if age else 1)

        with store.engine.begin() as connection:
            connection.execute(text("DELETE FROM outbox_events"))
        wait_until(lambda: set(shown().values()) == {0}, 20)
        assert 'messages{queue="mail.dead",state="waiting"}' in shown()  # once seen, always shown

        with store.engine.begin() as connection:
            connection.execute(text("ALTER TABLE outbox_events RENAME TO moved"))
        wait_until(lambda: not shown(), 20)
        time.sleep(0.3)
        [record] = caplog.records
        assert record.levelno == logging.INFO
        assert record.message.startswith("cannot count the rows for the metrics: ")
        with store.engine.begin() as connection:
            connection.execute(text("ALTER TABLE moved RENAME TO outbox_events"))
        wait_until(shown, 20)
    finally:
        gauges.stop()
    del gauges
    wait_until(lambda: not shown(), 20)


@pytest.mark.one_python
def test_a_relay_shows_what_waits_for_a_broker_that_is_away(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/events.db"
    store = opened(url)
    add(store, "", 3, age=20.0)
    store.engine.dispose()
    variables = {"OUTBOX_URL": "amqp://127.0.0.1:1", "OUTBOX_DATABASE_URL": url}
    log = tmp_path / "log"
    with log.open("wb") as file:
        relay = subprocess.Popen(
            outbox_command("relay", "--http", "127.0.0.1:0", "--log-level", "INFO"),
            env={**os.environ, **variables},
            stderr=file,
        )
    try:
        pattern = r"listening on (http://127\.0\.0\.1:\d+)"
        wait_until(lambda: re.search(pattern, log.read_text()), 20)
        [address] = re.findall(pattern, log.read_text())
        wait_until(lambda: backlog_at(address), 20)
        found = backlog_at(address)
        waiting = [
            float(line.split()[-1])
            for line in found
            if re.match(r'outbox_backlog_messages\{queue="",state="(waiting|in_flight)"\}', line)
        ]
        assert sum(waiting) == 3
    finally:
        relay.terminate()
        relay.wait(30)


def backlog_at(address: str) -> list[str]:
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as response:
        return re.findall(r"^outbox_backlog_.*", response.read().decode(), re.MULTILINE)


@pytest.mark.one_python
@pytest.mark.slow
def test_one_process_of_a_service_counts_for_all(
    postgresql: PrivatePostgreSQL, tmp_path: Path, name: str
) -> None:
    place = ServerPlace(postgresql.url, name)
    add(Store(place.engine), "other", 4, age=10.0)
    command = Command(tmp_path, place, name)
    try:
        command.start("--http", "127.0.0.1:0", "-p", "2", "-t", "1")
        [address] = command.wait_for(r"listening on (http://127\.0\.0\.1:\d+)")
        wait_until(lambda: backlog_at(address), 20)
        found = backlog_at(address)
        assert f'outbox_backlog_messages{{queue="{name}",state="waiting"}} 0' in found
        assert 'outbox_backlog_messages{queue="other",state="waiting"} 4' in found
        assert any(line.startswith('outbox_backlog_age_seconds{queue="other"}') for line in found)
        command.consuming(2)
        command.process.send_signal(signal.SIGUSR1)
        stacks = command.wait_for(r"stacks of worker \d .*", 2)
        assert sum("row_gauges.py" in each for each in stacks) == 1
    finally:
        command.close()
