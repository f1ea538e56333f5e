"""What a worker's counters cost a message: beside none, and while Prometheus scrapes them.

python -m benchmarks.counting [--rounds N] [--messages N] [--check]

The cases take turns in one process, in pairs, with a handler that does nothing and one thread, on
one core if the system allows that. Compared is the processor time of the process, which others on
the machine disturb less than the speed. Two equal cases show how much of a difference is noise.
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
COUNTED, SCRAPED = "with counters", "scraped every second"
_SCRAPED_EVERY = 1.0  # seconds


def consumed(publisher: Publisher, messages: int) -> float:
    """Return the processor time of a message, in microseconds, from the first to the last."""
    used: list[float] = []
    left = messages
    done = threading.Event()

    def handle(_: ReceivedEvent) -> None:
        nonlocal left
        left -= 1
        if left == messages - 1 or left == 0:
            used.append(time.process_time())
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
def scraped() -> Iterator[None]:
    """Render all metrics in a thread, as a scrape does."""
    registry = CollectorRegistry()
    PrometheusCollector().register(registry)
    ended = threading.Event()

    def scrape() -> None:
        while True:
            generate_latest(registry)
            if ended.wait(_SCRAPED_EVERY):
                return

    thread = threading.Thread(target=scrape)
    thread.start()
    yield
    ended.set()
    thread.join()


def not_counted() -> AbstractContextManager[object]:
    def ended(self: ThreadTally, delivery: Delivery, outcome: Outcome, began: float) -> None:
        pass

    return patch.object(ThreadTally, "ended", ended)


CASES: dict[str, Callable[[], AbstractContextManager[object]]] = {
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
                with case():
                    cpu = consumed(publisher, options.messages)
                progress(f"round {number}, {name}: {cpu:.1f} us")
                if number:  # the first warms up
                    found[name].append(cpu)
    print(table(["", "us of processor time"], [[n, f"{median(v):.1f}"] for n, v in found.items()]))

    def times(one: str) -> float:
        return median(a / b for a, b in zip(found[one], found[PLAIN], strict=True))

    print(f"Two equal cases differ by {times(AGAIN) - 1:+.1%}.")
    bounds = [
        Bound(f"{COUNTED}: the time, of that without", times(COUNTED), 1.02, at_most=True),
        Bound(f"{SCRAPED}: the time, of that without", times(SCRAPED), 1.03, at_most=True),
    ]
    return 0 if print_bounds(bounds) or not options.check else 1


if __name__ == "__main__":
    raise SystemExit(main())
