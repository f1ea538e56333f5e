"""The table of events under load: how claims slow down, and how fast rows are written.

python -m benchmarks.claims [--messages N] [--rows N] [--check]

One private PostgreSQL, with its default autovacuum. First ``--messages`` events pass through a
queue, with and without a transaction that stays open all the time; then the time of a claim beside
``--rows`` rows that wait, are scheduled, are dead, or wait behind one key; then chunks of rows,
compared with ``executemany`` into the same table. 3,600,000 messages, an hour at 1,000/s, take half
an hour.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

from sqlalchemy import Engine, text

from benchmarks.tables import median, progress
from outbox.event import Event
from outbox.messages.rows import values_of
from outbox.sql import Store
from outbox.storage.floors import Floors

_BACKLOG = 2000
_CHUNK = 100
_CLAIMS = 200
_BODY = b'{"order": 1, "text": "%s"}' % (b"x" * 150)


def row(number: int, **columns: Any) -> dict[str, Any]:
    """Return the columns of a row in the queue ``q``."""
    id = f"01900000-0000-7000-8000-{number:012}"
    event = Event(id=id, target="order.placed", exchange="shop", body=_BODY)
    return {**values_of(event, queue="q"), **columns}


def emptied(engine: Engine) -> Store:
    """Return the store with an empty table."""
    with engine.begin() as connection:
        connection.execute(text("TRUNCATE outbox_events"))
    return Store(engine)


def vacuum(engine: Engine) -> None:
    """Clean the table up, as the server does by itself a bit later."""
    with engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT")
        connection.execute(text("VACUUM ANALYZE outbox_events"))


@contextlib.contextmanager
def held(engine: Engine, *, open_: bool) -> Iterator[None]:
    """Keep a transaction open, if ``open_``, that sees all of the table as it is now."""
    with engine.connect() as connection:
        if open_:
            connection.execution_options(isolation_level="REPEATABLE READ")
            connection.execute(text("SELECT count(*) FROM outbox_events"))
        yield


def passing(engine: Engine, messages: int, floors: Floors | None) -> tuple[float, float, float]:
    """Put, claim and complete ``messages`` rows.

    Returns:
        The median time of a claim in the first tenth and in the last, in ms, and the messages per
        second.
    """
    store = Store(engine)
    store.put_rows([row(number) for number in range(_BACKLOG)])
    times: list[float] = []
    began = time.perf_counter()
    for first in range(0, messages, _CHUNK):
        store.put_rows([row(first + number) for number in range(_CHUNK)])
        start = time.perf_counter()
        rows = store.claim(_CHUNK, queue="q", floors=floors)
        times.append((time.perf_counter() - start) * 1000)
        store.complete(rows)
        if len(times) % 1000 == 0:
            progress(f"{len(times) * _CHUNK:,}: {statistics.median(times[-1000:]):.2f} ms a claim")
    rate = messages / (time.perf_counter() - began)
    tenth = max(1, len(times) // 10)
    return statistics.median(times[:tenth]), statistics.median(times[-tenth:]), rate


def claim_time(store: Store, *, ordered: bool = False) -> float:
    """Return the median time of a claim of 100 rows that are there, in ms."""
    floors = Floors()
    times: list[float] = []
    for _ in range(_CLAIMS):
        with store.engine.begin() as connection:
            start = time.perf_counter()
            rows = store.claim(
                _CHUNK, queue="q", ordered=ordered, floors=floors, connection=connection
            )
            times.append((time.perf_counter() - start) * 1000)
            assert len(rows) == _CHUNK, len(rows)
            connection.rollback()
    return median(times)
