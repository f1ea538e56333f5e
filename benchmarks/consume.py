"""Consuming compared with peers: a trivial handler, 20,000 messages, equal prefetch.

python -m benchmarks.consume [--rounds N] [--only NAME,...] [--check]

The contenders take turns. Each measurement runs in a new process and is timed from the first to the
last handled message. Afterwards the queue must be empty, and the queue of follow-on messages must
have one for each. ``benchmarks/peers/consuming`` sets up the contenders.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pika
import pika.exceptions

from benchmarks.peers.consuming import CONTENDERS, EXCHANGE, FOLLOW_ON, PREFETCH, QUEUE, Contender
from benchmarks.tables import Bound, machine, median, print_bounds, progress, table
from outbox import Publisher
from outbox.consumers import Consumer, ReceivedEvent
from outbox.testing.broker import PrivateBroker

MESSAGES = 20_000
IDLE = "idle"
_IDLE_SECONDS = 10.0

BOUNDS = (
    ("threads", "pika", 1.2),
    ("threads+", "pika", 1.2),
    ("threads", "dramatiq", 3),
    ("threads", "celery", 5),
    ("threads", "faststream", 4),
    ("asyncio", "aio-pika", 0.8),
    ("asyncio", "faststream", 1.5),
    ("threads, auto", "dramatiq, follow-on", 3),
)
"""The contender, the peer, and the minimum ratio of their speeds."""


def idle(url: str) -> float:
    """Return the share of a core that an idle worker uses over 10 seconds, in percent."""
    from benchmarks.peers.consuming.outbox_ import make_worker

    class Idle(Consumer):
        queue = QUEUE

        def process(self, event: ReceivedEvent) -> None:
            raise NotImplementedError("there are no messages")

    def cpu() -> float:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return used.ru_utime + used.ru_stime

    with Publisher(url, exchange=EXCHANGE) as publisher:
        worker = make_worker(Idle, publisher)
        worker.start()
        time.sleep(3)
        before = cpu()
        time.sleep(_IDLE_SECONDS)
        percent = (cpu() - before) / _IDLE_SECONDS * 100
        worker.stop()
    return percent


class Queues:
    """The broker's queues, checked between measurements."""

    def __init__(self, url: str) -> None:
        self._connection: Any = pika.BlockingConnection(pika.URLParameters(f"{url}?heartbeat=0"))
        self.version: str = self._connection._impl.server_properties["version"]

    def declare(self) -> None:
        """Declare the queue of follow-on messages, as the workers declare theirs."""
        channel = self._connection.channel()
        arguments = {"x-queue-type": "quorum"}
        channel.queue_declare(FOLLOW_ON, durable=True, arguments=arguments)
        channel.queue_bind(FOLLOW_ON, EXCHANGE, FOLLOW_ON)
        channel.close()

    def check(self, contender: Contender, name: str, messages: int, sent: int) -> None:
        """Raise unless the contender's queues hold the expected messages; a quorum queue may lag.

        A quorum queue ignores acks that are written just before a channel is closed, so a peer that
        ends like this may leave up to a prefetch of messages.
        """
        wanted = {contender.queue: messages}
        if contender.sends_to:
            wanted[contender.sends_to] = sent
        may_be_more = 0 if contender.is_ours or messages else PREFETCH
        deadline = time.monotonic() + 10
        while True:
            found = {queue: self._count(queue) for queue in wanted}
            if all(0 <= found[queue] - count <= may_be_more for queue, count in wanted.items()):
                return
            if time.monotonic() > deadline:
                raise RuntimeError(f"{name}: the queues hold {found}, not {wanted}")
            time.sleep(0.05)

    def purge(self, queue: str) -> None:
        if queue and self._count(queue):
            channel = self._connection.channel()
            channel.queue_purge(queue)
            channel.close()

    def _count(self, queue: str) -> int:
        channel = self._connection.channel()
        try:
            count = int(channel.queue_declare(queue, passive=True).method.message_count)
        except pika.exceptions.ChannelClosedByBroker:  # not declared yet
            return 0
        channel.close()
        return count


def measured(url: str, name: str) -> float:
    """Run the contender in a new process; return the number that it prints."""
    command = [sys.executable, "-m", "benchmarks.consume", "--run", name, "--url", url]
    environment = {**os.environ, "dramatiq_queue_prefetch": str(PREFETCH)}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, text=True, timeout=330, check=True
    )
    return float(done.stdout)


def turn(url: str, queues: Queues, name: str) -> float:
    """Measure a contender once; return its messages per second."""
    contender = CONTENDERS[name]
    queues.purge(contender.sends_to)
    queues.purge(contender.queue)
    contender.put(url, MESSAGES)
    queues.check(contender, name, MESSAGES, 0)
    rate = measured(url, name)
    queues.check(contender, name, 0, MESSAGES)
    return rate


def report(rates: Mapping[str, float]) -> None:
    """Print the rates as tables."""
    for title, is_one in (
        ("a handler that does nothing", lambda one: not one.sends_to),
        (
            "a handler that publishes one message, confirmed before the ack",
            lambda one: one.sends_to,
        ),
    ):
        rows = [
            [CONTENDERS[name].name, f"{rate:,.0f}"]
            for name, rate in rates.items()
            if is_one(CONTENDERS[name])
        ]
        if rows:
            print(f"\n{MESSAGES:,} messages, prefetch {PREFETCH}, {title}\n")
            print(table(["", "messages per second"], rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="that count (default: 5)")
    parser.add_argument("--only", help=f"some of: {'; '.join(CONTENDERS)}; separated by ;")
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.run == IDLE:
        print(idle(options.url))
        return 0
    if options.run:
        print(CONTENDERS[options.run].consume(options.url, MESSAGES))
        return 0
    names = options.only.split(";") if options.only else list(CONTENDERS)
    found: dict[str, list[float]] = defaultdict(list)
    with PrivateBroker() as broker:
        queues = Queues(broker.url)
        print(machine(queues.version), flush=True)
        idle_percent = measured(broker.url, IDLE)  # also declares the queue
        queues.declare()
        for number in range(options.rounds):
            for name in names:
                rate = turn(broker.url, queues, name)
                progress(f"round {number + 1}, {name}: {rate:,.0f} messages per second")
                found[name].append(rate)
    rates = {name: median(values) for name, values in found.items()}
    report(rates)
    print()
    bounds = [
        Bound(f"{one}: of {other}", rates[one] / rates[other], bound)
        for one, other, bound in BOUNDS
        if one in rates and other in rates
    ]
    kept = print_bounds(
        [*bounds, Bound("an idle worker, % of a core", idle_percent, 1, at_most=True)]
    )
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
