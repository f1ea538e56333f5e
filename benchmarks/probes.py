"""Probes while handlers keep every worker busy: how soon ``/livez`` and ``/metrics`` answer.

python -m benchmarks.probes [--seconds N] [--check]

``outbox-consume -p 2 -t 8 --http`` on a SQLite file, with 16 handlers in pure Python loops. The
parent's memory, and its share of a core while nothing is asked, are measured as well.
"""

from __future__ import annotations

import argparse
import http.client
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.tables import Bound, print_bounds
from outbox import EventCollector, Publisher
from outbox.service.http import ServiceSource
from outbox.service.state import ServiceState, WorkerState
from outbox.telemetry.histogram import BOUNDS

MODULE = """
import time
from outbox.consumers import consumer

@consumer("busy")
def burn(event):
    end = time.monotonic() + event.payload
    number = 0
    while time.monotonic() < end:
        for _ in range(1000):
            number += 1
"""
SERIES = 200
_PAUSE = 0.05


def get(port: int, path: str) -> tuple[int, float]:
    """Return the status and the milliseconds of a request."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("GET", path)
    response = connection.getresponse()
    response.read()
    connection.close()
    return response.status, (time.perf_counter() - began) * 1e3


def percentile(times: list[float], share: float) -> float:
    return sorted(times)[min(len(times) - 1, int(share * len(times)))]


def cpu(pid: int) -> float:
    """Return the seconds of a core that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident(pid: int) -> float:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * 4096 / 2**20


def scrape() -> float:
    """Return the CPU milliseconds for metrics of 4 workers with 200 series each."""
    queues = SERIES // 8
    counts = {
        "outbox_messages_total": [
            [[f"queue{n}", "Consumer", outcome], 12345]
            for n in range(queues)
            for outcome in ("acked", "dead", "retried", "returned", "rejected", "requeued")
        ],
        "outbox_message_duration_seconds": [
            [[f"queue{n}", "Consumer"], [1.5, *[7] * (len(BOUNDS) + 1)]] for n in range(queues)
        ],
        "outbox_message_wait_seconds": [
            [[f"queue{n}"], [1.5, *[7] * (len(BOUNDS) + 1)]] for n in range(queues)
        ],
    }
    source = ServiceSource()
    workers = [WorkerState(n, n, "ready", 1.0, report={"counts": counts}) for n in range(1, 5)]
    source.update(ServiceState(tuple(workers), ready=True, phase="ready", base=counts))
    times = []
    for _ in range(50):
        began = time.process_time()
        source.metrics()
        times.append((time.process_time() - began) * 1e3)
    return percentile(times, 0.5)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=20, help="of probes (default: 20)")
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "work.py").write_text(MODULE)
        log = Path(folder, "log")
        url = f"sqlite:///{folder}/outbox.db"
        environment = {**os.environ, "OUTBOX_URL": url, "PYTHONPATH": os.getcwd()}
        command = ["outbox.consumers", "work", "-p", "2", "-t", "8", "--http", "127.0.0.1:0"]
        with log.open("w") as output:
            parent = subprocess.Popen(
                [sys.executable, "-m", *command, "--shutdown-timeout", "1"],
                cwd=folder,
                env=environment,
                stderr=output,
            )
        try:
            while not (found := re.search(r"listening on http://127.0.0.1:(\d+)", log.read_text())):
                time.sleep(0.1)
            port = int(found[1])
            while get(port, "/readyz")[0] != 200:
                time.sleep(0.1)
            before = cpu(parent.pid)
            time.sleep(10)
            idle = (cpu(parent.pid) - before) / 10 * 100
            idle_size = resident(parent.pid)
            with Publisher(url) as publisher:
                collector = EventCollector(publisher=publisher)
                for _ in range(16):
                    collector.enqueue_event(options.seconds + 10, "busy")
                collector.publish()
            time.sleep(3)
            times: dict[str, list[float]] = {"/livez": [], "/metrics": []}
            end = time.monotonic() + options.seconds
            while time.monotonic() < end:
                for path, taken in times.items():
                    status, milliseconds = get(port, path)
                    assert status == 200, (path, status)
                    taken.append(milliseconds)
                    time.sleep(_PAUSE)
            size = resident(parent.pid)
        finally:
            parent.terminate()
            parent.wait(30)
    for path, taken in times.items():
        print(
            f"{path}: {len(taken)} requests, p50 {percentile(taken, 0.5):.1f} ms, "
            f"p95 {percentile(taken, 0.95):.1f} ms, max {max(taken):.1f} ms"
        )
    print(f"parent: {idle_size:.1f} MiB idle, {size:.1f} MiB while asked")
    late = percentile(times["/livez"], 0.95)
    kept = print_bounds(
        [
            Bound("/livez beside 16 busy handlers, p95, ms", late, 50, at_most=True),
            Bound("/livez, the slowest, ms", max(times["/livez"]), 500, at_most=True),
            Bound(f"CPU ms for {SERIES} series of 4 workers", scrape(), 20, at_most=True),
            Bound("the idle parent, MiB", idle_size, 40, at_most=True),
            Bound("the idle parent, % of a core", idle, 0.3, at_most=True),
        ]
    )
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
