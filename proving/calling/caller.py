"""A script that calls tasks until SIGTERM, in units of work and in transactions, and cancels some.

In units some are collected, others are stored in the database's transactions, and relays publish
them.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time
from typing import Any

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from outbox import CollectorFull, auto_publishing, configure
from outbox.system.signals import Signals
from outbox.tasks import TaskHandle
from proving.calling import called
from proving.programs.unit import journal, pace

HISTORY = journal("caller")
PACE = pace("caller")
TASKS: Any = (called.unkept, called.kept, called.awaited, called.committing, called.in_session)
WORK = {"fail": 0.05, "retry": 0.1, "follow": 0.85}
DELAY = (1.5, 4.0)  # seconds at least and at most
DELAYED = 0.2
CANCELLED = 0.5  # of the delayed, and a tenth of the others
LANES = 2
PAUSE = 0.06  # seconds at most between two units


class Failed(Exception):
    """The unit of work fails on purpose."""


class Lane:
    """A sequence of units of work that call tasks."""

    def __init__(self, name: str) -> None:
        self._name = f"{HISTORY.by}/{name}"
        self.chance = random.Random(self._name)
        self._units = 0
        self._calls = 0
        self._to_cancel: list[tuple[str, TaskHandle[Any]]] = []

    def next_unit(self) -> str:
        """Return the name of the next unit."""
        self._units += 1
        self._to_cancel.clear()
        return f"{self._name}/{self._units}"

    def call(self, unit: str, **options: Any) -> None:
        """Call one to three tasks, and write that down."""
        for _ in range(self.chance.randint(1, 3)):
            self._call(unit, options)

    def _call(self, unit: str, options: dict[str, Any]) -> None:
        self._calls += 1
        key = f"{self._name}/call{self._calls}"
        task = self.chance.choice(TASKS)
        [work] = self.chance.choices([*WORK], [*WORK.values()])
        facts: dict[str, Any] = {"work": work, "task": task.__name__}
        is_delayed = self.chance.random() < DELAYED
        if is_delayed:
            options = {**options, "delay": self.chance.uniform(*DELAY)}
            facts["not_before"] = time.time() + options["delay"]
        if "session" in options:
            facts["stored"] = True
        if task in (called.committing, called.in_session):
            facts["effect"] = True
        handle = task.options(**options).later(key, work)
        HISTORY.write("intent", unit=unit, key=key, id=handle.id, **facts)
        if task is not called.unkept and self.chance.random() < (CANCELLED if is_delayed else 0.1):
            self._to_cancel.append((key, handle))

    def cancel(self) -> None:
        """Cancel some calls of the last unit, and write down which won't run."""
        for key, handle in self._to_cancel:
            HISTORY.write("cancelling", key=key)
            since = time.time()
            with contextlib.suppress(SQLAlchemyError):
                if handle.cancel():
                    HISTORY.write("cancelled", key=key, since=since)

    def cancel_one_collected(self) -> None:
        """Take a call out of the open unit."""
        if self._to_cancel and self.chance.random() < 0.2:
            key, handle = self._to_cancel.pop()
            HISTORY.write("cancelling", key=key)
            since = time.time()
            if handle.cancel():
                HISTORY.write("cancelled", key=key, since=since)


def collect(lane: Lane) -> None:
    """Call tasks in a unit of work."""
    unit = lane.next_unit()
    try:
        with auto_publishing() as block:
            lane.call(unit)
            lane.cancel_one_collected()
            if lane.chance.random() < 0.3:
                HISTORY.write("rollback", unit=unit)
                raise Failed
            HISTORY.write("commit", unit=unit)
    except Failed:
        return
    except CollectorFull:
        HISTORY.write("rollback", unit=unit)
        time.sleep(0.5)
        return
    if block.report is not None and block.report.published:
        HISTORY.write("confirm", keys=[each.payload["args"][0] for each in block.report.published])
    lane.cancel()


def store(lane: Lane, engine: Engine) -> None:
    """Call tasks in a transaction; the database knows whether it was committed."""
    unit = lane.next_unit()
    with contextlib.suppress(SQLAlchemyError, Failed), Session(engine) as session:
        session.execute(text("INSERT INTO units VALUES (:name)"), {"name": unit})
        lane.call(unit, session=session)
        if lane.chance.random() < 0.3:
            raise Failed
        session.commit()
        lane.cancel()


def main() -> None:
    """Run the lanes until SIGTERM."""
    configure()
    engine = create_engine(
        os.environ["OUTBOX_DATABASE_URL"], pool_pre_ping=True, connect_args={"connect_timeout": 2}
    )
    stopping = threading.Event()
    signals = Signals(second_exits=None)
    signals.begin()

    def run(lane: Lane, *storing: Engine) -> None:
        while not stopping.is_set():
            store(lane, *storing) if storing else collect(lane)
            stopping.wait(lane.chance.random() * PAUSE * PACE.factor)

    threads = [threading.Thread(target=run, args=(Lane(f"lane{n}"),)) for n in range(LANES)]
    threads.append(threading.Thread(target=run, args=(Lane("stored"), engine), daemon=True))
    for thread in threads:
        thread.start()
    while not signals.asked:
        time.sleep(0.05)
    stopping.set()
    for thread in threads:
        thread.join(30)


if __name__ == "__main__":
    main()
