"""Consuming beside peers: a trivial handler, 20,000 messages, equal prefetch.

python -m benchmarks.consume [--rounds N] [--check]

Every measurement is a process of its own, in turns: from the moment it asks for messages until
the last one is handled; then the queue is counted, which must be empty. outbox and the bare pika
loop consume the same messages of 200 bytes from the same quorum queue; Dramatiq consumes its own
from its own classic queue.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import dramatiq
import pika

from benchmarks.peers import BODY, EXCHANGE
from benchmarks.peers.dramatiq_ import QUEUE as DRAMATIQ_QUEUE
from benchmarks.peers.dramatiq_ import Dramatiq
from benchmarks.tables import Bound, machine, median, print_bounds, table
from outbox import Event, Publisher
from outbox.consumers import ReceivedEvent, Worker, consumer
from outbox.testing.broker import PrivateBroker

MESSAGES = 20_000
PREFETCH = 200
THREADS = 8
QUEUE = "bench"
_IDLE_SECONDS = 10.0


def counted() -> tuple[Callable[[], None], threading.Event]:
    """Return what to call for each message, and what is set after the last one."""
    lock = threading.Lock()
    done = threading.Event()
    handled = 0

    def handle() -> None:
        nonlocal handled
        with lock:
            handled += 1
            if handled == MESSAGES:
                done.set()

    return handle, done


def make_worker(url: str, handle: Callable[[], None]) -> tuple[Worker, Publisher]:
    publisher = Publisher(url, exchange=EXCHANGE)

    @consumer(QUEUE)
    def handler(event: ReceivedEvent) -> None:
        handle()

    worker = Worker([handler], publisher=publisher, threads=THREADS, prefetch=PREFETCH)
    return worker, publisher


def with_outbox(url: str) -> float:
    handle, done = counted()
    worker, publisher = make_worker(url, handle)
    begin = time.perf_counter()
    worker.start()
    done.wait(120)
    seconds = time.perf_counter() - begin
    worker.stop()
    publisher.close()
    return seconds


def with_pika(url: str) -> float:
    handle, done = counted()
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel: Any = connection.channel()
    channel.basic_qos(prefetch_count=PREFETCH)

    def on_message(_channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
        handle()
        channel.basic_ack(method.delivery_tag)
        if done.is_set():
            channel.stop_consuming()

    begin = time.perf_counter()
    channel.basic_consume(QUEUE, on_message)
    channel.start_consuming()
    seconds = time.perf_counter() - begin
    connection.close()
    return seconds


def with_dramatiq(url: str) -> float:
    done = threading.Event()
    peer = Dramatiq(url, done, MESSAGES)
    worker = dramatiq.Worker(peer.broker, worker_threads=THREADS)
    begin = time.perf_counter()
    worker.start()
    done.wait(120)
    seconds = time.perf_counter() - begin
    worker.stop()
    peer.close()
    return seconds


def idle(url: str) -> float:
    """Return the seconds of CPU that an idle worker takes in 10 seconds, as a percentage."""
    worker, publisher = make_worker(url, lambda: None)
    worker.start()
    time.sleep(3)

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    before = cpu()
    time.sleep(_IDLE_SECONDS)
    percent = (cpu() - before) / _IDLE_SECONDS * 100
    worker.stop()
    publisher.close()
    return percent


CONTENDERS: dict[str, Callable[[str], float]] = {
    f"outbox, {THREADS} threads": with_outbox,
    "bare pika loop, single acks": with_pika,
    f"Dramatiq, {THREADS} threads": with_dramatiq,
}


def fill(url: str, name: str) -> None:
    """Put the messages into the queue that the contender consumes from."""
    if "Dramatiq" in name:
        peer = Dramatiq(url)
        peer.publish(1, MESSAGES)
        peer.close()
        return
    with Publisher(url, exchange=EXCHANGE) as publisher:
        event = Event(id="1", target=QUEUE, exchange=EXCHANGE, body=BODY)
        for _ in range(MESSAGES // 1000):
            publisher.publish([event] * 1000, timeout=60).raise_for_failure()


def left(url: str, name: str) -> int:
    """Return how many messages the contender has left."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    queue = DRAMATIQ_QUEUE if "Dramatiq" in name else QUEUE
    found = connection.channel().queue_declare(queue, passive=True).method.message_count
    connection.close()
    return int(found)


def measured(url: str, name: str) -> float:
    """Return what the contender prints in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.consume", "--run", name, "--url", url]
    environment = {**os.environ, "dramatiq_queue_prefetch": str(PREFETCH)}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, timeout=180, check=True
    )
    return float(done.stdout)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="that count (default: 5)")
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run:
        print({**CONTENDERS, "idle": idle}[options.run](options.url))
        return 0
    found: dict[str, list[float]] = defaultdict(list)
    with PrivateBroker() as broker:
        connection: Any = pika.BlockingConnection(pika.URLParameters(broker.url))
        print(machine(connection._impl.server_properties["version"]), flush=True)
        connection.close()
        idle_percent = measured(broker.url, "idle")  # which declares the queue, too
        for _ in range(options.rounds):
            for name in CONTENDERS:
                fill(broker.url, name)
                found[name].append(MESSAGES / measured(broker.url, name))
                remaining = left(broker.url, name)
                if remaining:
                    raise RuntimeError(f"{name} has left {remaining} messages")
    rates = {name: median(values) for name, values in found.items()}
    print(f"\n{MESSAGES:,} messages, prefetch {PREFETCH}\n")
    rows = [[name, f"{rate:,.0f}"] for name, rate in rates.items()]
    print(table(["", "messages per second"], rows))
    ours, bare, theirs = rates.values()
    print()
    kept = print_bounds(
        [
            Bound("of the bare pika loop", ours / bare, 1.2),
            Bound("of Dramatiq", ours / theirs, 3),
            Bound("an idle worker, % of a core", idle_percent, 1, at_most=True),
        ]
    )
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
