"""The embedded transport: publishing to and consuming from an SQLite file.

python -m benchmarks.embedded [--rounds N] [--folder FOLDER] [--check]

Publishing: ``publish()`` of 200 bytes of JSON from one thread, with commits synced to the disk
(``synchronous=full``) or left to the operating system (``normal``). Consuming: one worker with 8
threads and a handler that does nothing. Both: a worker that publishes a follow-on event for every
message. For comparison: repeated writes of 20 KB with fsync.
"""

from __future__ import annotations

import argparse
import os
import sqlite3
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from benchmarks.peers import BODY
from benchmarks.tables import Bound, median, print_bounds, progress, table
from outbox import Event, Publisher, enqueue_event, publish
from outbox.consumers import ReceivedEvent, Worker, consumer

MESSAGES = 10_000
CHUNKS = (1, 10, 100, 1000)
THREADS = 8
_IDLE_SECONDS = 5.0


def bound_to(url: str) -> None:
    """Declare and bind the queue that all events go to."""

    @consumer("bench", topics=["bench.#"])
    def nothing(event: ReceivedEvent) -> None: ...

    with Publisher(url, unroutable="ignore") as publisher:
        worker = Worker([nothing], publisher=publisher)
        worker.start()
        event = Event(id="0", target="bench.first", exchange="outbox", body=BODY)
        while not publisher.publish([event]).published:
            time.sleep(0.01)
        worker.stop()


def published(url: str, chunk: int) -> float:
    """Publish in chunks; return events per second."""
    count = max(200, min(MESSAGES, chunk * 200))
    events = [Event(id="1", target="bench", exchange="outbox", body=BODY)] * chunk
    with Publisher(url, unroutable="fail") as publisher:
        publisher.publish(events[:1]).raise_for_failure()
        begin = time.perf_counter()
        for _ in range(count // chunk):
            publisher.publish(events, timeout=60).raise_for_failure()
        return count / (time.perf_counter() - begin)


def consumed(url: str, count: int, act: Callable[[ReceivedEvent], None]) -> float:
    """Consume ``count`` messages; return messages per second, until the last is settled."""
    done = threading.Event()
    lock = threading.Lock()
    handled = 0

    @consumer("bench", topics=["bench.#"])
    def handler(event: ReceivedEvent) -> None:
        nonlocal handled
        act(event)
        with lock:
            handled += 1
            if handled == count:
                done.set()

    with Publisher(url) as publisher:
        worker = Worker([handler], publisher=publisher, threads=THREADS)
        begin = time.perf_counter()
        worker.start()
        if not done.wait(120):
            raise RuntimeError(f"{handled} of {count} were handled")
        worker.stop()
        return count / (time.perf_counter() - begin)


def follow_on(event: ReceivedEvent) -> None:
    enqueue_event({"of": event.id}, "elsewhere", unroutable="ignore")
    publish()


def idle(url: str) -> float:
    """Return the share of a core that an idle worker uses, in percent."""

    @consumer("bench.idle")
    def nothing(event: ReceivedEvent) -> None: ...

    with Publisher(url) as publisher:
        worker = Worker([nothing], publisher=publisher)
        worker.start()
        time.sleep(1)
        before = time.process_time()
        time.sleep(_IDLE_SECONDS)
        percent = (time.process_time() - before) / _IDLE_SECONDS * 100
        worker.stop()
    return percent


def synced(folder: Path) -> float:
    """Return the number of writes with fsync per second."""
    path = folder / "synced"
    count = 100
    with path.open("wb") as file:
        begin = time.perf_counter()
        for _ in range(count):
            file.write(b"x" * 20_000)
            file.flush()
            os.fdatasync(file.fileno())
        seconds = time.perf_counter() - begin
    path.unlink()
    return count / seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="that count (default: 3)")
    parser.add_argument("--folder", help="where the file is made (default: a temporary folder)")
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    options = parser.parse_args()
    rates: dict[str, list[float]] = defaultdict(list)
    by_chunk: dict[tuple[str, int], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        for number in range(options.rounds):
            rates["disk"].append(synced(folder))
            for synchronous in ("full", "normal"):
                url = f"sqlite:///{folder}/{number}-{synchronous}.db?synchronous={synchronous}"
                bound_to(url)
                total = 0
                for chunk in CHUNKS:
                    by_chunk[synchronous, chunk].append(published(url, chunk))
                    progress(f"round {number + 1}, {synchronous}: chunks of {chunk} published")
                    total += 1 + max(200, min(MESSAGES, chunk * 200)) // chunk * chunk
                # "bench.first" may still be in the queue, so it isn't counted.
                rates[f"consumed, {synchronous}"].append(consumed(url, total, lambda event: None))
                progress(f"round {number + 1}, {synchronous}: consumed")
            url = f"sqlite:///{folder}/{number}-follow-on.db"
            bound_to(url)
            published(url, 1000)
            rates["follow-ons"].append(consumed(url, 5_000, follow_on))
        idle_percent = idle(f"sqlite:///{folder}/idle.db")
    found = {what: median(values) for what, values in rates.items()}
    print(
        f"Python {sys.version.split()[0]}, SQLite {sqlite3.sqlite_version}, "
        f"{os.cpu_count()} cores; {found['disk']:,.0f} synced writes of 20 KB per second\n"
    )
    print(
        table(
            ["events published per second", *(f"chunks of {chunk}" for chunk in CHUNKS)],
            [
                [
                    f"synchronous={synchronous}",
                    *(f"{median(by_chunk[synchronous, chunk]):,.0f}" for chunk in CHUNKS),
                ]
                for synchronous in ("full", "normal")
            ],
        )
    )
    print()
    print(
        table(
            ["messages consumed per second, one worker, 8 threads", ""],
            [
                ["synchronous=full", f"{found['consumed, full']:,.0f}"],
                ["synchronous=normal", f"{found['consumed, normal']:,.0f}"],
                ["synchronous=full, each publishes one", f"{found['follow-ons']:,.0f}"],
            ],
        )
    )
    print()
    kept = print_bounds(
        [
            Bound("published per second, chunks of 100", median(by_chunk["full", 100]), 5_000),
            Bound("consumed per second, one worker", found["consumed, full"], 2_000),
            Bound("an idle worker, % of a core", idle_percent, 1, at_most=True),
        ]
    )
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
