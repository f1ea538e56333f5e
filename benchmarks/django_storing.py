"""The cost of storing events through Django's connection, compared with saving models.

python -m benchmarks.django_storing [--check]

A private PostgreSQL, a private MariaDB, and a SQLite file. Each transaction enqueues ten events, or
creates ten objects of the same size. Nothing is published, so that what happens after the commit
isn't measured. Both take turns; the median of the pairs' ratios counts.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import django
import pymysql
from django.conf import settings
from django.core.management import call_command
from django.db import connections, models, transaction
from django.test.utils import CaptureQueriesContext
from sqlalchemy import make_url

from benchmarks.peers import BODY, TARGET
from benchmarks.tables import Bound, median, print_bounds, progress
from outbox.django import enqueue_event
from outbox.testing.databases.mariadb import PrivateMariaDB
from outbox.testing.databases.postgresql import PrivatePostgreSQL

_EVENTS = 10
_TRANSACTIONS = 30
_ROUNDS = 41
_PAYLOAD = json.loads(BODY)


_VENDORS = {"postgresql": "PostgreSQL", "mariadb": "MariaDB", "default": "SQLite"}


def server_settings(engine: str, url: str) -> dict[str, Any]:
    """Return Django's settings of a database of a private server."""
    parts = make_url(url)
    return {
        "ENGINE": f"django.db.backends.{engine}",
        "NAME": parts.database,
        "USER": parts.username,
        "HOST": parts.host,
        "PORT": parts.port,
    }


def set_up(postgresql: str, mariadb: str, folder: Path) -> Any:
    """Set Django up with a database of each vendor; return the model to compare with."""
    pymysql.install_as_MySQLdb()
    settings.configure(
        INSTALLED_APPS=["outbox.django"],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.sqlite3",
                "NAME": folder / "default.sqlite3",
                "OPTIONS": {"transaction_mode": "IMMEDIATE"},
            },
            "postgresql": server_settings("postgresql", postgresql),
            "mariadb": server_settings("mysql", mariadb),
        },
        OUTBOX={"URL": "memory://", "AFTER_COMMIT": "nothing"},
        USE_TZ=True,
    )
    django.setup()

    class Plain(models.Model):
        body = models.BinaryField()

        class Meta:
            app_label = "benchmarks"

    for alias in settings.DATABASES:
        call_command("migrate", database=alias, verbosity=0)
        with connections[alias].schema_editor() as editor:
            editor.create_model(Plain)
    return Plain


def seconds(alias: str, act: Callable[[], object]) -> float:
    """Return the seconds for some transactions of ten calls each."""
    begin = time.perf_counter()
    for _ in range(_TRANSACTIONS):
        with transaction.atomic(using=alias):
            for _ in range(_EVENTS):
                act()
    return time.perf_counter() - begin


def cost(alias: str, plain: Any) -> float:
    """Return the ratio of ten events to ten objects."""

    def create() -> object:
        return plain.objects.using(alias).create(body=BODY)

    def enqueue() -> object:
        return enqueue_event(_PAYLOAD, TARGET, using=alias)

    with transaction.atomic(using=alias), CaptureQueriesContext(connections[alias]) as queries:
        for _ in range(_EVENTS):
            enqueue()
    assert len(queries) == _EVENTS, f"{len(queries)} queries for {_EVENTS} events"
    ratios, times = [], []
    for number in range(_ROUNDS + 2):
        order = (create, enqueue) if number % 2 else (enqueue, create)
        taken = {act: seconds(alias, act) for act in order}
        if number >= 2:
            ratios.append(taken[enqueue] / taken[create])
            times.append(taken[create])
    progress(f"{alias}: ten objects {median(times) / _TRANSACTIONS * 1e3:.2f} ms")
    return median(ratios)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    options = parser.parse_args()
    with (
        PrivatePostgreSQL() as postgresql,
        PrivateMariaDB() as mariadb,
        tempfile.TemporaryDirectory() as folder,
    ):
        plain = set_up(postgresql.url, mariadb.url, Path(folder))
        bounds = [
            Bound(f"{name}: ten events, of ten objects", cost(alias, plain), 1.25, at_most=True)
            for alias, name in _VENDORS.items()
        ]
        connections.close_all()
    kept = print_bounds(bounds)
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    raise SystemExit(main())
