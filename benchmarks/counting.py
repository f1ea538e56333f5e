"""What a worker's counters cost a message: beside none, and while Prometheus scrapes them.

python -m benchmarks.counting [--rounds N] [--messages N] [--check]

The cases take turns in one process, in pairs, with a handler that does nothing and one thread, on
one core if the system allows that. Compared is the processor time of the process, which others on
the machine disturb less than the speed. Two equal cases show how much of a difference is noise. A
run takes a fraction of a second, so a scrape is measured in each run of a case for it alone.
"""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from unittest.mock import patch

from prometheus_client import CollectorRegistry, generate_latest

from benchmarks.tables import Bound, median, print_bounds, progress, table
from outbox import Publisher, auto_publishing, enqueue_event
from outbox.consumers import ReceivedEvent, Worker, consumer
from outbox.consumers.message.tally import ThreadTally
from outbox.consumers.outcome import Outcome
from outbox.messages.delivery import Delivery
from outbox.telemetry import PrometheusCollector
from outbox.testing.broker import PrivateBroker

QUEUE = "benchmark-counting"
PAYLOAD = {"order_id": 12345, "customer": "Ada Lovelace", "note": "x" * 120}
PLAIN, AGAIN = "without counters", "without counters, again"
COUNTED, SCRAPED = "with counters", "scraped once"


def consumed(publisher: Publisher, messages: int, halfway: threading.Event | None) -> float:
    """Return the processor time of a message, in microseconds, from the first to the last.

    Args:
        publisher: publishes them.
        messages: their number.
        halfway: set after half of them.
    """
    used: list[float] = []
    left = messages
    done = threading.Event()

    def handle(_: ReceivedEvent) -> None:
        nonlocal left
        left -= 1
        if left == messages - 1 or left == 0:
            used.append(time.process_time())
        if halfway is not None and left == messages // 2:
            halfway.set()
        if left == 0:
            done.set()

    worker = Worker([consumer(QUEUE)(handle)], publisher=publisher, threads=1, prefetch=200)
    with auto_publishing(publisher=publisher):
        for _ in range(messages):
            enqueue_event(PAYLOAD, QUEUE, exchange="")
    worker.start()
    if not done.wait(120):
        raise RuntimeError("messages are missing")
    worker.stop()
    return (used[1] - used[0]) / messages * 1e6


def make_queue(publisher: Publisher) -> None:
    """Have a worker declare the queue."""
    worker = Worker([consumer(QUEUE)(lambda _: None)], publisher=publisher)
    worker.start()
    while not worker.is_consuming:
        time.sleep(0.05)
    worker.stop()


@contextmanager
def scraped() -> Iterator[threading.Event]:
    """Render all metrics in a thread, as a scrape does, once the event is set."""
    registry = CollectorRegistry()
    PrometheusCollector().register(registry)
    asked = threading.Event()

    def scrape() -> None:
        asked.wait()
        generate_latest(registry)

    thread = threading.Thread(target=scrape)
    thread.start()
    yield asked
    asked.set()
    thread.join()


@contextmanager
def not_counted() -> Iterator[None]:
    def ended(self: ThreadTally, delivery: Delivery, outcome: Outcome, began: float) -> None:
        pass

    with patch.object(ThreadTally, "ended", ended):
        yield


CASES: dict[str, Callable[[], AbstractContextManager[threading.Event | None]]] = {
    PLAIN: not_counted,
    AGAIN: not_counted,
    COUNTED: nullcontext,
    SCRAPED: scraped,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="that count (default: 30)")
    parser.add_argument("--messages", type=int, default=5_000, help="in each (default: 5,000)")
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    options = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    found: dict[str, list[float]] = defaultdict(list)
    with PrivateBroker() as broker, Publisher(broker.url, unroutable="ignore") as publisher:
        make_queue(publisher)
        for number in range(options.rounds + 1):
            cases = list(CASES.items())
            for name, case in cases[number % len(cases) :] + cases[: number % len(cases)]:
                with case() as halfway:
                    cpu = consumed(publisher, options.messages, halfway)
                progress(f"round {number}, {name}: {cpu:.1f} us")
                if number:  # the first warms up
                    found[name].append(cpu)
    print(table(["", "us of processor time"], [[n, f"{median(v):.1f}"] for n, v in found.items()]))

    def times(one: str) -> float:
        return median(a / b for a, b in zip(found[one], found[PLAIN], strict=True))

    a_scrape = median(
        (a - b) * options.messages * 1e-6
        for a, b in zip(found[SCRAPED], found[COUNTED], strict=True)
    )
    print(f"Two equal cases differ by {times(AGAIN) - 1:+.1%}. A scrape takes {a_scrape:.4f} s.")
    counted = times(COUNTED)
    bounds = [
        Bound(f"{COUNTED}: the time, of that without", counted, 1.02, at_most=True),
        Bound("scraped every second: likewise", counted + a_scrape, 1.03, at_most=True),
    ]
    return 0 if print_bounds(bounds) or not options.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
