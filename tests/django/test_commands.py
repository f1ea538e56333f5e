"""``manage.py outbox``, in this process and in processes of a project's folder."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command
from django.db import connections
from django.test import override_settings

from outbox import Event, Publisher
from outbox.django import enqueue_event
from outbox.django.commanding import _BesideRelay
from outbox.django.connecting import engine_of
from outbox.sql import Store
from tests.django.conftest import sqlite_settings, use_database
from tests.django.project_folder import ProjectFolder

pytestmark = pytest.mark.one_python

_STORE = """\
from django.conf import settings
settings.OUTBOX = {**settings.OUTBOX, "AFTER_COMMIT": "nothing"}
from outbox import enqueue_event
print(enqueue_event({}, "order.placed").id)
"""


_DIES = """\
import os
import signal
from pathlib import Path

from django.conf import settings
from django.db import transaction

from outbox import enqueue_event
from outbox.consumers import consumer


@consumer("mail", topics=["order.*"], deduplicate=True)
def send_mail(event):
    with transaction.atomic():
        enqueue_event({}, "mail.sent")
    with open(Path(settings.BASE) / "mails.txt", "a") as mails:
        mails.write(f"{event.id}\\n")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def outbox(*arguments: str) -> str:
    out = io.StringIO()
    call_command("outbox", *arguments, stdout=out)
    return out.getvalue()


def bury(event: Event, reason: str = "NOT_FOUND") -> None:
    store = Store(engine_of("default"))
    for claimed in store.claim(10):
        if claimed.event.id == event.id:
            store.bury([claimed], reason)
        else:
            store.release([claimed])


def wait_until(condition: Callable[[], object], seconds: float = 40) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.1)


