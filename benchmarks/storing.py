"""The cost of storing events in a transaction, compared with the same rows as plain objects.

python -m benchmarks.storing [--check]

One private PostgreSQL. Each transaction inserts ten events, or ten plain mapped objects with the
values of the events' rows into the same table. The publisher is in memory, so that what happens
after the commit isn't measured.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session, registry

import outbox.sql
from benchmarks.peers import BODY, EXCHANGE, TARGET
from benchmarks.tables import Bound, median, print_bounds, progress
from outbox import configure, enqueue_event
from outbox.event import Event
from outbox.messages.rows import values_of
from outbox.testing.databases.postgresql import PrivatePostgreSQL

_EVENTS = 10
_TRANSACTIONS = 100
_ROUNDS = 9
_PAYLOAD = json.loads(BODY)


class Plain:
    """A row as an application would map it."""

    def __init__(self, **values: Any) -> None:
        for name, value in values.items():
            setattr(self, name, value)


registry().map_imperatively(Plain, outbox.sql.events)


def plain(session: Session) -> None:
    """Add ten plain objects."""
    event = Event(id="x" * 36, target=TARGET, exchange=EXCHANGE, body=BODY)
    values = values_of(event)
    session.add_all([Plain(**values) for _ in range(_EVENTS)])


def events(session: Session) -> None:
    """Enqueue ten events."""
    for _ in range(_EVENTS):
        enqueue_event(_PAYLOAD, TARGET, session=session)


def seconds(engine: Engine, act: Callable[[Session], None]) -> float:
    """Return the average seconds per transaction."""
    begin = time.perf_counter()
    for _ in range(_TRANSACTIONS):
        with Session(engine) as session:
            act(session)
            session.commit()
    return (time.perf_counter() - begin) / _TRANSACTIONS


def cost(engine: Engine, after_commit: Any) -> float:
    """Return the ratio of a transaction with ten events to one with ten plain objects."""
    configure("memory://", after_commit=after_commit)
    taken: dict[Callable[[Session], None], list[float]] = {plain: [], events: []}
    for number in range(_ROUNDS + 1):
        for act in (plain, events):
            found = seconds(engine, act)
            outbox.sql.drain()
            progress(f"round {number}, {after_commit}, {act.__name__}: {found * 1e3:.2f} ms")
            if number:
                taken[act].append(found)
        with engine.begin() as connection:
            connection.execute(text("TRUNCATE outbox_events"))
    before, with_events = median(taken[plain]), median(taken[events])
    print(
        f"after_commit={after_commit!r}: ten plain objects {before * 1e3:.2f} ms, "
        f"ten events {with_events * 1e3:.2f} ms"
    )
    return with_events / before


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    options = parser.parse_args()
    with PrivatePostgreSQL() as server:
        engine = create_engine(server.url)
        outbox.sql.metadata.create_all(engine)
        bounds = [
            Bound("ten events: of ten plain objects", cost(engine, "nothing"), 1.3, at_most=True),
        ]
        # Not the cost of the transaction, but how much the publishing slows down the next one.
        beside = cost(engine, "publish")
        print(f"beside the publishing of those before, without a pause: {beside:.2f}")
        engine.dispose()
    print()
    kept = print_bounds(bounds)
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    raise SystemExit(main())
