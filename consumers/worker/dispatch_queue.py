"""Arrivals: messages that have been delivered to a worker and that it has not begun yet.

Where queues have an order (``-Q high,medium,low``), the messages of a queue begin only when none of
a queue before it waits: neither here, nor, as far as a worker can know, in the broker. That sends
so many messages of a queue ahead and no more (the prefetch): while that window is well filled there
may be others behind it, and for a moment after it was, more may be on their way.

Where a queue has priorities, its messages begin in their order: those that came ahead of a more
urgent one, and wait here, let it pass.
"""

from __future__ import annotations

import heapq
import itertools
import queue
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from outbox.messages.delivery import Delivery, QueueSpec

__all__ = ["Arrivals", "OrderedArrivals", "make_arrivals"]

_ON_ITS_WAY = 0.25
"""Seconds in which a broker answers an ack with the next message, on any network worth a worker."""


class Arrivals(Protocol):
    """Takes deliveries on one thread and hands them out to others. Thread-safe."""

    def put(self, delivery: Delivery | None) -> None:
        """Take a delivery; None tells one of the threads to end."""
        ...

    def get(self) -> Delivery | None:
        """Wait for the next delivery, or None."""
        ...


def make_arrivals(
    queues: Sequence[QueueSpec], out: Callable[[str], int], prefetch: int
) -> Arrivals:
    """Return what holds the messages of ``queues``.

    Args:
        queues: with their ranks and priorities; without any, messages are handed out as they come.
        out: tells how many messages of a queue the broker has sent that are not settled.
        prefetch: of each queue.
    """
    if len({one.rank for one in queues}) == 1 and all(one.max_priority is None for one in queues):
        return queue.SimpleQueue()
    return OrderedArrivals(queues, out, prefetch)


class OrderedArrivals:
    """Hands out deliveries by the rank of their queue, then by priority, then as they came."""

    def __init__(
        self,
        queues: Sequence[QueueSpec],
        out: Callable[[str], int],
        prefetch: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Hold nothing yet; see :func:`make_arrivals`."""
        self._specs: Mapping[str, QueueSpec] = {one.name: one for one in queues}
        self._out = out
        self._filled = max(1, prefetch // 2)
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, int, Delivery]] = []
        self._number = itertools.count()
        self._ends = 0
        self._generation: int | None = None
        self._filled_at = dict.fromkeys(self._specs, 0.0)

    def put(self, delivery: Delivery | None) -> None:
        """Take a delivery; with None one of the threads gets None, ahead of what waits."""
        with self._changed:
            if delivery is None:
                self._ends += 1
            else:
                spec = self._specs[delivery.queue]
                urgency = 0
                if spec.max_priority is not None:
                    urgency = -min(delivery.priority or 0, spec.max_priority)
                key = (spec.rank, urgency, next(self._number), delivery)
                heapq.heappush(self._waiting, key)
                self._note(delivery)
            self._changed.notify()

    def get(self) -> Delivery | None:
        """Wait for the next delivery that may begin, or None."""
        with self._changed:
            while True:
                if self._ends:
                    self._ends -= 1
                    return None
                wait = None
                if self._waiting:
                    wait = self._wait_for_better(self._waiting[0][0])
                    if wait <= 0:
                        found = heapq.heappop(self._waiting)[-1]
                        if self._waiting:  # whoever was woken for it may have waited for better
                            self._changed.notify()
                        return found
                self._changed.wait(wait)

    def _note(self, delivery: Delivery) -> None:
        now = self._clock()
        if delivery.generation != self._generation:
            # The first message over a connection: those of other queues are on their way.
            self._generation = delivery.generation
            self._filled_at = dict.fromkeys(self._specs, now)
        elif self._out(delivery.queue) >= self._filled:
            self._filled_at[delivery.queue] = now

    def _wait_for_better(self, rank: int) -> float:
        """Return for how many seconds a message of ``rank`` is not to begin; 0 or less for none."""
        if not rank:
            return 0.0
        now = self._clock()
        wait = 0.0
        for name, spec in self._specs.items():
            if spec.rank < rank:
                if self._out(name) >= self._filled:
                    self._filled_at[name] = now
                wait = max(wait, self._filled_at[name] + _ON_ITS_WAY - now)
        return wait
