"""The cost of keeping the results of tasks, beside Celery's in the same database.

python -m benchmarks.results [--rounds N] [--messages N] [--rows N]

No-op tasks over RabbitMQ with results in PostgreSQL: 8 threads, acks after the task; the contenders
take turns, each in a new process that is timed from the first to the last task, and the ratio is
the median of those of the rounds. ``result()``: the time from the end of a task, which has slept
for a random while, to its return in a process that waits. Rows: 50 tasks begin and end, and old
rows are purged, in a table that is empty and in one that is full.
"""

from __future__ import annotations

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
import uuid
from typing import Any

from sqlalchemy import Engine, text

from benchmarks.tables import Bound, median, print_bounds, progress
from benchmarks.tasks import rate

MESSAGES = 20_000
ROWS = 1_000_000
WAITS = 200
BATCH = 50


def beside_celery(broker: str, database: str, rounds: int, messages: int) -> list[Bound]:
    """Print the tasks a second, with and without results, and return the bound."""
    rates: dict[str, list[float]] = {"outbox": [], "celery": [], "outbox, no results": []}
    for number in range(rounds):
        names = list(rates)
        for name in names if number % 2 == 0 else reversed(names):
            variables = {}
            if "no results" not in name:
                variables = {"OUTBOX_RESULTS": database, "BENCHMARK_RESULTS": database}
            rates[name].append(rate(name.partition(",")[0], broker, messages, **variables))
            progress(f"{name}: {rates[name][-1]:,.0f} tasks/s")
    for name, found in rates.items():
        print(f"  {name:>20}: {median(found):,.0f} tasks/s ({min(found):,.0f}-{max(found):,.0f})")
    ours, theirs = rates["outbox"], rates["celery"]
    ratio = median(one / other for one, other in zip(ours, theirs, strict=True))
    return [Bound("no-op tasks with results / Celery's, median of paired rounds", ratio, 3)]


def wakes(broker: str, results: str, most: float, waits: int) -> Bound:
    """Return the 99th percentile of how long after its end ``result()`` returns a value."""
    from benchmarks import called_tasks
    from outbox import auto_publishing, configure

    publisher = configure(broker, results=results, tasks_queue="wakes")
    worker = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "outbox.consumers",
            "benchmarks.called_tasks",
            "--threads",
            "4",
            "--log-level",
            "ERROR",
        ],
        env={
            **os.environ,
            "OUTBOX_URL": broker,
            "OUTBOX_RESULTS": results,
            "OUTBOX_TASKS_QUEUE": "wakes",
        },
    )
    late = []
    try:
        for number in range(waits + 5):
            with auto_publishing():
                handle = called_tasks.doze.later(random.uniform(0, 0.1))
            ended = handle.result(60)
            if number >= 5:  # the first ones wait for the worker's start
                late.append(time.time() - ended)
    finally:
        worker.terminate()
        worker.wait(30)
        publisher.close(5)
    late.sort()
    p99 = late[int(len(late) * 0.99)] * 1000
    kind = results.partition(":")[0].partition("+")[0]
    print(f"  {kind}: median {median(late) * 1000:.1f} ms, p99 {p99:.1f} ms")
    return Bound(f"ms until result() returns, p99, {kind}", p99, most, at_most=True)


def full_table(engine: Engine, rows: int) -> list[Bound]:
    """Return how much slower a table of many rows makes a batch, and a purge."""
    from outbox.results.results_store import ResultsStore

    store = ResultsStore(engine)
    before = _batches(store), _purge(engine, store)
    with engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO outbox_results (id, task, queue, status, args, value, token, "
                "kept_until) SELECT gen_random_uuid()::text, 'shop:pay', 'tasks', 'succeeded', "
                "'{\"args\": [17]}', '42', md5(n::text), now() + interval '7 days' "
                "FROM generate_series(1, :rows) AS n"
            ),
            {"rows": rows},
        )
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE outbox_results"))
    after = _batches(store), _purge(engine, store)
    print(f"  50 tasks: {before[0] * 1000:.1f} ms; among {rows:,} rows {after[0] * 1000:.1f} ms")
    print(f"  purge of 1,000: {before[1] * 1000:.1f} ms; {after[1] * 1000:.1f} ms")
    return [
        Bound(f"a batch among {rows:,} rows / empty", after[0] / before[0], 2, at_most=True),
        Bound(f"a purge among {rows:,} rows / empty", after[1] / before[1], 2, at_most=True),
    ]


def _batches(store: Any) -> float:
    """Return the median of the seconds in which 50 tasks begin and end."""
    times = []
    connection = store.connect()
    for _ in range(40):
        begun = [_begun() for _ in range(BATCH)]
        began = time.perf_counter()
        store.write(begun, [], connection)
        store.write([], [_ended(row) for row in begun], connection)
        times.append(time.perf_counter() - began)
    connection.close()
    return median(times)


def _purge(engine: Engine, store: Any) -> float:
    """Return the median of the seconds in which 1,000 old rows are deleted."""
    times = []
    for _ in range(7):
        with engine.begin() as connection:
            connection.execute(
                text(
                    "INSERT INTO outbox_results (id, status, kept_until) SELECT "
                    "gen_random_uuid()::text, 'succeeded', now() - interval '1 day' "
                    "FROM generate_series(1, 1000)"
                )
            )
        began = time.perf_counter()
        assert store.purge_some()
        times.append(time.perf_counter() - began)
    return median(times)


def _begun() -> dict[str, Any]:
    return {
        "id": str(uuid.uuid4()),
        "task": "shop:pay",
        "queue": "tasks",
        "args": '{"args":[17]}',
        "attempt": 1,
        "token": uuid.uuid4().hex,
        "worker": "host:1",
        "enqueued": time.time(),
        "keep": 604_800.0,
    }


def _ended(begun: dict[str, Any]) -> dict[str, Any]:
    nothing = dict.fromkeys(("error_type", "error", "traceback"))
    return {**begun, **nothing, "status": "succeeded", "value": "42", "is_typed": 0, "is_over": 1}


def main() -> int:
    """Run the benchmark."""
    import outbox.sql
    from outbox.storage.engines import open_engine
    from outbox.testing.broker import PrivateBroker
    from outbox.testing.databases.postgresql import PrivatePostgreSQL

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--messages", type=int, default=MESSAGES)
    parser.add_argument("--waits", type=int, default=WAITS)
    parser.add_argument("--rows", type=int, default=ROWS)
    options = parser.parse_args()
    with (
        PrivateBroker() as broker,
        PrivatePostgreSQL() as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        engine = open_engine(server.url)
        outbox.sql.metadata.create_all(engine)
        bounds = beside_celery(broker.url, server.url, options.rounds, options.messages)
        bounds.append(wakes(broker.url, server.url, 50, options.waits))
        bounds.append(wakes(broker.url, f"sqlite:///{folder}/results.db", 200, options.waits))
        with engine.begin() as connection:
            connection.execute(text("TRUNCATE outbox_results"))
        bounds += full_table(engine, options.rows)
        engine.dispose()
    return 0 if print_bounds(bounds) else 1


if __name__ == "__main__":
    sys.exit(main())
