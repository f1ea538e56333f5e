"""DispatchQueue: messages that have been delivered to a worker, and that it has not started yet.

If queues have an order (``-Q high,medium,low``), a message starts only while no message of an
earlier queue waits: neither here nor, as far as a worker can know, in the broker. The broker sends
at most the prefetch of a queue ahead: while that window is at least half full, more messages may
wait behind it, and for a moment after that, more may be on their way.

If a queue has priorities, its messages start in the order of their priority: while they wait here,
a more urgent one that arrives later overtakes them.
"""

from __future__ import annotations

import contextlib
import enum
import heapq
import itertools
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from outbox.messages.delivery import Delivery, QueueSpec

__all__ = [
    "DispatchQueue",
    "OrderedDispatchQueue",
    "PlainDispatchQueue",
    "make_dispatch_queue",
]

_AHEAD = -256  # more urgent than any priority
_ON_ITS_WAY = 0.25
"""Seconds within which a broker answers an ack with the next message, on any usable network."""


class DispatchQueue(Protocol):
    """A queue from the thread that receives deliveries to those that process them. Thread-safe."""

    def put(self, delivery: Delivery | None) -> None:
        """Add a delivery, or None to end one of the threads."""
        ...

    def put_ahead(self, delivery: Delivery) -> None:
        """Add a delivery ahead of others: a message that was begun and has waited."""
        ...

    def get(self) -> Delivery | None:
        """Wait for the next delivery, or None."""
        ...

    def waiting(self) -> list[Delivery]:
        """Return the deliveries that wait in it, except those put ahead."""
        ...


def make_dispatch_queue(
    queues: Sequence[QueueSpec], out: Callable[[str], int], prefetch: int
) -> DispatchQueue:
    """Return the arrivals for the messages of ``queues``.

    Args:
        queues: the queues; if all ranks are equal and there are no priorities, messages are handed
            out in the order of arrival.
        out: returns the number of messages of a queue that the broker has sent and that will be
            settled soon.
        prefetch: the prefetch of each queue.
    """
    if len({spec.rank for spec in queues}) == 1 and all(
        spec.max_priority is None for spec in queues
    ):
        return PlainDispatchQueue()
    return OrderedDispatchQueue(queues, out, prefetch)


class _Sign(enum.Enum):
    AHEAD = enum.auto()


class PlainDispatchQueue:
    """DispatchQueue in the order of arrival.

    Nearly all deliveries pass through a queue in C alone. For each one that is put ahead, a sign
    goes through that queue: it stands for the first of those ahead, or else of those overtaken,
    which a thread had taken out when others were ahead. So there are as many signs as both lines
    have deliveries.

    Attributes:
        put: adds a delivery at the end; None makes a thread get None when it is done with the rest.
    """

    def __init__(self) -> None:
        """Create an empty queue."""
        self._arrived: queue.SimpleQueue[Delivery | _Sign | None] = queue.SimpleQueue()
        self.put: Callable[[Delivery | None], None] = self._arrived.put
        self._lock = threading.Lock()
        self._ahead: deque[Delivery] = deque()
        self._overtaken: deque[Delivery] = deque()

    def put_ahead(self, delivery: Delivery) -> None:
        """Add a delivery ahead of those of ``put()``, behind others of this kind."""
        self._ahead.append(delivery)
        self._arrived.put(_Sign.AHEAD)

    def get(self) -> Delivery | None:
        """Wait for the next delivery, or None."""
        arrived = self._arrived.get()
        if arrived.__class__ is Delivery and not self._ahead and not self._overtaken:
            return arrived
        with self._lock:
            if arrived is None:
                return None
            if isinstance(arrived, Delivery):
                self._overtaken.append(arrived)
            return (self._ahead or self._overtaken).popleft()

    def waiting(self) -> list[Delivery]:
        """Return the deliveries of ``put()`` that wait."""
        with self._lock:
            others: list[_Sign | None] = []
            with contextlib.suppress(queue.Empty):
                while True:
                    arrived = self._arrived.get_nowait()
                    if isinstance(arrived, Delivery):
                        self._overtaken.append(arrived)
                        others.append(_Sign.AHEAD)
                    else:
                        others.append(arrived)
            for other in others:
                self._arrived.put(other)
            return list(self._overtaken)


