"""What a spool costs while the broker is available, and what it does while it is away.

python -m benchmarks.spool [--rounds N] [--check]

Each case takes turns with a bare loop that appends the same bytes to a file, with a sync for each
chunk: no writer on this disk keeps a chunk sooner. Rates and times drift with the disk and with the
other work of the machine, the ratio of the two hardly does.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pika

from benchmarks.tables import Bound, machine, median, print_bounds, progress, table
from outbox import Event, Publisher
from outbox.testing.broker import PrivateBroker
from proving.proxy import FaultProxy

_EXCHANGE = "bench"
_BODY = b'{"n": "' + b"x" * 200 + b'"}'
_SECONDS = 2.0
_TURN = 0.25
_THREADS = (1, 8)
_CHUNKS = (1, 10, 100)
_PROCESSES = 8
_DRAINED = 50_000


def events(count: int) -> list[Event]:
    """Return new events."""
    return [
        Event(id=f"{time.monotonic_ns():x}-{number}", target="a.b", exchange=_EXCHANGE, body=_BODY)
        for number in range(count)
    ]


def p99(times: list[float]) -> float:
    """Return the 99th percentile."""
    return sorted(times)[int(len(times) * 0.99)]


@contextlib.contextmanager
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


class Case:
    """Threads that keep chunks, beside the bare loop.

    Attributes:
        threads: the number of the threads.
        chunk: the events of a chunk.
        rate: the events that were kept in a second, in all.
        bare_rate: those of the bare loop.
        times: the seconds that each call took, and ``bare_times`` those of the bare loop.
        cpu: the seconds of processor time of all calls, and ``bare_cpu`` those of the bare loop.
    """

    def __init__(self, threads: int, chunk: int) -> None:
        self.threads = threads
        self.chunk = chunk
        self.times: list[float] = []
        self.bare_times: list[float] = []
        self.cpu = self.bare_cpu = 0.0

    @property
    def cpu_of_event(self) -> float:
        return self.cpu / len(self.times) / self.chunk

    @property
    def bare_cpu_of_event(self) -> float:
        return self.bare_cpu / len(self.bare_times) / self.chunk

    @property
    def rate(self) -> float:
        return len(self.times) * self.chunk / _SECONDS

    @property
    def bare_rate(self) -> float:
        return len(self.bare_times) * self.chunk / _SECONDS

    @property
    def ratio(self) -> float:
        """The rate as a part of the bare loop's."""
        return self.rate / self.bare_rate

    def run(self) -> None:
        """Publish while the broker is away, in turns with the bare loop."""
        with folder() as path, open(path / "bare", "wb", buffering=0) as file:
            row = _BODY + bytes(80)

            def append() -> None:
                file.write(b"".join([row] * self.chunk))
                os.fdatasync(file.fileno())

            with Publisher(nowhere(), exchange=_EXCHANGE, spool=path / "spool") as publisher:
                publisher.publish(events(1))  # the first one finds out that there is no broker
                for _ in range(round(_SECONDS / _TURN)):
                    begin = time.process_time()
                    self.bare_times += timed(append, _TURN)
                    middle = time.process_time()
                    self.times += self._publish(publisher)
                    self.bare_cpu += middle - begin
                    self.cpu += time.process_time() - middle
                stats = publisher.stats()
            assert stats.kept == 1 + self.chunk * len(self.times), stats

    def _publish(self, publisher: Publisher) -> list[float]:
        times: list[list[float]] = [[] for _ in range(self.threads)]

        def work(number: int) -> None:
            times[number] = timed(lambda: publisher.publish(events(self.chunk)), _TURN)

        workers = [threading.Thread(target=work, args=(n,)) for n in range(self.threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
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


def healthy(url: str, queue: Queue) -> float:
    """Return the processor time with a spool by that without one, in pairs of chunks of 100.

    Of two publishers that do the same, the younger one takes 1 to 3 % more: so each is it once.
    """
    ratio = 1.0
    for order in ((False, True), (True, False)):
        times: dict[bool, list[float]] = {False: [], True: []}
        with folder() as path, contextlib.ExitStack() as publishers:
            pair = []
            for spooled in order:
                publisher = Publisher(url, exchange=_EXCHANGE, spool=path if spooled else "")
                pair.append((spooled, publishers.enter_context(publisher)))
            for number in range(200):
                for spooled, publisher in pair if number % 2 else reversed(pair):
                    chunk = events(100)
                    begin = time.process_time()
                    publisher.publish(chunk)
                    times[spooled].append(time.process_time() - begin)
                if number % 100 == 99:
                    queue.empty()
            assert list(path.iterdir()) == []
        ratio *= median(times[True]) / median(times[False])
    return math.sqrt(ratio)


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


_HEAD = (
    "threads, chunk",
    *("kept/s", "median, 99 % ms", "CPU us"),
    *("bare loop/s", "median, 99 % ms", "CPU us"),
    "ratio of the rates",
)


def _line(cases: list[Case]) -> list[str]:
    times = [each for case in cases for each in case.times]
    bare_times = [each for case in cases for each in case.bare_times]
    return [
        f"{cases[0].threads}, {cases[0].chunk}",
        f"{_median(cases, 'rate'):,.0f}",
        f"{median(times) * 1e3:.2f}, {p99(times) * 1e3:.1f}",
        f"{_median(cases, 'cpu_of_event') * 1e6:.1f}",
        f"{_median(cases, 'bare_rate'):,.0f}",
        f"{median(bare_times) * 1e3:.2f}, {p99(bare_times) * 1e3:.1f}",
        f"{_median(cases, 'bare_cpu_of_event') * 1e6:.1f}",
        f"{_median(cases, 'ratio'):.2f}",
    ]


def _median(cases: list[Case], name: str) -> float:
    return median(getattr(case, name) for case in cases)


def _slow(cases: list[Case]) -> float:
    return median(p99(case.times) * 1e3 for case in cases)


def main() -> int:
    """Run the benchmark; with ``--check``, return 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=3, help="that count (default: 3)")
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    options = parser.parse_args()
    logging.disable()
    cases: dict[tuple[int, int], list[Case]] = {}
    fairness, of_processes = [], []
    for number in range(options.rounds):
        for threads in _THREADS:
            for chunk in _CHUNKS:
                case = Case(threads, chunk)
                case.run()
                cases.setdefault((threads, chunk), []).append(case)
        by_process = away_in_processes()
        counts = [len(times) for times in by_process]
        fairness.append(min(counts) * len(counts) / sum(counts))
        of_processes.append(p99([each for times in by_process for each in times]) * 1e3)
        progress(f"round {number}: {sum(counts) / _SECONDS:,.0f}/s in eight processes")
    progress(f"load {os.getloadavg()[0]:.0f}")
    print(table(_HEAD, [_line(same) for same in cases.values()]), flush=True)
    with PrivateBroker() as broker:
        queue = Queue(broker.url)
        print(machine(""), flush=True)
        ratios = [healthy(broker.url, queue) for _ in range(4 * options.rounds)]
        drains = [drained(broker.url, queue) for _ in range(options.rounds)]
    for of_spool, plain in drains:
        progress(f"drained {of_spool:,.0f}/s; published plainly {plain:,.0f}/s")
    kept = print_bounds(
        [
            Bound(
                "healthy: processor time, by that without a spool",
                median(ratios),
                1.01,
                at_most=True,
            ),
            Bound("single events, of the bare loop", _median(cases[1, 1], "ratio"), 0.3),
            Bound("single events, 99 % within ms", _slow(cases[1, 1]), 10, at_most=True),
            Bound("single events of eight threads, a second", _median(cases[8, 1], "rate"), 2000),
            Bound("chunks of 100, events a second", _median(cases[1, 100], "rate"), 30_000),
            Bound("eight processes, 99 % within ms", median(of_processes), 20, at_most=True),
            Bound("the slowest of them, of their mean", median(fairness), 0.5),
            Bound("drained: of plain publishing", median([a / b for a, b in drains]), 0.5),
        ]
    )
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