@pytest.mark.usefixtures("databases")
class TestInThisProcess:
    @pytest.fixture(autouse=True)
    def without_publisher(self, outbox_setting: Any) -> None:
        outbox_setting()

    def test_the_store_is_shown_and_any_other_alias(self) -> None:
        enqueue_event({}, "order.placed")
        assert outbox("status").splitlines()[0].startswith("1 event waiting")
        assert outbox("status", "--database", "other").splitlines()[0] == "0 events waiting"

    def test_dead_events_are_shown_made_due_and_deleted(self) -> None:
        event = enqueue_event({}, "order.placed")
        bury(event)
        assert event.id in outbox("retry", "--all", "--dry-run")
        assert outbox("retry", "--reason", "NOT_FOUND") == "1 event due again\n"
        bury(event)
        assert outbox("purge", "--id", event.id, "--yes") == "1 event deleted\n"
        assert outbox("status", "--json").startswith('{"waiting": 0')

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            (["status", "--database", "nowhere"], "'nowhere' is not in DATABASES"),
            (["retry"], "select events with --id, --reason, --target, or --all"),
            (["relay", "--once"], r"set OUTBOX\['URL'\] in the settings, or OUTBOX_URL"),
            (["parked", "list"], r"set OUTBOX\['URL'\] in the settings, or OUTBOX_URL"),
            (["tail"], r"set OUTBOX\['URL'\] in the settings, or OUTBOX_URL"),
        ],
    )
    def test_an_error_is_one_line_with_the_exit_code(
        self, arguments: list[str], text: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("OUTBOX_URL", raising=False)
        with pytest.raises(CommandError, match=text) as raised:
            outbox(*arguments)
        assert raised.value.returncode == 2
        assert "\n" not in str(raised.value)

    def test_without_the_table_the_error_names_the_migration(self) -> None:
        call_command("migrate", "outbox_events", "zero", verbosity=0)
        with pytest.raises(CommandError, match=r"manage\.py migrate outbox_events --database def"):
            outbox("status")

    def test_the_doctor_looks_at_the_projects_broker_database_and_consumers(
        self, outbox_setting: Any, tmp_path: Path
    ) -> None:
        outbox_setting(URL=f"sqlite:///{tmp_path}/broker.db")
        report = json.loads(outbox("doctor", "--json", "--fail-on", "error"))
        assert {"OBX101", "OBX201", "OBX204", "OBX206"} <= set(report["passed"])
        assert not [each for each in report["findings"] if not each["code"].startswith("OBX3")]

        call_command("migrate", "outbox_events", "zero", verbosity=0)
        with pytest.raises(SystemExit, match="1"):
            outbox("doctor", "--json", "--fail-on", "error")

    def test_the_doctor_misses_no_database_where_nothing_is_stored(
        self, outbox_setting: Any, tmp_path: Path
    ) -> None:
        outbox_setting(STORE=None, URL=f"sqlite:///{tmp_path}/broker.db")
        report = json.loads(outbox("doctor", "--json", "--fail-on", "error"))
        assert not [each for each in report["findings"] if each["code"].startswith("OBX2")]
        [reason] = [each["reason"] for each in report["not_checked"] if each["code"] == "OBX201"]
        assert "OUTBOX['STORE'] is None" in reason

    def test_where_nothing_is_stored_a_database_must_be_named(self, outbox_setting: Any) -> None:
        outbox_setting(STORE=None)
        with pytest.raises(CommandError, match="--database ALIAS"):
            outbox("status")
        assert outbox("status", "--database", "default")


def test_consume_runs_the_apps_consumers_with_a_relay_beside_them(tmp_path: Path) -> None:
    project = ProjectFolder(tmp_path)
    arguments = ("-p", "1", "--isolate", "process", "--settings", "config.settings")
    with project.running("outbox", "consume", *arguments) as process:
        wait_until(project.consumes)
        stored = project.shell(_STORE).strip()
        wait_until(lambda: project.mails)
        assert process.poll() is None
    assert project.mails == [f"{stored} config.settings"]
    assert process.returncode == 0


@pytest.mark.slow
def test_without_its_relay_consume_leaves_what_is_stored_to_another(tmp_path: Path) -> None:
    project = ProjectFolder(tmp_path)
    with project.running("outbox_consume", "--no-relay") as process:
        wait_until(project.consumes)
        stored = project.shell(_STORE).strip()
        time.sleep(2.5)  # a relay polls every 2 s
        assert project.mails == []
        done = project.run("outbox", "relay", "--once")
        assert done.stdout == "1 event published\n", done.stderr
        wait_until(lambda: project.mails)
    assert project.mails == [f"{stored} config.settings"]
    assert process.returncode == 0


@pytest.mark.slow
def test_what_a_killed_handler_has_committed_is_not_done_again(tmp_path: Path) -> None:
    project = ProjectFolder(tmp_path)
    (tmp_path / "site" / "mail" / "consumers.py").write_text(_DIES)
    settings = tmp_path / "site" / "config" / "settings.py"
    settings.write_text(settings.read_text() + 'OUTBOX["AFTER_COMMIT"] = "nothing"\n')
    with project.running("outbox", "consume", "--no-relay", "-p", "1"):
        wait_until(project.consumes)
        stored = project.shell(_STORE).strip()
        assert project.run("outbox", "relay", "--once").stdout == "1 event published\n"
        wait_until(lambda: "duplicate" in project.log)
    assert project.mails == [stored]
    assert "killed by SIGKILL" in project.log
    assert project.run("outbox", "status").stdout.startswith("1 event waiting")


@pytest.mark.slow
def test_consume_reloads_changed_code(tmp_path: Path) -> None:
    project = ProjectFolder(tmp_path)
    path = tmp_path / "site" / "mail" / "consumers.py"
    with project.running("outbox", "consume", "--reload"):
        wait_until(project.consumes)
        project.shell(_STORE)
        wait_until(lambda: len(project.mails) == 1)
        path.write_text(path.read_text().replace("{event.id}", "changed"))
        time.sleep(1)
        project.shell(_STORE)
        wait_until(lambda: len(project.mails) == 2)
    assert project.mails[1].startswith("changed")


def test_a_relay_beside_the_worker_waits_for_its_database(tmp_path: Path) -> None:
    before = dict(connections.settings)["default"]
    folder = tmp_path / "away"
    use_database("default", sqlite_settings(folder / "shop.sqlite3"))
    publisher = Publisher("memory://")
    relay = _BesideRelay("default", publisher)
    try:
        relay.begin()
        assert relay._relay is None
        folder.mkdir()
        call_command("migrate", verbosity=0, interactive=False, run_syncdb=True)
        wait_until(lambda: relay._relay)
        with override_settings(OUTBOX={}):
            enqueue_event({}, "order.placed")
        wait_until(lambda: relay._relay is not None and relay._relay.stats().published)
    finally:
        relay.end()
        publisher.close(0)
        use_database("default", before)


def test_the_doctor_finds_the_apps_consumers(tmp_path: Path) -> None:
    done = ProjectFolder(tmp_path).run("outbox", "doctor", "--json", "--fail-on", "error")
    report = json.loads(done.stdout)
    assert done.returncode == 0, done.stderr
    assert "OBX201" in report["passed"]
    assert [each["text"] for each in report["findings"]] == [
        "the consumer send_mail() has no timeout: a handler that hangs keeps its thread for ever"
    ]


def test_consume_says_what_it_lacks(tmp_path: Path) -> None:
    project = ProjectFolder(tmp_path)
    settings = tmp_path / "site" / "config" / "settings.py"
    complete = settings.read_text()
    settings.write_text(complete.replace("OUTBOX = ", "_ = "))
    done = project.run("outbox", "consume")
    assert done.returncode == 2
    assert done.stderr.startswith("manage.py outbox consume: no broker is known: set OUTBOX['URL']")
    settings.write_text(complete.replace('"mail"', '"django.contrib.contenttypes"'))
    done = project.run("outbox", "consume", "-p", "2")
    assert done.returncode == 2
    assert (
        "no app of INSTALLED_APPS has a consumer or a task in its modules consumers and tasks"
        in done.stderr
    )


def test_init_writes_a_consumer_that_the_project_finds(tmp_path: Path) -> None:
    project = ProjectFolder(tmp_path)
    consumers = tmp_path / "site" / "mail" / "consumers.py"
    done = project.run("outbox", "init", "invoices", "--folder", "mail")
    assert done.returncode == 2
    assert "already there: mail/consumers.py; nothing was written" in done.stderr
    consumers.unlink()
    done = project.run("outbox", "init", "invoices", "--folder", "mail", "--topic", "order.*")
    assert done.returncode == 0, done.stderr
    assert "class Invoices(Consumer)" in consumers.read_text()
    unit = (tmp_path / "site" / "outbox-invoices.service").read_text()
    assert "manage.py outbox consume -p 1" in unit
    done = project.run("test", "mail")
    assert "Ran 2 tests" in done.stderr
    assert done.returncode == 0, done.stderr
    report = json.loads(project.run("outbox", "doctor", "--json").stdout)
    assert report["findings"] == []
    assert "OBX301" in report["passed"]
