"""How soon workers get what was committed for them in PostgreSQL, and what that costs.

python -m benchmarks.waking [--seconds 10] [--part latency|idle|commits] [--check]

One private PostgreSQL, the application's database and the broker. The application stores events in
its transactions; a worker in another process notes when its handler begins. Then an idle worker is
watched, and 48 clients commit with an event each, or with a plain row of the same columns in its
place, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sqlalchemy import Engine, create_engine, text
from sqlalchemy.orm import Session, registry

import outbox.sql
from benchmarks.tables import Bound, median, print_bounds, progress
from outbox import configure, enqueue_event
from outbox.event import Event
from outbox.messages.rows import values_of
from outbox.testing.databases.postgresql import PrivatePostgreSQL

__all__ = ["latencies"]

_CLIENTS, _PROCESSES = 48, 4
_ROUNDS = 3

WORKER = """
import os, sys, time
from outbox import Publisher
from outbox.consumers import Worker, consumer

_, url, queue, path = sys.argv
log = open(path, "a", buffering=1)


@consumer(queue, topics=[queue + ".*"])
def note(event):
    log.write(f"{event.payload['n']} {time.time()}\\n")


with Publisher(url) as publisher:
    worker = Worker([note], publisher=publisher, threads=4)
    worker.start()
    while not worker.is_consuming:
        time.sleep(0.01)
    print("started", flush=True)
    sys.stdin.read()
    worker.stop(10)
"""


@contextlib.contextmanager
def working(url: str, queue: str, path: Path) -> Iterator[int]:
    """Run a worker in a separate process; yield its pid."""
    with subprocess.Popen(
        [sys.executable, "-c", WORKER, url, queue, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(1.5)  # it listens
        try:
            yield process.pid
        finally:
            process.communicate(timeout=20)


def latencies(
    engine: Engine,
    url: str,
    rate: float,
    seconds: float,
    disturb: Callable[[], None] = lambda: None,
) -> list[float]:
    """Return the seconds from each commit to its handler, sorted.

    Args:
        engine: the application's engine.
        url: the URL of the worker.
        rate: the commits in a second.
        seconds: for how long.
        disturb: called before each commit.
    """
    committed: dict[int, float] = {}

    def commit(number: int) -> None:
        disturb()
        with Session(engine) as session:
            enqueue_event({"n": number}, "orders.placed", session=session)
            session.commit()
        committed[number] = time.time()

    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(4) as pool:
        path = Path(folder) / "seen"
        with working(url, "orders", path):
            begin = time.monotonic()
            for number in range(int(rate * seconds)):
                # At random moments, as requests come.
                moment = begin + (number + random.random()) / rate
                time.sleep(max(0.0, moment - time.monotonic()))
                pool.submit(commit, number)
            pool.shutdown()
            deadline = time.monotonic() + 10
            while sum(1 for _ in path.open()) < len(committed) and time.monotonic() < deadline:
                time.sleep(0.1)
        seen = {int(n): float(at) for n, at in map(str.split, path.read_text().splitlines())}
    assert seen.keys() == committed.keys(), "messages are missing"
    return sorted(max(0.0, seen[n] - committed[n]) for n in committed)


def cut_listeners(engine: Engine) -> None:
    """Cut all connections that listen."""
    with engine.begin() as connection:
        connection.execute(
            text(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE query LIKE 'LISTEN%'"
            )
        )


def idle(engine: Engine, url: str, seconds: float) -> tuple[float, float]:
    """Return an idle worker's share of a core, and its transactions in a second."""
    with tempfile.TemporaryDirectory() as folder:
        with working(url, "orders", Path(folder) / "seen") as pid:
            time.sleep(10)  # a server's process reports what it did with a delay
            before, cpu = _transactions(engine), _cpu(pid)
            time.sleep(seconds)
            return (_cpu(pid) - cpu) / seconds, (_transactions(engine) - before - 1) / seconds


def _cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _transactions(engine: Engine) -> int:
    with engine.begin() as connection:
        counted = "SELECT xact_commit FROM pg_stat_database WHERE datname = current_database()"
        return int(connection.execute(text(counted)).scalar_one())


# --------------------------------------------------------------------------- the clients' side


class Plain:
    """A row as an application would map it, in a table like that of the events."""


