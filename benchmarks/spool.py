"""What a spool costs while the broker is available, and what it does while it is away.

python -m benchmarks.spool [--rounds N] [--check]

Beside outbox runs a bare loop that inserts the same rows into an SQLite file, with a sync each:
what the disk allows. The rates of both drift with the disk, their ratio doesn't.
"""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pika

from benchmarks.tables import Bound, machine, median, print_bounds, progress
from outbox import Event, Publisher
from outbox.testing.broker import PrivateBroker
from proving.proxy import FaultProxy

_EXCHANGE = "bench"
_BODY = b'{"n": "' + b"x" * 200 + b'"}'
_SECONDS = 3.0
_PROCESSES = 8
_DRAINED = 50_000
_MOST_SINGLE = 0.010  # seconds, p99
_MOST_OF_EIGHT = 0.020


def events(count: int) -> list[Event]:
    """Return new events."""
    return [
        Event(id=f"{time.monotonic_ns():x}-{number}", target="a.b", exchange=_EXCHANGE, body=_BODY)
        for number in range(count)
    ]


def p99(times: list[float]) -> float:
    """Return the 99th percentile."""
    return sorted(times)[int(len(times) * 0.99)]


@contextmanager
def folder() -> Iterator[Path]:
    """Yield an empty folder on the disk, and delete it."""
    path = Path(tempfile.mkdtemp(prefix="outbox-spool-"))
    yield path
    shutil.rmtree(path)


def timed(publish: Callable[[], object], seconds: float = _SECONDS) -> list[float]:
    """Call ``publish`` for some seconds; return the time that each call took."""
    times, end = [], time.perf_counter() + seconds
    while (begin := time.perf_counter()) < end:
        publish()
        times.append(time.perf_counter() - begin)
    return times


def nowhere() -> str:
    """Return the URL of a broker that refuses connections."""
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return f"amqp://127.0.0.1:{unused.getsockname()[1]}/"


def bare(chunk: int) -> list[float]:
    """Insert rows into a file in a loop, each chunk synced."""
    with folder() as path:
        connection = sqlite3.connect(path / "bare", isolation_level=None)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("CREATE TABLE event (seq INTEGER PRIMARY KEY, id TEXT, body BLOB)")

        def insert() -> None:
            connection.execute("BEGIN")
            rows = [(str(time.monotonic_ns()), _BODY)] * chunk
            connection.executemany("INSERT INTO event (id, body) VALUES (?, ?)", rows)
            connection.execute("COMMIT")

        times = timed(insert)
        connection.close()
    return times


