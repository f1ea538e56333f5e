"""The commands on a database server as the broker, as their users run them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy import create_engine
from sqlalchemy.pool import NullPool

from outbox import Publisher, exit_codes
from tests.commands import run_outbox
from tests.places import events_for
from tests.waiting import wait_until

MODULE = """
from outbox import enqueue_event, publish
from outbox.consumers import consumer


@consumer("invoices", topics=["order.*"], deduplicate=True)
def invoices(event):
    with open("seen", "a") as file:
        print(event.id, file=file)
"""


@pytest.fixture
def url(postgresql_url: str) -> str:
    """The URL of a broker without tables, in a schema whose name needs quotes."""
    engine = create_engine(postgresql_url, poolclass=NullPool)
    with engine.begin() as connection:
        connection.exec_driver_sql('CREATE SCHEMA "the Events"')
    return f"{postgresql_url}?schema=the+Events"


@pytest.mark.parametrize(
    "arguments",
    [
        ["parked", "list"],
        ["parked", "replay"],
        ["parked", "purge", "--yes"],
        ["status"],
        ["migrate-transport", "{url}", "{file}"],
        ["migrate-transport", "{file}", "{url}"],
    ],
    ids=" ".join,
)
def test_a_missing_table_is_wrong_usage_and_not_an_unreachable_server(
    url: str, tmp_path: Path, arguments: list[str]
) -> None:
    file = f"sqlite:///{tmp_path}/outbox.db"
    with Publisher(file) as publisher:
        publisher.publish(events_for(publisher, ["order.placed"]))
    filled = [argument.format(url=url, file=file) for argument in arguments]
    variables = {"OUTBOX_URL": url, "OUTBOX_DATABASE_URL": url}
    done = run_outbox(*filled, variables=variables)
    assert "does not exist" in done.stderr
    assert done.returncode == exit_codes.USAGE


@pytest.mark.one_python
@pytest.mark.slow
def test_the_commands_work_on_a_server(url: str, tmp_path: Path) -> None:
    variables = {"OUTBOX_URL": url}
    created = run_outbox("sql", "create", variables=variables)
    assert created.returncode == exit_codes.SUCCESS, created.stderr

    with Publisher(url) as publisher:
        early = events_for(publisher, ["order.placed"] * 2)
        assert publisher.publish(early).parked == tuple(early)
        listed = run_outbox("parked", "list", "--json", variables=variables)
        assert [json.loads(line)["id"] for line in listed.stdout.splitlines()] == [
            event.id for event in early
        ]
        diagnosed = run_outbox("doctor", variables=variables)
        assert "2 events without a queue in 'outbox.unroutable'" in diagnosed.stdout
        assert "OBX201 error" not in diagnosed.stdout

        (tmp_path / "work.py").write_text(MODULE)
        seen = tmp_path / "seen"
        with (
            (tmp_path / "log").open("w") as log,
            subprocess.Popen(
                [sys.executable, "-m", "outbox.consumers", "work", "-p", "2"],
                cwd=tmp_path,
                env={**os.environ, **variables},
                stderr=log,
            ) as child,
        ):
            try:
                later = events_for(publisher, ["order.paid"], unroutable="ignore")
                wait_until(lambda: publisher.publish(later, keep=False).published, 20)
                replayed = run_outbox("parked", "replay", variables=variables)
                assert "2 messages, 2 replayed, 0 failed" in replayed.stdout, replayed.stderr
                expected = {event.id for event in [*early, *later]}
                wait_until(lambda: seen.exists() and set(seen.read_text().split()) == expected, 20)
                child.send_signal(signal.SIGTERM)
                assert child.wait(20) == exit_codes.SUCCESS
            finally:
                if child.poll() is None:
                    child.kill()
    ids = seen.read_text().split()
    assert len(ids) == len(set(ids))
    status = run_outbox("status", "--json", variables=variables)
    assert status.returncode == exit_codes.SUCCESS, status.stderr
