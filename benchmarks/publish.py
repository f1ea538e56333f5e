"""Publishing compared with peers, in one run on one private broker.

python -m benchmarks.publish [--rounds N] [--check]

Each round measures every contender with every chunk size, in rotating order; the figures are
medians over the rounds. After each measurement the queue is counted, so that no contender is fast
because it loses events, and emptied.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import pika

from benchmarks.peers import EXCHANGE, Peer
from benchmarks.peers.aio_pika_ import AioPika, AioPikaGathered
from benchmarks.peers.dramatiq_ import Dramatiq
from benchmarks.peers.kombu_ import Kombu
from benchmarks.peers.outbox_ import Outbox, OutboxEndToEnd
from benchmarks.peers.pika_blocking import PikaBlocking
from benchmarks.peers.raw_socket import RawSocket
from benchmarks.tables import Bound, machine, median, print_bounds, progress, table
from outbox.testing.broker import PrivateBroker

_EVENTS = {1: 500, 10: 3000, 100: 10_000, 1000: 20_000}
"""The number of events in a measurement, by chunk size."""

_SINGLE = 1000  # timed flushes of a single event
_CALLERS, _CALLERS_CHUNK, _CALLERS_TIMES = 8, 10, 100
_QUEUES: dict[str, dict[str, Any]] = {"quorum": {"x-queue-type": "quorum"}, "classic": {}}


class Broker:
    """The broker's exchange with one queue at a time."""

    def __init__(self, url: str) -> None:
        self._connection = pika.BlockingConnection(pika.URLParameters(f"{url}?heartbeat=600"))
        self._channel = self._connection.channel()
        self._channel.exchange_declare(EXCHANGE, "topic", durable=True)
        properties: Any = self._connection._impl.server_properties
        self.version = properties["version"]

    def use(self, queue: str) -> None:
        """Route events only to ``queue``, which is named after its type."""
        for name in _QUEUES:
            self._channel.queue_delete(name)
        self._channel.queue_declare(queue, durable=True, arguments=_QUEUES[queue])
        self._channel.queue_bind(queue, EXCHANGE, "bench.#")

    def take(self, queue: str, expected: int) -> None:
        """Check that all published events have arrived, and remove them."""
        deadline = time.monotonic() + 10
        while True:
            found = self._channel.queue_declare(queue, passive=True).method.message_count
            if found == expected:
                break
            if time.monotonic() > deadline:
                raise RuntimeError(f"{found} of {expected} events are in {queue}")
            time.sleep(0.02)
        self._channel.queue_purge(queue)

    def close(self) -> None:
        """Disconnect."""
        self._connection.close()