def client(url: str, kind: str, seconds: float) -> None:
    """Commit from twelve threads, and print the commits in a second and the 99th percentile."""
    threads = _CLIENTS // _PROCESSES
    engine = create_engine(url, pool_size=threads)
    configure(url)
    table = outbox.sql.events.to_metadata(outbox.sql.metadata.__class__(), name="plain")
    registry().map_imperatively(Plain, table)
    values = values_of(Event(id="x" * 36, target="orders.placed", exchange="outbox", body=b"{}"))
    times: list[float] = []
    stopping = threading.Event()

    def run() -> None:
        while not stopping.is_set():
            begin = time.perf_counter()
            with Session(engine) as session:
                session.execute(text("INSERT INTO shop_orders (x) VALUES ('x')"))
                if kind == "event":
                    enqueue_event({}, "orders.placed", session=session)
                else:
                    row = Plain()
                    row.__dict__.update(values)
                    session.add(row)
                session.commit()
            times.append(time.perf_counter() - begin)

    with ThreadPoolExecutor(threads) as pool:
        for _ in range(threads):
            pool.submit(run)
        time.sleep(1)
        times.clear()
        time.sleep(seconds)
        count = len(times)
        stopping.set()
    print(json.dumps([count / seconds, statistics.quantiles(times, n=100)[98]]))
    engine.dispose()


def commits(url: str, kind: str, seconds: float) -> tuple[float, float]:
    """Return the commits in a second of 48 clients, and the worst 99th percentile of theirs."""
    command = [sys.executable, "-m", "benchmarks.waking", "--client", url, kind, str(seconds)]
    clients = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(_PROCESSES)]
    found = [json.loads(each.communicate(timeout=seconds + 60)[0]) for each in clients]
    return sum(rate for rate, _ in found), max(slow for _, slow in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="the length of each part")
    parser.add_argument("--part", choices=("latency", "idle", "commits"), help="measure only this")
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    parser.add_argument("--client", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        url, kind, seconds = options.client
        client(url, kind, float(seconds))
        return 0
    with PrivatePostgreSQL() as server:
        engine = create_engine(server.url)
        outbox.sql.Store(engine).create()
        with engine.begin() as connection:
            connection.execute(text("CREATE TABLE shop_orders (id bigserial PRIMARY KEY, x text)"))
            connection.execute(text("CREATE TABLE plain (LIKE outbox_events INCLUDING ALL)"))
        configure(server.url)
        bounds = []
        for name, measure in (("latency", _latency), ("idle", _idle), ("commits", _commits)):
            if options.part in (name, None):
                bounds += measure(engine, server.url, options.seconds)
        engine.dispose()
    print()
    kept = print_bounds(bounds)
    return 1 if options.check and not kept else 0


def _latency(engine: Engine, url: str, seconds: float) -> list[Bound]:
    bounds = []
    for name, rate, its_seconds, disturb, bound in (
        ("at 500/s", 500.0, seconds, lambda: None, 20),
        ("at 1/s", 1.0, 3 * seconds, lambda: None, 50),
        ("at 1/s, LISTEN cut", 1.0, 2 * seconds, lambda: cut_listeners(engine), 1200),
    ):
        found = latencies(engine, url, rate, its_seconds, disturb)
        p50, p99 = (found[int(len(found) * share)] * 1e3 for share in (0.5, 0.99))
        progress(f"{name}: p50 {p50:.1f} ms, p99 {p99:.1f} ms")
        bounds.append(Bound(f"commit to handler {name}, p99 in ms", p99, bound, at_most=True))
    return bounds


def _idle(engine: Engine, url: str, seconds: float) -> list[Bound]:
    bounds = []
    for name, address, most in (("woken", url, 1.0), ("polling", f"{url}?listen=no", 10.0)):
        cpu, looks = idle(engine, address, 2 * seconds)
        bounds.append(Bound(f"an idle worker, {name}: % of a core", cpu * 100, 1, at_most=True))
        bounds.append(Bound(f"an idle worker, {name}: queries/s", looks, most + 0.2, at_most=True))
    return bounds


def _commits(engine: Engine, url: str, seconds: float) -> list[Bound]:
    rates: dict[str, list[float]] = {"plain": [], "event": []}
    with tempfile.TemporaryDirectory() as folder:
        with working(url, "orders", Path(folder) / "declares"):
            pass
        with working(url, "other", Path(folder) / "seen"):
            for _ in range(_ROUNDS):
                for kind in rates:
                    rate, p99 = commits(url, kind, seconds / 2)
                    progress(f"48 clients, {kind}: {rate:.0f}/s, p99 {p99 * 1e3:.0f} ms")
                    rates[kind].append(rate)
                    with engine.begin() as connection:
                        connection.execute(text("TRUNCATE outbox_events, plain, shop_orders"))
    ratio = median(rates["event"]) / median(rates["plain"])
    return [Bound("48 clients: commits with an event, of those with a row", ratio, 0.9)]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    raise SystemExit(main())
