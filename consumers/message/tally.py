"""How many messages ended, in which way, and how long they took: counted by each thread for itself.

A thread writes only to its own cells, without a lock: ``x += 1`` of several threads would lose
counts in a Python without a global lock. A reader adds the cells up.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Mapping
from time import perf_counter, time
from typing import Any, NamedTuple

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
from outbox.messages.headers import (
    ATTEMPT,
    DELAY_EXCHANGE,
    DELAY_HEADERS,
    HEADER_OCCURRED_AT,
)
from outbox.telemetry.histogram import BOUNDS, Histogram
from outbox.telemetry.sources import Samples

__all__ = ["OUTCOMES", "Ended", "Tally", "name_of"]

OUTCOMES = (
    "acked",
    "duplicate",
    "expired",
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
- ``retried``: an attempt failed, and another follows;
- ``timed_out``: likewise, because it exceeded its consumer's ``timeout``;
- ``requeued``: the handler returned or raised a requeue;
- ``rejected``: the handler dead-lettered it at once;
- ``dead``: dead-lettered by outbox, after its last attempt for instance;
- ``returned``: begun, but left unsettled or given back; it will be redelivered.
"""
_QUICK = BOUNDS[0]
_ACKED, _RETURNED = OUTCOMES.index("acked"), OUTCOMES.index("returned")


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


class _Cell:
    """What one thread has counted for a queue."""

    __slots__ = ("durations", "outcomes", "seconds", "waited", "waits")

    def __init__(self) -> None:
        self.outcomes = [0] * len(OUTCOMES)
        self.durations = [0] * (len(BOUNDS) + 1)
        self.seconds = 0.0
        self.waits = [0] * (len(BOUNDS) + 1)
        self.waited = 0.0

    def add(self, other: _Cell) -> None:
        """Add what another cell has counted."""
        for mine, others in (
            (self.outcomes, other.outcomes),
            (self.durations, other.durations),
            (self.waits, other.waits),
        ):
            for index, number in enumerate(others):
                mine[index] += number
        self.seconds += other.seconds
        self.waited += other.waited


class _Local(threading.local):
    cells: dict[str, _Cell]


class Tally:
    """The counters of a worker's messages. Thread-safe."""

    def __init__(self, consumers: Mapping[str, str]) -> None:
        """Count from zero.

        Args:
            consumers: the name of each queue's consumer.
        """
        self._consumers = dict(consumers)
        self._local = _Local()
        self._lock = threading.Lock()
        self._of_threads: list[tuple[threading.Thread, dict[str, _Cell]]] = []
        self._epoch = _epoch()
        self._ended = {queue: _Cell() for queue in consumers}

    def ended(self, delivery: Delivery, outcome: Outcome, began: float) -> None:
        """Count a message that is settled.

        Args:
            delivery: its delivery.
            outcome: how it ended.
            began: when it began, by ``time.perf_counter``.
        """
        # The only call for a message, which takes half a microsecond: what it needs stands here.
        try:
            cell = self._local.cells[delivery.queue]
        except (AttributeError, KeyError):
            cell = self._new_cell(delivery.queue)
        seconds = perf_counter() - began
        cell.outcomes[_ACKED if outcome is ACK else _index_of(outcome)] += 1
        # What is quick isn't looked up: there it would be noticed.
        cell.durations[0 if seconds <= _QUICK else bisect_left(BOUNDS, seconds)] += 1
        cell.seconds += seconds
        headers = delivery.headers
        if headers and not delivery.redelivered and ATTEMPT not in headers:  # its first begin
            try:
                wait = began + self._epoch - headers[HEADER_OCCURRED_AT] * 1e-6
            except (KeyError, TypeError, OverflowError):  # another client's message
                return
            if DELAY_EXCHANGE in headers:
                wait -= _delay_of(headers)
            if wait > _QUICK:
                cell.waits[bisect_left(BOUNDS, wait)] += 1
                cell.waited += wait
            else:
                cell.waits[0] += 1
                if wait > 0.0:  # else another machine's clock is ahead
                    cell.waited += wait

    def returned(self, delivery: Delivery, began: float) -> None:
        """Count a message that has begun, and is left to be redelivered; see :meth:`ended`."""
        seconds = perf_counter() - began
        cell = getattr(self._local, "cells", {}).get(delivery.queue)
        if cell is None:
            cell = self._new_cell(delivery.queue)
        cell.outcomes[_RETURNED] += 1
        cell.durations[bisect_left(BOUNDS, seconds)] += 1
        cell.seconds += seconds

    def read(self) -> dict[str, Ended]:
        """Return what was counted so far, by queue."""
        self._epoch = _epoch()  # the system's clock may have been set
        with self._lock:
            self._fold()
            sums = {}
            for queue, ended in self._ended.items():
                total = sums[queue] = _Cell()
                total.add(ended)
            for _, cells in self._of_threads:
                for queue, cell in list(cells.items()):
                    sums.setdefault(queue, _Cell()).add(cell)
        return {
            queue: Ended(
                dict(zip(OUTCOMES, cell.outcomes, strict=True)),
                Histogram(cell.seconds, tuple(cell.durations)),
                Histogram(cell.waited, tuple(cell.waits)),
            )
            for queue, cell in sums.items()
        }

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

    def _new_cell(self, queue: str) -> _Cell:
        """Make the cell of this thread and a queue."""
        cell = _Cell()
        with self._lock:
            self._fold()
            cells = getattr(self._local, "cells", None)
            if cells is None:
                cells = self._local.cells = {}
                self._of_threads.append((threading.current_thread(), cells))
            cells[queue] = cell
        return cell

    def _fold(self) -> None:
        """Take over the counts of threads that have ended, such as those of late handlers."""
        living = []
        for thread, cells in self._of_threads:
            if thread.is_alive():
                living.append((thread, cells))
                continue
            for queue, cell in cells.items():
                self._ended.setdefault(queue, _Cell()).add(cell)
        self._of_threads = living


def _epoch() -> float:
    """Return the system's time at which ``perf_counter`` was 0."""
    return time() - perf_counter()


def _delay_of(headers: Mapping[str, Any]) -> int:
    """Return the seconds for which RabbitMQ was to delay a message; see ``delay_ladder``."""
    return sum(
        1 << number for number in range(_LEVELS) if headers.get(f"{DELAY_HEADERS}{number:02}")
    )


_LEVELS = 28


def _index_of(outcome: Outcome) -> int:
    return OUTCOMES.index(name_of(outcome))


def name_of(outcome: Outcome) -> str:
    """Return which of ``OUTCOMES`` a settled message counts as."""
    match outcome:
        case Ack(expired=True):
            return "expired"
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
