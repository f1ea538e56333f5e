"""What misaddressed events cost the others: throughput, duplicates, the slowest call.

python -m benchmarks.misaddressed [--rounds N] [--seconds N] [--rate N] [--url URL] [--check]

Four threads publish chunks of 100. In every second run another thread submits misaddressed events,
and each run with them is compared with the one before it, since a machine drifts. Afterwards the
queue is read, so that what arrived twice or not at all is seen.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import logging
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pika

from benchmarks.tables import Bound, machine, median, print_bounds, progress, table
from outbox import Event, Publisher
from outbox.testing.broker import PrivateBroker

EXCHANGE, QUEUE, FORBIDDEN = "bench-good", "bench-good", "bench-forbidden"
THREADS, CHUNK = 4, 100

Poison = Callable[[int], Event]


@dataclass(frozen=True, slots=True)
class Run:
    """A run: events per second, the slowest call in seconds, and what was wrong in the queue."""

    rate: float
    slowest: float
    duplicates: int
    lost: int


def poison_for(exchange: str, target: str = "x") -> Poison:
    """Return a maker of misaddressed events, numbered."""
    return lambda n: Event(id=f"bad-{n}", target=target, exchange=exchange.format(n=n), body=b"{}")


def measure(url: str, admin_url: str, seconds: float, rate: float, poison: Poison | None) -> Run:
    """Publish for ``seconds`` with ``rate`` misaddressed events a second, or without any."""
    with channel_of(admin_url) as channel:
        channel.queue_purge(QUEUE)
    published = Counter[int]()
    slowest = [0.0] * THREADS
    ended = threading.Event()

    def publish(thread: int) -> None:
        for chunk in itertools.count():
            if ended.is_set():
                break
            events = [
                Event(id=f"{thread}-{chunk}-{n}", target="x", exchange=EXCHANGE, body=b"x" * 200)
                for n in range(CHUNK)
            ]
            begin = time.perf_counter()
            published[thread] += len(publisher.publish(events).published)
            slowest[thread] = max(slowest[thread], time.perf_counter() - begin)

    def misaddress(make: Poison) -> None:
        for n in itertools.count():
            if ended.wait(1 / rate):
                break
            publisher.submit([make(n)])

    with Publisher(url, exchange=EXCHANGE, timeout=30, declare="passive") as publisher:
        publisher.publish([Event(id="warm", target="x", exchange=EXCHANGE, body=b"")])
        threads = [threading.Thread(target=publish, args=(n,)) for n in range(THREADS)]
        if poison is not None:
            threads.append(threading.Thread(target=misaddress, args=(poison,)))
        for thread in threads:
            thread.start()
        time.sleep(seconds)
        ended.set()
        for thread in threads:
            thread.join()
        arrived = Counter(ids_in(admin_url))
    total = published.total() + 1
    return Run(published.total() / seconds, max(slowest), arrived.total() - len(arrived),
               total - len(arrived))  # fmt: skip


@contextlib.contextmanager
def channel_of(url: str) -> Iterator[Any]:
    """Yield a channel of a connection of plain pika."""
    with pika.BlockingConnection(pika.URLParameters(url)) as connection:
        yield connection.channel()


def ids_in(url: str) -> Iterator[str]:
    """Take all messages out of the queue, and yield their ids."""
    with channel_of(url) as channel:
        for method, properties, _body in channel.consume(
            QUEUE, auto_ack=True, inactivity_timeout=1
        ):
            if method is None:
                return
            yield properties.message_id


@contextlib.contextmanager
def brokers(url: str | None) -> Iterator[tuple[str, str, dict[str, Poison]]]:
    """Yield the URL to publish with, an administrator's, and the kinds of misaddressed events."""
    kinds = {
        "a missing exchange": poison_for("bench-missing"),
        "many missing exchanges": poison_for("bench-missing-{n}"),
        "an unroutable target": poison_for(EXCHANGE, "nowhere"),
    }
    if url is not None:
        yield url, url, kinds
        return
    with PrivateBroker() as broker:
        broker.ctl("add_user", "app", "pw")
        write = f"^({EXCHANGE}|bench-missing.*|amq.default)$"
        broker.ctl("set_permissions", "app", ".*", write, ".*")
        kinds["a forbidden exchange"] = poison_for(FORBIDDEN)
        yield broker.url.replace("guest:guest", "app:pw"), broker.url, kinds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3, help="(default: 3)")
    parser.add_argument("--seconds", type=float, default=4, help="of each run (default: 4)")
    parser.add_argument("--rate", type=float, default=20, help="misaddressed/s (default: 20)")
    parser.add_argument("--url", help="a broker to use (default: a private one)")
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    options = parser.parse_args()
    logging.getLogger("outbox").setLevel(logging.CRITICAL)
    rows, bounds = [], []
    with brokers(options.url) as (url, admin_url, kinds):
        with channel_of(admin_url) as channel:
            for exchange in (EXCHANGE, FORBIDDEN):
                channel.exchange_declare(exchange, "direct", durable=True)
            channel.queue_declare(QUEUE, durable=True)
            channel.queue_bind(QUEUE, EXCHANGE, "x")
            print(machine(channel.connection._impl.server_properties["version"]), flush=True)
        for what, poison in kinds.items():
            ratios, runs = [], []
            for _ in range(options.rounds):
                plain = measure(url, admin_url, options.seconds, options.rate, None)
                run = measure(url, admin_url, options.seconds, options.rate, poison)
                ratios.append(run.rate / plain.rate)
                runs.append((plain, run))
                progress(f"{what}: {plain.rate:,.0f}/s without, {run.rate:,.0f}/s with")
            with_it = [run for _, run in runs]
            slowest = median(run.slowest for run in with_it)
            duplicates, lost = (
                sum(getattr(run, name) for run in with_it) for name in ("duplicates", "lost")
            )
            rows.append(
                [
                    what,
                    f"{median(plain.rate for plain, _ in runs):,.0f}",
                    f"{median(run.rate for run in with_it):,.0f}",
                    f"{median(ratios):.2f}",
                    f"{slowest * 1000:,.0f} ms",
                    f"{duplicates:,}",
                    f"{lost:,}",
                ]
            )
            bounds += [
                Bound(f"{what}: throughput with / without", median(ratios), 0.8),
                Bound(f"{what}: delivered twice", duplicates, 0, at_most=True),
                Bound(f"{what}: lost", lost, 0, at_most=True),
                Bound(f"{what}: the slowest call, s", slowest, 0.5, at_most=True),
            ]
    print(f"\n{options.rate:g} misaddressed events/s beside {THREADS} threads, chunks of {CHUNK}\n")
    head = ["misaddressed", "events/s without", "with", "ratio", "slowest call", "twice", "lost"]
    print(table(head, rows), end="\n\n")
    kept = print_bounds(bounds)
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
