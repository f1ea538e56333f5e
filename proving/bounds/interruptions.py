"""Interruptions at any moment of a block, of publishing and of draining: nothing is lost or stuck.

python -m proving.bounds.interruptions [number]
"""

from __future__ import annotations

import logging
import random
import signal
import sys
import threading
import time
from collections.abc import Callable

from outbox import EventCollector, Publisher, auto_publishing, configure, enqueue_event
from proving.bounds.arrivals import EXCHANGE, TARGET, arrivals
from proving.programs.interrupted import TimeLimit, until_alarm

__all__: list[str] = []

_LATEST = 0.003  # seconds until the signal, at most


class _Caller:
    """A thread's work, in three ways; each returns whether its event must have arrived."""

    def __init__(self, publisher: Publisher, chance: random.Random) -> None:
        self.interruptions = 0
        self.owed: set[str] = set()
        self.possible: set[str] = set()
        self._publisher = publisher
        self._chance = chance

    def in_block(self, event_id: str) -> None:
        def block() -> None:
            with auto_publishing():
                enqueue_event({}, TARGET, id=event_id)

        (self.owed if self._finishes(block) else self.possible).add(event_id)

    def by_publish(self, event_id: str) -> None:
        collector = EventCollector()
        collector.enqueue_event({}, TARGET, id=event_id)
        if not self._finishes(collector.publish):
            collector.publish()
        self.owed.add(event_id)

    def by_drain(self, event_id: str) -> None:
        with auto_publishing():
            enqueue_event({}, TARGET, id=event_id)
        self.owed.add(event_id)
        self._finishes(self._publisher.drain)

    def _finishes(self, action: Callable[[], object]) -> bool:
        finished = until_alarm(self._chance.uniform(0.00002, _LATEST), action)
        self.interruptions += not finished
        return finished


def _raise(*_: object) -> None:
    raise TimeLimit


def main() -> None:
    """Interrupt, and print what became of the events."""
    number = int(sys.argv[1]) if len(sys.argv) > 1 else 2_000
    logging.getLogger("outbox").setLevel(logging.ERROR)
    signal.signal(signal.SIGALRM, _raise)
    began = time.monotonic()
    with arrivals() as arrived:
        publisher = configure(arrived.url, exchange=EXCHANGE)
        caller = _Caller(publisher, random.Random(1))
        ways = (caller.in_block, caller.by_publish, caller.by_drain)
        unit = 0
        while caller.interruptions < number:
            ways[unit % len(ways)](f"{unit}")
            unit += 1
        left = publisher.close(10)
        stuck = [each.name for each in threading.enumerate() if each.name.startswith("outbox")]
        ids = arrived.ids()
    lost = caller.owed - ids.keys()
    invented = ids.keys() - caller.owed - caller.possible
    twice = sum(times > 1 for times in ids.values())
    print(
        f"{caller.interruptions:,} interruptions of {unit:,} calls, "
        f"{time.monotonic() - began:.1f} s: {len(lost) + len(left)} lost, "
        f"{len(invented)} invented, {twice} delivered twice, {len(stuck)} threads stuck"
    )
    sys.exit(1 if lost or left or invented or twice or stuck else 0)


if __name__ == "__main__":
    main()