class OrderedDispatchQueue:
    """DispatchQueue ordered by the rank of their queue, then by priority, then by arrival."""

    def __init__(
        self,
        queues: Sequence[QueueSpec],
        out: Callable[[str], int],
        prefetch: int,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Create empty arrivals; see :func:`make_dispatch_queue`."""
        self._specs: Mapping[str, QueueSpec] = {spec.name: spec for spec in queues}
        self._out = out
        self._filled = max(1, prefetch // 2)
        self._clock = clock
        self._changed = threading.Condition()
        self._waiting: list[tuple[int, int, int, Delivery]] = []
        self._number = itertools.count()
        self._ends = 0
        self._generation = -1
        self._filled_at = dict.fromkeys(self._specs, 0.0)
        self._was_filled = dict.fromkeys(self._specs, False)

    def put(self, delivery: Delivery | None) -> None:
        """Add a delivery; None makes one of the threads get None, ahead of what waits."""
        with self._changed:
            if delivery is None:
                self._ends += 1
            else:
                spec = self._specs[delivery.queue]
                urgency = 0
                if spec.max_priority is not None:
                    urgency = -min(delivery.priority or 0, spec.max_priority)
                self._push(delivery, urgency)
                self._note(delivery)
            self._changed.notify()

    def put_ahead(self, delivery: Delivery) -> None:
        """Add a delivery ahead of the others of its queue and of queues with the same rank."""
        with self._changed:
            self._push(delivery, _AHEAD)
            self._changed.notify()

    def waiting(self) -> list[Delivery]:
        """Return the deliveries of ``put()`` that wait."""
        with self._changed:
            return [entry[-1] for entry in self._waiting if entry[1] != _AHEAD]

    def get(self) -> Delivery | None:
        """Wait for the next delivery that may start, or None."""
        with self._changed:
            while True:
                if self._ends:
                    self._ends -= 1
                    return None
                wait = None
                if self._waiting:
                    wait = self._wait_for_better(self._waiting[0][0])
                    if wait <= 0:
                        next_delivery = heapq.heappop(self._waiting)[-1]
                        self._look_at(next_delivery.queue, self._clock())
                        # This thread may have used up the notification of a delivery that is still
                        # here, as each put() wakes only one thread.
                        if self._waiting:
                            self._changed.notify()
                        return next_delivery
                self._changed.wait(wait)

    def _push(self, delivery: Delivery, urgency: int) -> None:
        rank = self._specs[delivery.queue].rank
        heapq.heappush(self._waiting, (rank, urgency, next(self._number), delivery))

    def _note(self, delivery: Delivery) -> None:
        now = self._clock()
        if delivery.generation > self._generation:
            # The first message of a channel: those of other queues may be on their way.
            self._generation = delivery.generation
            self._filled_at = dict.fromkeys(self._specs, now)
        self._look_at(delivery.queue, now)

    def _look_at(self, name: str, now: float) -> None:
        """Note whether the window of a queue is at least half full.

        If it was at the last look, it may have been so until just now: messages are settled
        without a word to this class.
        """
        is_filled = self._out(name) >= self._filled
        if is_filled or self._was_filled[name]:
            self._filled_at[name] = now
        self._was_filled[name] = is_filled

    def _wait_for_better(self, rank: int) -> float:
        """Return the seconds until a message of ``rank`` may start; 0 or less if it may now."""
        if not rank:
            return 0.0
        now = self._clock()
        wait = 0.0
        for name, spec in self._specs.items():
            if spec.rank < rank:
                self._look_at(name, now)
                wait = max(wait, self._filled_at[name] + _ON_ITS_WAY - now)
        return wait
