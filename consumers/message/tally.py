"""How many messages ended, in which way, and how long they took: counted by each thread for itself.

A thread adds only to its own cells, without a lock: ``x += 1`` of several threads would lose counts
in a Python without a global lock. A reader adds the cells up.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left
from collections.abc import Mapping
from time import perf_counter, time
from typing import NamedTuple

from outbox.consumers.outcome import (
    ACK,
    REJECT,
    Ack,
    Again,
    Dead,
    Outcome,
    ProcessTimeout,
    Reject,
    RemoteError,
)
from outbox.messages.delivery import Delivery
from outbox.telemetry.histogram import BOUNDS, Histogram
from outbox.telemetry.sources import Samples

__all__ = ["OUTCOMES", "Ended", "Tally", "ThreadTally", "name_of"]

OUTCOMES = (
    "acked",
    "duplicate",
    "expired",
    "cancelled",
    "retried",
    "timed_out",
    "requeued",
    "rejected",
    "dead",
    "returned",
)
"""The outcomes that are counted. Each message that ends is counted as one of them:

- ``acked``: processed;
- ``duplicate``: acked unprocessed, since ``deduplicate`` knows that it is done;
- ``expired``: dropped unprocessed, since its ``ttl`` was over;
- ``cancelled``: dropped unprocessed: a task that was cancelled;
- ``retried``: an attempt failed, and another follows;
- ``timed_out``: likewise, because it exceeded its consumer's ``timeout``;
- ``requeued``: the handler returned or raised a requeue;
- ``rejected``: the handler dead-lettered it at once;
- ``dead``: dead-lettered by outbox, after its last attempt for instance;
- ``returned``: begun, but left unsettled or given back; it will be redelivered.
"""


class Ended(NamedTuple):
    """What has become of the messages of a queue so far.

    Attributes:
        outcomes: the number of messages by outcome; see ``OUTCOMES``.
        durations: how long they took, from the begin until they were settled.
        waits: how long after an event occurred its message first began.
    """

    outcomes: Mapping[str, int]
    durations: Histogram
    waits: Histogram


class _Times:
    """A histogram. Its thread adds to it; another one reads it under the tally's lock.

    Numbers usually fall into the bucket of the one before. So these are only counted, between the
    two bounds of that bucket, and the lock is taken to go to another one.

    Attributes:
        above, up_to: the bounds of the bucket of the last number.
        count: the numbers since another bucket was the last, which ``_buckets`` doesn't have yet.
        total: the sum of all numbers.
    """

    __slots__ = ("_buckets", "_index", "above", "count", "total", "up_to")

    def __init__(self) -> None:
        self.above, self.up_to = 0.0, BOUNDS[0]
        self.count = 0
        self.total = 0.0
        self._index = 0
        self._buckets = [0] * (len(BOUNDS) + 1)

    def add(self, number: float) -> None:
        """Add any number; the caller locks."""
        self._buckets[self._index] += self.count
        self.count = 1
        index = self._index = bisect_left(BOUNDS, number)
        self.above = BOUNDS[index - 1] if index else 0.0
        self.up_to = BOUNDS[index] if index < len(BOUNDS) else math.inf
        self.total += max(0.0, number)  # negative: from another machine, whose clock is ahead

    def add_all(self, other: _Times) -> None:
        """Add the numbers of ``other``, while it adds none or goes on; the caller locks."""
        for index, number in enumerate(other._buckets):
            self._buckets[index] += number
        self._buckets[other._index] += other.count
        self.total += other.total

    def read(self) -> Histogram:
        """Return them all; the caller locks."""
        buckets = self._buckets[:]
        buckets[self._index] += self.count
        return Histogram(self.total, tuple(buckets))


class _Cell:
    """What a thread has counted for a queue.

    Durations are those of all outcomes; those of ``others`` than ``acked`` are also counted there.
    """

    __slots__ = ("durations", "others", "waits")

    def __init__(self) -> None:
        self.others = dict.fromkeys(OUTCOMES, 0)
        self.durations = _Times()
        self.waits = _Times()

    def add_all(self, other: _Cell) -> None:
        """Add what ``other`` has counted; the caller locks."""
        for name, number in other.others.items():
            self.others[name] += number
        self.durations.add_all(other.durations)
        self.waits.add_all(other.waits)

    def read(self) -> Ended:
        """Return what was counted; the caller locks."""
        durations = self.durations.read()
        acked = durations.count - sum(self.others.values())
        return Ended({**self.others, "acked": acked}, durations, self.waits.read())


class ThreadTally:
    """The counters of one thread, for its messages alone; made by :meth:`Tally.of_thread`.

    Attributes:
        cells: what it has counted, by queue.
        epoch: the system's time at which ``perf_counter`` was 0.
    """

    __slots__ = ("_lock", "cells", "epoch", "thread")

    def __init__(self, lock: threading.Lock, epoch: float) -> None:
        """Count from zero; readers hold ``lock``."""
        self._lock = lock
        self.cells: dict[str, _Cell] = {}
        self.epoch = epoch
        self.thread = threading.current_thread()

    def ended(self, delivery: Delivery, outcome: Outcome, began: float) -> None:
        """Count a message that is settled.

        Args:
            delivery: its delivery.
            outcome: how it ended.
            began: when it began, by ``time.perf_counter``.
        """
        # The only call for a message, so what the frequent case needs stands here.
        seconds = perf_counter() - began
        try:
            cell = self.cells[delivery.queue]
        except KeyError:
            cell = self._cell_of(delivery.queue)
        if outcome is not ACK:
            self._count(cell, name_of(outcome), seconds)
            if delivery.since is None:
                delivery.read_times()  # it may never have been decoded
        else:
            times = cell.durations
            if times.above < seconds <= times.up_to:
                times.count += 1
                times.total += seconds
            else:
                self._add(times, seconds)
        since = delivery.since
        if since is not None:
            wait = began + self.epoch - since
            times = cell.waits
            if times.above < wait <= times.up_to:
                times.count += 1
                times.total += wait
            else:
                self._add(times, wait)

    def returned(self, delivery: Delivery, began: float) -> None:
        """Count a message that has begun, and is left to be redelivered; see :meth:`ended`."""
        self._count(self._cell_of(delivery.queue), "returned", perf_counter() - began)

    def _count(self, cell: _Cell, name: str, seconds: float) -> None:
        """Count any outcome."""
        with self._lock:
            if name != "acked":
                cell.others[name] += 1
            cell.durations.add(seconds)

    def _add(self, times: _Times, number: float) -> None:
        with self._lock:
            times.add(number)

    def _cell_of(self, queue: str) -> _Cell:
        with self._lock:
            return self.cells.setdefault(queue, _Cell())


class _Local(threading.local):
    tally: ThreadTally | None = None


class Tally:
    """The counters of a worker's messages. Thread-safe."""

    def __init__(self, consumers: Mapping[str, str]) -> None:
        """Count from zero.

        Args:
            consumers: the name of each queue's consumer.
        """
        self._consumers = dict(consumers)
        self._lock = threading.Lock()
        self._local = _Local()
        self._living: list[ThreadTally] = []
        self._ended = {queue: _Cell() for queue in consumers}  # of threads that have ended

    def of_thread(self) -> ThreadTally:
        """Return the counters of this thread, the same ones each time."""
        tally = self._local.tally
        if tally is None:
            tally = self._local.tally = ThreadTally(self._lock, _epoch())
            with self._lock:
                self._fold()
                self._living.append(tally)
        return tally

    def read(self) -> dict[str, Ended]:
        """Return what was counted so far, by queue."""
        epoch = _epoch()  # the system's clock may have been set
        with self._lock:
            self._fold()
            sums: dict[str, _Cell] = {}
            for tally in self._living:
                tally.epoch = epoch
            for cells in (self._ended, *(tally.cells for tally in self._living)):
                for queue, cell in cells.items():
                    sums.setdefault(queue, _Cell()).add_all(cell)
            return {queue: cell.read() for queue, cell in sums.items()}

    def samples(self) -> Samples:
        """Return what was counted so far, as metrics."""
        messages: dict[tuple[str, ...], float] = {}
        durations: dict[tuple[str, ...], tuple[float, ...]] = {}
        waits: dict[tuple[str, ...], tuple[float, ...]] = {}
        for queue, ended in self.read().items():
            labels = (queue, self._consumers.get(queue, ""))
            for outcome, number in ended.outcomes.items():
                messages[*labels, outcome] = number
            durations[labels] = (ended.durations.total, *ended.durations.buckets)
            waits[queue,] = (ended.waits.total, *ended.waits.buckets)
        return {
            "outbox_messages_total": dict(messages),
            "outbox_message_duration_seconds": dict(durations),
            "outbox_message_wait_seconds": dict(waits),
        }

    def _fold(self) -> None:
        """Move the counts of threads that have ended; the caller locks."""
        for tally in [tally for tally in self._living if not tally.thread.is_alive()]:
            self._living.remove(tally)
            for queue, cell in tally.cells.items():
                self._ended.setdefault(queue, _Cell()).add_all(cell)


def _epoch() -> float:
    """Return the system's time at which ``perf_counter`` was 0."""
    return time() - perf_counter()


def name_of(outcome: Outcome) -> str:
    """Return which of ``OUTCOMES`` a settled message counts as."""
    match outcome:
        case Ack(expired=True):
            return "expired"
        case Ack(cancelled=True):
            return "cancelled"
        case Ack(duplicate=duplicate):
            return "duplicate" if duplicate else "acked"
        case Again(error=error):
            return "timed_out" if isinstance(error, ProcessTimeout) else "retried"
        case Dead(error=error, decisive=decisive):
            cause = decisive or error
            if isinstance(cause, RemoteError):
                return "rejected" if cause.kind == Reject.__qualname__ else "dead"
            by_handler = cause is None and outcome.reason == REJECT.reason
            return "rejected" if by_handler or isinstance(cause, Reject) else "dead"
        case _:  # given back at once: it wasn't processed
            return "returned" if getattr(outcome, "delay", 1.0) == 0.0 else "requeued"
