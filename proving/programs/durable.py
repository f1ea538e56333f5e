"""A script whose threads store events in their database's transactions, until SIGTERM.

Some transactions are SERIALIZABLE, and some belong to tenants, whose tables are in a schema each,
and whose events are delayed now and then.
"""

from __future__ import annotations

import contextlib
import os
import random
import threading
import time

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from outbox import configure
from outbox.system.signals import Signals
from proving.database import TENANTS
from proving.programs.unit import Unit, does, journal, pace

HISTORY = journal("durable")
PACE = pace("durable")
LANES = 3
PAUSE = 0.03  # seconds at most between two units


class Failed(Exception):
    """The unit of work fails on purpose."""


class Lane:
    """A sequence of transactions whose events have the same key."""

    def __init__(self, name: str, engine: Engine, *, looks: bool = False, **habits: bool) -> None:
        self.name = f"{HISTORY.by}/{name}"
        self._looks = looks  # at what is stored, so that it conflicts with others
        self._habits = habits
        self.chance = random.Random(self.name)
        self._engine = engine
        self._units = 0
        self._seq = 0

    def work(self) -> None:
        """Run one transaction; the database knows whether it was committed."""
        with contextlib.suppress(SQLAlchemyError, Failed), Session(self._engine) as session:
            if self._looks:
                session.execute(text("SELECT count(*) FROM outbox_events"))
            unit = self._begin(session)
            self._fill(unit)
            if self.chance.random() < 0.2:
                self._in_savepoint(session)
            if self.chance.random() < 0.3:
                raise Failed
            session.commit()

    def _begin(self, session: Session) -> Unit:
        self._units += 1
        name = f"{self.name.rpartition('/')[2]}/{self._units}"
        unit = Unit(HISTORY, name, self.chance, **self._habits, session=session, key=self.name)
        # This row shows at the end whether the unit was committed.
        session.execute(text("INSERT INTO units VALUES (:name)"), {"name": unit.name})
        return unit

    def _fill(self, unit: Unit) -> None:
        for _ in range(self.chance.randint(1, 4)):
            self._seq += 1
            unit.enqueue(self.name, self._seq)

    def _in_savepoint(self, session: Session) -> None:
        with contextlib.suppress(Failed), session.begin_nested():
            self._fill(self._begin(session))
            if self.chance.random() < 0.5:
                raise Failed


def run(lane: Lane, stopping: threading.Event) -> None:
    while not stopping.is_set():
        lane.work()
        stopping.wait(lane.chance.random() * PAUSE * PACE.factor)


def lanes(engine: Engine) -> list[Lane]:
    """Return the lanes of the plain application, and of its variations."""
    found = [Lane(f"lane{number}", engine) for number in range(LANES)]
    if does("serializable"):
        strict = engine.execution_options(isolation_level="SERIALIZABLE")
        found += [Lane(f"strict{number}", strict, looks=True, once=True) for number in range(LANES)]
    if os.environ["PROVE_TENANTS"]:
        for tenant in TENANTS:
            its = engine.execution_options(schema_translate_map={None: tenant})
            found.append(Lane(tenant, its, delays=True))
    return found


def main() -> None:
    configure(after_commit="notify" if does("notify") else "publish")
    engine = create_engine(
        os.environ["OUTBOX_DATABASE_URL"], pool_pre_ping=True, connect_args={"connect_timeout": 2}
    )
    stopping = threading.Event()
    signals = Signals(second_exits=None)
    signals.begin()
    threads = [
        threading.Thread(target=run, args=(lane, stopping), daemon=True) for lane in lanes(engine)
    ]
    for thread in threads:
        thread.start()
    while not signals.asked:
        time.sleep(0.05)
    stopping.set()
    for thread in threads:
        thread.join(30)


if __name__ == "__main__":
    main()
