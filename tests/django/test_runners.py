"""The application's tests, run as Django teams run them: none reaches the broker of ``OUTBOX``."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from outbox.testing.databases.postgresql import PrivatePostgreSQL
from tests.amqp import Inspector
from tests.conftest import new_database
from tests.django.conftest import postgresql_settings
from tests.django.running import python_path

ROOT = Path(__file__).parents[2]
CASES = "tests.django.shop.cases"

SETTINGS = """
import json, os

SECRET_KEY = "tests"
INSTALLED_APPS = ["django.contrib.contenttypes", "outbox.django", "tests.django.shop"]
DATABASES = {"default": json.loads(os.environ["DATABASE"])}
OUTBOX = {"URL": os.environ["BROKER"], "DECLARE": "create"}
USE_TZ = True
"""
MANAGE = """
import multiprocessing, os, sys

os.environ["DJANGO_SETTINGS_MODULE"] = "shop_settings"

if __name__ == "__main__":
    if "START" in os.environ:
        multiprocessing.set_start_method(os.environ["START"])
    from django.core.management import execute_from_command_line
    execute_from_command_line(sys.argv)
"""
IN_MEMORY = {"ENGINE": "django.db.backends.sqlite3", "NAME": "shop.sqlite3"}


@pytest.fixture
def heard(inspector: Inspector) -> str:
    """A queue that gets every event of the default exchange."""
    return inspector.queue("heard", "outbox")


class Project:
    """A folder with ``manage.py``."""

    def __init__(self, folder: Path, broker: str) -> None:
        self.folder = folder
        self.environment = {
            **{name: os.environ[name] for name in os.environ if "OUTBOX" not in name},
            "PYTHONPATH": python_path(),
            "BROKER": broker,
            "DATABASE": json.dumps(IN_MEMORY),
        }
        (folder / "shop_settings.py").write_text(SETTINGS)
        (folder / "manage.py").write_text(MANAGE)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", *arguments],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )


@pytest.fixture
def project(tmp_path: Path, amqp_url: str) -> Project:
    return Project(tmp_path, amqp_url)


@pytest.mark.parametrize("start", [None, "fork", "spawn"])
def test_manage_py_test(
    project: Project, start: str | None, inspector: Inspector, heard: str
) -> None:
    arguments = ["manage.py", "test", CASES]
    if start is not None:
        project.environment["START"] = start
        arguments += ["--parallel", "2"]
    done = project.run(*arguments)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "Warning" not in done.stderr
    assert "OK" in done.stderr
    assert inspector.count(heard) == 0


def test_the_broker_would_have_heard(project: Project, inspector: Inspector, heard: str) -> None:
    source = "from outbox import enqueue_event; enqueue_event({}, 'order.refused', using=None)"
    done = project.run("manage.py", "shell", "-c", source)
    assert done.returncode == 0, done.stderr
    assert inspector.count(heard) == 1


LIVE = """
import os

from django.db import transaction
from django.test import TransactionTestCase
from outbox.django import enqueue_event
from outbox.testing import live
from tests.django.shop.models import Order


class LiveCase(TransactionTestCase):
    def test_what_is_committed_is_published(self):
        with live(f"sqlite:///{os.getcwd()}/events.db", "this test") as events:
            with transaction.atomic():
                order = Order.objects.create(number=7)
                enqueue_event({"number": 7}, "order.placed")
                events.assert_stored("order.placed")
            events.assert_published("order.placed", {"number": 7})
            events.assert_enqueued("order.placed", times=1)
            with transaction.atomic():
                enqueue_event({}, "order.shipped")
                transaction.set_rollback(True)
            events.assert_cleared("order.shipped")
            assert events.stored == ()
"""


@pytest.mark.slow
def test_the_test_database_can_be_dropped(
    project: Project, postgresql: PrivatePostgreSQL, inspector: Inspector, heard: str
) -> None:
    (project.folder / "test_live.py").write_text(LIVE)
    with new_database(postgresql) as url:
        project.environment["DATABASE"] = json.dumps(postgresql_settings(url))
        done = project.run("manage.py", "test", CASES, "test_live")
        again = project.run("manage.py", "test", "test_live", "--noinput")
    assert done.returncode == again.returncode == 0, done.stderr[-4000:] + again.stderr[-4000:]
    assert "already exists" not in again.stderr
    assert "Warning" not in done.stderr + again.stderr
    assert inspector.count(heard) == 0


FUNCTIONS = """
import pytest
from django.db import transaction
from outbox import enqueue_event
from tests.django.shop.cases import Invoices, place_order


def test_in_a_transaction(db, collected_events, django_capture_on_commit_callbacks):
    place_order(7)
    collected_events.assert_enqueued("order.placed", {"number": 7})
    with pytest.raises(AssertionError, match="django_capture_on_commit_callbacks"):
        collected_events.assert_published("order.placed")
    with django_capture_on_commit_callbacks(execute=True):
        place_order(8)
    collected_events.assert_published("order.placed", {"number": 8}, times=1)
    collected_events.deliver_all(Invoices)
    collected_events.assert_enqueued("invoice.sent", {"number": 8})


@pytest.mark.django_db
def test_the_fixtures_may_come_in_any_order(collected_events):
    with pytest.raises(KeyError), transaction.atomic():
        place_order(7)
        raise KeyError
    collected_events.assert_nothing_enqueued()
    collected_events.assert_cleared("order.placed")


def test_a_commit(collected_events, transactional_db):
    place_order(7)
    collected_events.assert_published("order.placed", {"number": 7})


def test_settings(db, collected_events, settings):
    settings.OUTBOX = {"STORE": None, "EXCHANGE": "shop"}
    enqueue_event({}, "order.placed")
    collected_events.assert_enqueued("order.placed", exchange="shop")


def test_without_the_database(collected_events):
    with pytest.raises(RuntimeError, match="Database access not allowed"):
        enqueue_event({}, "order.placed")
    collected_events.assert_nothing_enqueued()


def test_events_that_are_not_looked_at(db):
    place_order(7)
    enqueue_event({}, "order.refused", using=None)
"""


@pytest.mark.parametrize(
    "options", [(), ("--nomigrations",), ("-o", "outbox_always=true", "-k", "not Unobserved")]
)
def test_pytest_django(
    project: Project, options: tuple[str, ...], inspector: Inspector, heard: str
) -> None:
    (project.folder / "test_shop.py").write_text((ROOT / "tests/django/shop/cases.py").read_text())
    (project.folder / "test_functions.py").write_text(FUNCTIONS)
    arguments: list[Any] = ["-m", "pytest", "-q", "-p", "no:asyncio", "--ds", "shop_settings"]
    done = project.run(*arguments, *options)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    assert "warning" not in done.stdout
    assert inspector.count(heard) == 0
