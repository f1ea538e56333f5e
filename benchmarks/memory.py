"""Memory use over a million events, and over two hundred reconnects.

python -m benchmarks.memory [--check]

The events are published in chunks of 1,000 to a queue that keeps the last 10,000. A proxy forces
the reconnects by resetting the connection; between two of them an event is published.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import sys
import threading
import tracemalloc
from pathlib import Path

import pika

from benchmarks.peers import EXCHANGE, TARGET
from benchmarks.peers.outbox_ import Outbox
from benchmarks.tables import Bound, print_bounds, progress
from outbox import Publisher
from outbox.testing.broker import PrivateBroker
from proving.proxy import FaultProxy

_EVENTS, _CHUNK = 1_000_000, 1000
_WARM_UP = 20_000
_RECONNECTS, _WARM_RECONNECTS = 200, 20
_MIB = 1024 * 1024


def resident() -> int:
    """Return the process's resident size in bytes."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def million(url: str) -> Bound:
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel = connection.channel()
    channel.exchange_declare(EXCHANGE, "topic", durable=True)
    channel.queue_declare("bounded", durable=True, arguments={"x-max-length": 10_000})
    channel.queue_bind("bounded", EXCHANGE, TARGET)
    connection.close()
    outbox = Outbox(url)
    outbox.publish(_CHUNK, _WARM_UP // _CHUNK)
    progress(f"publishing {_EVENTS:,} events")
    before = resident()
    seconds = outbox.publish(_CHUNK, _EVENTS // _CHUNK)
    grown = resident() - before
    outbox.close()
    print(
        f"{_EVENTS:,} events in {seconds:.0f} s: the resident size grew by {grown / _MIB:.1f} MiB"
    )
    return Bound("a million events, MiB", grown / _MIB, 32, at_most=True)


def reconnects(url: str) -> list[Bound]:
    connected = threading.Event()
    with (
        FaultProxy(url) as proxy,
        Publisher(
            proxy.url, exchange=EXCHANGE, on_connected=lambda _: connected.set()
        ) as publisher,
        Outbox(url) as outbox,
    ):
        events = outbox.events[:1]

        def reconnect(times: int) -> None:
            for _ in range(times):
                connected.clear()
                proxy.cut()
                publisher.publish(events)
                publisher.drain(10)  # connects to the broker at once
                connected.wait(10)

        publisher.publish(events)
        progress(f"reconnecting {_RECONNECTS} times")
        reconnect(_WARM_RECONNECTS)
        tracemalloc.start()
        gc.collect()
        files, threads = len(os.listdir("/proc/self/fd")), threading.active_count()
        allocated, _ = tracemalloc.get_traced_memory()
        reconnect(_RECONNECTS)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - allocated
        more_files = len(os.listdir("/proc/self/fd")) - files
        more_threads = threading.active_count() - threads
        tracemalloc.stop()
        stats = publisher.stats()
    print(
        f"{stats.reconnects} reconnects: {grown / 1024:.0f} KiB, {more_files} open files, "
        f"{more_threads} threads more"
    )
    return [
        Bound(f"{_RECONNECTS} reconnects, KiB", grown / 1024, 512, at_most=True),
        Bound(f"{_RECONNECTS} reconnects, open files", more_files, 0, at_most=True),
        Bound(f"{_RECONNECTS} reconnects, threads", more_threads, 0, at_most=True),
    ]


def main() -> int:
    logging.getLogger("outbox").setLevel(logging.CRITICAL)  # 200 connections are lost on purpose
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    options = parser.parse_args()
    with PrivateBroker() as broker:
        bounds = [million(broker.url), *reconnects(broker.url)]
    print()
    kept = print_bounds(bounds)
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