def away(chunk: int, threads: int = 1) -> list[float]:
    """Publish chunks while the broker is away; return the times of the calls of all threads."""
    with folder() as path, Publisher(nowhere(), exchange=_EXCHANGE, spool=path) as publisher:
        publisher.publish(events(1))  # the first one finds out that there is no broker
        times: list[list[float]] = [[] for _ in range(threads)]

        def work(number: int) -> None:
            times[number] = timed(lambda: publisher.publish(events(chunk)))

        workers = [threading.Thread(target=work, args=(number,)) for number in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        stats = publisher.stats()
        assert stats.kept == 1 + chunk * sum(map(len, times)), stats
    return [each for those in times for each in those]


_WRITER = """
import json, logging, sys
from benchmarks.spool import events, timed
from outbox import Publisher
logging.disable()
publisher = Publisher(sys.argv[1], exchange="bench", spool=sys.argv[2])
publisher.publish(events(1))
print("ready", flush=True)
input()
print(json.dumps(timed(lambda: publisher.publish(events(1)))))
"""


def away_in_processes() -> list[list[float]]:
    """Publish single events in several processes; return the times of each."""
    with folder() as path:
        command = [sys.executable, "-c", _WRITER, nowhere(), str(path)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        writers = [
            subprocess.Popen(command, text=True, **pipes)  # type: ignore[call-overload]
            for _ in range(_PROCESSES)
        ]
        for writer in writers:
            writer.stdout.readline()
        for writer in writers:
            writer.stdin.write("\n")
            writer.stdin.flush()
        return [json.loads(writer.communicate()[0]) for writer in writers]


class Queue:
    """A queue for all events."""

    def __init__(self, url: str) -> None:
        self._channel = pika.BlockingConnection(
            pika.URLParameters(f"{url}?heartbeat=600")
        ).channel()
        self._channel.exchange_declare(_EXCHANGE, "topic", durable=True)
        self._channel.queue_declare(_EXCHANGE, durable=True)
        self._channel.queue_bind(_EXCHANGE, _EXCHANGE, "#")

    def empty(self) -> None:
        """Delete what has arrived."""
        self._channel.queue_purge(_EXCHANGE)


def healthy(url: str, queue: Queue, rounds: int) -> float:
    """Return the processor time with a spool by that without one, in pairs of chunks of 100."""
    times: dict[str, list[float]] = {"plain": [], "spooled": []}
    with (
        folder() as path,
        Publisher(url, exchange=_EXCHANGE) as plain,
        Publisher(url, exchange=_EXCHANGE, spool=path) as spooled,
    ):
        pair = [("plain", plain), ("spooled", spooled)]
        for number in range(400 * rounds):
            for name, publisher in pair if number % 2 else reversed(pair):
                chunk = events(100)
                begin = time.process_time()
                publisher.publish(chunk)
                times[name].append(time.process_time() - begin)
            if number % 100 == 99:
                queue.empty()
        assert list(path.iterdir()) == []
    return median(times["spooled"]) / median(times["plain"])


def drained(url: str, queue: Queue) -> tuple[float, float]:
    """Return the events per second of a drained spool, and those of plain publishing."""
    with folder() as path, FaultProxy(url) as gate:
        with Publisher(gate.url, exchange=_EXCHANGE, spool=path) as publisher:
            publisher.publish(events(1))
            gate.refuse()
            for _ in range(_DRAINED // 1000):
                publisher.publish(events(1000))
            gate.heal()
            while not publisher.connected:
                time.sleep(0.01)
            begin = time.perf_counter()
            assert publisher.drain(120)
            of_spool = _DRAINED / (time.perf_counter() - begin)
            queue.empty()
            chunks = [events(1000) for _ in range(_DRAINED // 1000)]
            begin = time.perf_counter()
            for chunk in chunks:
                publisher.publish(chunk, timeout=60)
            plain = _DRAINED / (time.perf_counter() - begin)
            queue.empty()
    return of_spool, plain


def main() -> int:
    """Run the benchmark; with ``--check``, return 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3, help="that count (default: 3)")
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    options = parser.parse_args()
    logging.disable()
    singles, hundreds, alone, eight = [], [], [], []
    for number in range(options.rounds):
        raw, ours = bare(1), away(1)
        singles.append(len(ours) / len(raw))
        alone.append(p99(ours))
        progress(
            f"round {number}, single events: {len(ours) / _SECONDS:,.0f}/s, p99 "
            f"{p99(ours) * 1e3:.1f} ms; the bare loop {len(raw) / _SECONDS:,.0f}/s, "
            f"p99 {p99(raw) * 1e3:.1f} ms"
        )
        raw, ours = bare(100), away(100)
        hundreds.append(len(ours) / len(raw))
        progress(
            f"round {number}, chunks of 100: {100 * len(ours) / _SECONDS:,.0f}/s; the bare loop "
            f"{100 * len(raw) / _SECONDS:,.0f}/s"
        )
        threads = away(1, 8)
        eight.append(len(threads) / _SECONDS)
        progress(
            f"round {number}, eight threads: {len(threads) / _SECONDS:,.0f}/s, p99 "
            f"{p99(threads) * 1e3:.1f} ms"
        )
        by_process = away_in_processes()
        counts = [len(times) for times in by_process]
        progress(
            f"round {number}, eight processes: {sum(counts) / _SECONDS:,.0f}/s, p99 "
            f"{p99([each for times in by_process for each in times]) * 1e3:.1f} ms, "
            f"least {min(counts) / (sum(counts) / len(counts)):.2f} of the mean"
        )
    with PrivateBroker() as broker:
        queue = Queue(broker.url)
        print(machine(""), flush=True)
        ratio = healthy(broker.url, queue, options.rounds)
        drains = [drained(broker.url, queue) for _ in range(options.rounds)]
    for of_spool, plain in drains:
        progress(f"drained {of_spool:,.0f}/s; published plainly {plain:,.0f}/s")
    kept = print_bounds(
        [
            Bound("healthy: processor time, by that without a spool", ratio, 1.01, at_most=True),
            Bound("away, single events: of the bare loop", median(singles), 0.3),
            Bound("away, single events: p99 in ms", median(alone) * 1e3, 10, at_most=True),
            Bound("away, eight threads: events per second", median(eight), 2000),
            Bound("away, chunks of 100: of the bare loop", median(hundreds), 0.2),
            Bound("drained: of plain publishing", median([a / b for a, b in drains]), 0.5),
        ]
    )
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
