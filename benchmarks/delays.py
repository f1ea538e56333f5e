"""Delays over RabbitMQ: the lateness of events with a random delay.

python -m benchmarks.delays [--events N] [--seconds N] [--check]

All events are published in one chunk, to a broker without a delay ladder. Their lateness is
measured from the requested moment, and from the end of its second, since delays are rounded up to
whole seconds. A worker of outbox takes the times.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import threading
import time
from typing import Any

import pika

from benchmarks.peers import EXCHANGE
from benchmarks.tables import Bound, machine, median, print_bounds, progress, table
from outbox import EventCollector, Publisher
from outbox.consumers import ReceivedEvent, Worker, consumer
from outbox.testing.broker import PrivateBroker

QUEUE = "bench"


def measure(url: str, events: int, seconds: float) -> tuple[list[tuple[float, float]], float]:
    """Return each event's lateness after its moment and its second, and the publishing time."""
    arrived: dict[str, float] = {}
    all_here = threading.Event()

    @consumer(QUEUE, topics=["bench.delayed"])
    def handler(event: ReceivedEvent) -> None:
        arrived.setdefault(event.id, time.time())
        if len(arrived) == events:
            all_here.set()

    with Publisher(url, exchange=EXCHANGE) as publisher:
        worker = Worker([handler], publisher=publisher)
        worker.start()
        warm = EventCollector(publisher=publisher)
        while True:  # until the queue is bound
            warm.enqueue_event({}, "bench.delayed", unroutable="ignore")
            if warm.publish().published:
                break
        time.sleep(0.5)
        arrived.clear()
        spread = random.Random(1)
        collector = EventCollector(publisher=publisher)
        due = {}
        for number in range(events):
            event = collector.enqueue_event(
                {"n": number}, "bench.delayed", delay=spread.uniform(1, seconds)
            )
            if event.deliver_at is not None:
                enqueued, moment = event.occurred_at.timestamp(), event.deliver_at.timestamp()
                due[event.id] = (moment, enqueued + math.ceil(moment - enqueued))
        begin = time.perf_counter()
        collector.publish().raise_for_failure()
        took = time.perf_counter() - begin
        progress(f"{events:,} events published; the last is due in {seconds:g} s")
        all_here.wait(seconds + 30)
        worker.stop()
    late = [
        (arrived[one] - moment, arrived[one] - second)
        for one, (moment, second) in due.items()
        if one in arrived
    ]
    return late, took


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--events", type=int, default=1000, help="(default: 1000)")
    parser.add_argument("--seconds", type=float, default=20, help="the longest (default: 20)")
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    options = parser.parse_args()
    with PrivateBroker() as broker:
        connection: Any = pika.BlockingConnection(pika.URLParameters(broker.url))
        print(machine(connection._impl.server_properties["version"]), flush=True)
        connection.close()
        late, took = measure(broker.url, options.events, options.seconds)
    print(f"\n{options.events:,} events, 1 to {options.seconds:g} s ahead\n")
    by_moment, by_second = (sorted(one) for one in zip(*late, strict=True))
    rows = [
        [what, f"{pick(by_moment) * 1000:,.0f} ms", f"{pick(by_second) * 1000:,.0f} ms"]
        for what, pick in (
            ("earliest", min),
            ("median", median),
            ("99 %", lambda values: values[int(len(values) * 0.99)]),
            ("latest", max),
        )
    ]
    print(table(["arrived after", "the moment asked for", "its second"], rows))
    print(f"\npublished, the ladder made, within {took:.2f} s\n")
    kept = print_bounds(
        [
            Bound("arrived", len(late), options.events),
            Bound(
                "before the moment asked for", sum(one < 0 for one in by_moment), 0, at_most=True
            ),
            Bound("the latest, s after its second", by_second[-1], 1, at_most=True),
        ]
    )
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
