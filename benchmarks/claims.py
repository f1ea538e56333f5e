"""The table of events under load: how claims slow down, and how fast rows are written.

python -m benchmarks.claims [--messages N] [--rows N] [--check]

One private PostgreSQL, with its default autovacuum. First ``--messages`` events pass through a
queue, with and without a transaction that stays open all the time; then the time of a claim beside
``--rows`` rows that wait, are scheduled, are dead, or wait behind one key; then chunks of rows,
compared with ``executemany`` into the same table. 3,600,000 messages, an hour at 1,000/s, take half
an hour.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import psycopg
from sqlalchemy import Engine, make_url, text

from benchmarks.tables import Bound, print_bounds, progress, table
from outbox.event import Event
from outbox.messages.rows import values_of
from outbox.sql import Store
from outbox.storage.engines import open_engine
from outbox.storage.floors import Floors
from outbox.testing.databases.postgresql import PrivatePostgreSQL

_BACKLOG = 2000
_CHUNK = 100
_CLAIMS = 50
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


def claim_time(store: Store, order: str) -> float:
    """Return the median time of a claim of 100 rows that are there, in ms.

    Ordered claims are the relay's, of the queue ``""``; those of one row a key are a consumer's.
    """
    floors = Floors()
    times: list[float] = []
    for _ in range(_CLAIMS):
        with store.engine.connect() as connection, connection.begin() as transaction:
            start = time.perf_counter()
            rows = store.claim(
                _CHUNK,
                queue="" if order == "ordered" else "q",
                ordered=order == "ordered",
                one_a_key=order == "one a key",
                floors=floors,
                connection=connection,
            )
            times.append((time.perf_counter() - start) * 1000)
            assert len(rows) == _CHUNK, len(rows)
            transaction.rollback()
    return statistics.median(times)


_DAY = "interval '1 day'"
# The first row of the key is in other hands.
_BEHIND = {
    "key": "'hot'",
    "available_at": f"now() + {_DAY} * (CASE WHEN n = 1 THEN 1 ELSE -1 END)",
    "lease_token": "CASE WHEN n = 1 THEN 'theirs' END",
    "deliveries": "CASE WHEN n = 1 THEN 1 ELSE 0 END",
}
_BESIDE: dict[str, dict[str, str]] = {
    "nothing": {},
    "scheduled in 10 ranks": {"rank": "mod(n, 10)", "available_at": f"now() + {_DAY}"},
    "waiting": {"available_at": "now() - interval '1 second'"},
    "dead": {"dead_at": "now()"},
    "nothing, ordered": {},
    "waiting behind one key, ordered": {"queue": "''", **_BEHIND},
    "nothing, one a key": {},
    "waiting behind one key, one a key": _BEHIND,
}


def beside(engine: Engine, rows: int) -> dict[str, float]:
    """Return the time of a claim of 100 of 2,000 rows, in ms, beside ``rows`` others of each kind.

    Every other row has a key, and no other row has that.
    """
    times: dict[str, float] = {}
    for kind, columns in _BESIDE.items():
        store = emptied(engine)
        if columns:
            fill(engine, rows, columns)
        keys = [f"k{number}" if number % 2 else None for number in range(_BACKLOG)]
        order = order_of(kind)
        queue = "" if order == "ordered" else "q"
        store.put_rows([row(number, key=key, queue=queue) for number, key in enumerate(keys)])
        vacuum(engine)
        times[kind] = claim_time(store, order)
        progress(f"beside {rows:,} rows, {kind}: {times[kind]:.2f} ms a claim")
    return times


def order_of(kind: str) -> str:
    """Return the order that claims of this kind keep; empty if none."""
    return kind.partition(", ")[2]


def fill(engine: Engine, rows: int, columns: dict[str, str]) -> None:
    """Insert rows with these columns, as SQL of the row's number ``n``, and others as usual."""
    usual = {
        "id": "n::text", "aggregatetype": "'a'", "aggregateid": "'a'", "type": "'a'",
        "payload": "repeat('x', 150)::bytea", "queue": "'q'", "exchange": "'shop'",
        "content_type": "'x'", "occurred_at": "now()", "stored_at": "now()",
        "available_at": "now()",
    }  # fmt: skip
    values = {**usual, **columns}
    with engine.begin() as connection:
        connection.execute(
            text(
                f"INSERT INTO outbox_events ({', '.join(values)}) "
                f"SELECT {', '.join(values.values())} FROM generate_series(1, {rows}) AS n"
            )
        )


def publishing(engine: Engine, chunk: int) -> tuple[float, float]:
    """Return the rows per second of ``put_rows``, and of psycopg's ``executemany``, in chunks."""
    store = emptied(engine)
    rows = [row(number) for number in range(chunk)]
    names = list(rows[0])
    statement = (
        f"INSERT INTO outbox_events ({', '.join(names)}, stored_at, available_at) VALUES "
        f"({', '.join(['%s'] * len(names))}, statement_timestamp(), statement_timestamp())"
    )
    address = make_url(str(engine.url)).set(drivername="postgresql").render_as_string()
    times: tuple[list[float], list[float]] = ([], [])
    with psycopg.connect(address) as by_hand:
        for _ in range(max(10, 5000 // chunk)):
            began = time.perf_counter()
            store.put_rows(rows)
            times[0].append(time.perf_counter() - began)
            began = time.perf_counter()
            with by_hand.cursor() as cursor:
                cursor.executemany(statement, [tuple(each.values()) for each in rows])
            by_hand.commit()
            times[1].append(time.perf_counter() - began)
    return chunk / statistics.median(times[0]), chunk / statistics.median(times[1])


def main() -> int:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=400_000, help="that pass through the table")
    parser.add_argument("--rows", type=int, default=1_000_000, help="beside those that are claimed")
    parser.add_argument("--check", action="store_true", help="fail if a bound is missed")
    options = parser.parse_args()
    bounds: list[Bound] = []
    lines: list[list[str]] = []
    with PrivatePostgreSQL() as server:
        engine = open_engine(server.url)
        Store(engine).create()
        for open_ in (False, True):
            emptied(engine)
            with held(engine, open_=open_):
                first, last, rate = passing(engine, options.messages, Floors())
            name = f"{options.messages:,} messages, {'one' if open_ else 'no'} transaction open"
            lines.append([name, f"{first:.2f} ms", f"{last:.2f} ms", f"{rate:,.0f}/s"])
            limit = 2.0 if open_ else 1.5
            bounds.append(Bound(f"a claim after {name}", last / first, limit, at_most=True))
        times = beside(engine, options.rows)
        for kind, took in times.items():
            lines.append([f"{options.rows:,} rows: {kind}", f"{took:.2f} ms", "", ""])
            order = order_of(kind)
            alone = times[f"nothing, {order}" if order else "nothing"]
            if took is not alone:
                bounds.append(Bound(f"a claim beside {kind}", took / alone, 2.0, at_most=True))
        for chunk, least in ((100, 0.6), (1000, 0.75)):
            ours, theirs = publishing(engine, chunk)
            lines.append([f"chunks of {chunk}", "", f"{ours:,.0f}/s", f"by hand {theirs:,.0f}/s"])
            bounds.append(Bound(f"chunks of {chunk}, to executemany", ours / theirs, least))
        engine.dispose()
    print(table(["", "a claim of 100", "later", "rate"], lines), flush=True)
    ok = print_bounds(bounds)
    return 0 if ok or not options.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
