"""A Django script whose threads store events in Django's transactions, until SIGTERM.

Some savepoints are rolled back by an exception, some by hand, and some transactions by
``set_rollback()``.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time

import django
from django.conf import settings
from django.db import Error, connection, transaction
from sqlalchemy import make_url

from outbox.system.signals import Signals
from proving.programs.unit import Unit, does, journal, pace

HISTORY = journal("django")
PACE = pace("django")
LANES = 3
PAUSE = 0.03  # seconds at most between two units


class Failed(Exception):
    """The unit of work fails on purpose."""


class Lane:
    """A sequence of transactions whose events have the same key."""

    def __init__(self, name: str) -> None:
        self.name = f"{HISTORY.by}/{name}"
        self.chance = random.Random(self.name)
        self._units = 0
        self._seq = 0

    def work(self) -> None:
        """Run one transaction; the database knows whether it was committed."""
        try:
            with contextlib.suppress(Failed), transaction.atomic():
                self._fill(self._begin())
                if self.chance.random() < 0.2:
                    self._in_savepoint()
                if self.chance.random() < 0.2:
                    self._by_hand()
                ending = self.chance.random()
                if ending < 0.2:
                    raise Failed
                if ending < 0.3:
                    transaction.set_rollback(True)
        except Error:
            with contextlib.suppress(Error):
                connection.close()

    def _begin(self) -> Unit:
        self._units += 1
        name = f"{self.name.rpartition('/')[2]}/{self._units}"
        unit = Unit(HISTORY, name, self.chance, using="default", key=self.name)
        # This row shows at the end whether the unit was committed.
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO units VALUES (%s)", [unit.name])
        return unit

    def _fill(self, unit: Unit) -> None:
        for _ in range(self.chance.randint(1, 4)):
            self._seq += 1
            unit.enqueue(self.name, self._seq)

    def _in_savepoint(self) -> None:
        with contextlib.suppress(Failed), transaction.atomic():
            self._fill(self._begin())
            if self.chance.random() < 0.5:
                raise Failed

    def _by_hand(self) -> None:
        savepoint = transaction.savepoint()
        self._fill(self._begin())
        if self.chance.random() < 0.5:
            transaction.savepoint_rollback(savepoint)


def run(lane: Lane, stopping: threading.Event) -> None:
    while not stopping.is_set():
        lane.work()
        stopping.wait(lane.chance.random() * PAUSE * PACE.factor)
    connection.close()


def set_up() -> None:
    """Set Django up with the application's database, and with the broker of the environment."""
    url = make_url(os.environ["OUTBOX_DATABASE_URL"])
    settings.configure(
        INSTALLED_APPS=["outbox.django"],
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": url.database,
                "USER": url.username,
                "PASSWORD": url.password or "",
                "HOST": url.host,
                "PORT": url.port,
                "CONN_MAX_AGE": None,
                "OPTIONS": {"connect_timeout": 2},
            }
        },
        OUTBOX={"AFTER_COMMIT": "notify" if does("notify") else "publish"},
        USE_TZ=True,
    )
    django.setup()


def main() -> None:
    set_up()
    stopping = threading.Event()
    signals = Signals(second_exits=None)
    signals.begin()
    lanes = [Lane(f"lane{number}") for number in range(LANES)]
    threads = [threading.Thread(target=run, args=(lane, stopping), daemon=True) for lane in lanes]
    for thread in threads:
        thread.start()
    while not signals.asked:
        time.sleep(0.05)
    stopping.set()
    for thread in threads:
        thread.join(30)


if __name__ == "__main__":
    main()