def rates(broker: Broker, url: str, queue: str, rounds: int) -> dict[tuple[str, int], float]:
    """Return events per second by contender name and chunk size."""
    peers: list[Peer] = [
        one(url)
        for one in (
            RawSocket, Outbox, OutboxEndToEnd, AioPikaGathered, AioPika, PikaBlocking, Kombu,
            Dramatiq,
        )
    ]  # fmt: skip
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for chunk, events in _EVENTS.items():
            contenders = [peer for peer in peers if chunk in peer.chunks]
            turn = number % len(contenders)
            for peer in contenders[turn:] + contenders[:turn]:
                seconds = peer.publish(chunk, events // chunk)
                broker.take(peer.queue or queue, events)
                progress(
                    f"round {number} ({queue}), {peer.name}, chunks of {chunk}: "
                    f"{events / seconds:,.0f} events per second"
                )
                if number:  # the first round warms up
                    found[peer.name, chunk].append(events / seconds)
    for peer in peers:
        peer.close()
    return {key: median(values) for key, values in found.items()}


def single_flush(broker: Broker, url: str, queue: str) -> tuple[float, float]:
    """Return the median seconds to flush a single event, with pika and with outbox, in turns."""
    pika_, outbox = PikaBlocking(url), Outbox(url)
    times: dict[Any, list[float]] = {pika_: [], outbox: []}
    for _ in range(_SINGLE):
        for peer in times:
            times[peer].append(peer.publish(1, 1))
    broker.take(queue, 2 * _SINGLE)
    for peer in times:
        peer.close()
    return statistics.median(times[pika_]), statistics.median(times[outbox])


def callers(broker: Broker, url: str, queue: str, rounds: int) -> dict[str, float]:
    """Return events per second of one thread, eight threads, and eight tasks."""
    outbox = Outbox(url)
    chunk, times = _CALLERS_CHUNK, _CALLERS_TIMES
    ways: dict[str, tuple[int, Callable[[], float]]] = {
        "one thread": (1, lambda: outbox.publish(chunk, times)),
        "eight threads": (_CALLERS, lambda: outbox.publish_in_threads(chunk, times, _CALLERS)),
        "eight tasks": (_CALLERS, lambda: outbox.publish_in_tasks(chunk, times, _CALLERS)),
    }
    found: dict[str, list[float]] = defaultdict(list)
    for number in range(rounds + 1):
        for name, (count, run) in ways.items():
            seconds = run()
            broker.take(queue, count * times * chunk)
            progress(f"round {number}, {name}: {seconds:.1f} s")
            if number:  # the first round warms up
                found[name].append(count * times * chunk / seconds)
    outbox.close()
    return {name: median(values) for name, values in found.items()}


def rates_table(found: dict[tuple[str, int], float]) -> str:
    rows = []
    for name in dict.fromkeys(name for name, _ in found):
        cells = [f"{found[name, size]:,.0f}" if (name, size) in found else "" for size in _EVENTS]
        rows.append([name, *cells])
    return table(["events per second", *(f"chunks of {size}" for size in _EVENTS)], rows)


def bounds(queue: str, found: dict[tuple[str, int], float]) -> list[Bound]:
    raw, ours = RawSocket.name, Outbox.name
    one_by_one = max(found[peer.name, 1] for peer in (PikaBlocking, AioPika, Kombu, Dramatiq))
    gathered = max(found[AioPikaGathered.name, size] for size in AioPikaGathered.chunks)
    if queue == "classic":
        return [
            Bound(f"classic, {size}: of the raw socket", found[ours, size] / found[raw, size], 0.6)
            for size in (100, 1000)
        ]
    return [
        Bound("quorum, 1000: of the raw socket", found[ours, 1000] / found[raw, 1000], 0.75),
        Bound("quorum, 1000: best one by one", found[ours, 1000] / one_by_one, 15),
        Bound("quorum, 1000: best gathered", found[ours, 1000] / gathered, 3),
        Bound("quorum, 100: of the raw socket", found[ours, 100] / found[raw, 100], 0.75),
        Bound("quorum, 10: best one by one", found[ours, 10] / one_by_one, 6),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="that count (default: 5)")
    parser.add_argument("--check", action="store_true", help="fail when a bound is missed")
    options = parser.parse_args()
    wanted: list[Bound] = []
    with PrivateBroker() as private:
        broker = Broker(private.url)
        print(machine(broker.version), flush=True)
        for queue in _QUEUES:
            broker.use(queue)
            found = rates(broker, private.url, queue, options.rounds)
            print(f"\n**{queue} queue**\n\n{rates_table(found)}\n", flush=True)
            wanted += bounds(queue, found)
        broker.use("quorum")
        with_pika, with_outbox = single_flush(broker, private.url, "quorum")
        by_callers = callers(broker, private.url, "quorum", options.rounds)
        broker.close()
    print(
        f"one event's flush, median: pika {with_pika * 1e6:.0f} us, "
        f"outbox {with_outbox * 1e6:.0f} us"
    )
    for name, rate in by_callers.items():
        print(f"{name}, chunks of {_CALLERS_CHUNK}: {rate:,.0f} events per second")
    one, threads, tasks = by_callers.values()
    wanted += [
        Bound("one event's flush: of pika's", with_outbox / with_pika, 1.25, at_most=True),
        Bound("eight threads: of one", threads / one, 2.2),
        Bound("eight tasks: of eight threads", tasks / threads, 0.8),
    ]
    print()
    kept = print_bounds(wanted)
    return 1 if options.check and not kept else 0


if __name__ == "__main__":
    sys.exit(main())
