"""How many messages ended, in which way, and how long they took.

This is done once for each message, so the most frequent case is the cheapest: a message that is
acked adds one or two numbers to lists, and hundreds of them are sorted into buckets together.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, bisect_right
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
_FULL = 512
"""Numbers that wait to be sorted into buckets: enough to be cheap, too few to be noticed."""


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
    """A histogram, and ``new`` numbers that aren't sorted into its buckets yet. Its owner locks."""

    __slots__ = ("_new", "buckets", "total")

    def __init__(self, new: list[float]) -> None:
        self._new = new
        self.buckets = [0] * (len(BOUNDS) + 1)
        self.total = 0.0

    def sort(self) -> Histogram:
        """Sort the new numbers into the buckets; return them all."""
        new = self._new[:]
        del self._new[: len(new)]  # not clear(): another thread may have appended meanwhile
        if not math.isfinite(sum(new)):  # another client may send any number
            new = [number for number in new if math.isfinite(number)]
        new.sort()
        below = 0
        for index, bound in enumerate(BOUNDS):
            up_to = bisect_right(new, bound)
            self.buckets[index] += up_to - below
            below = up_to
        self.buckets[-1] += len(new) - below
        # What is negative comes from another machine, whose clock is ahead.
        self.total += sum(new[bisect_left(new, 0.0) :])
        return Histogram(self.total, tuple(self.buckets))


class _Counts:
    """What was counted for a queue; durations that no other outcome has are of acked messages."""

    __slots__ = ("_durations", "_waits", "durations", "others", "waits")

    def __init__(self) -> None:
        self.others = dict.fromkeys(OUTCOMES, 0)
        self.durations: list[float] = []
        self.waits: list[float] = []
        self._durations = _Times(self.durations)
        self._waits = _Times(self.waits)

    def read(self) -> Ended:
        durations, waits = self._durations.sort(), self._waits.sort()
        acked = durations.count - sum(self.others.values())
        return Ended({**self.others, "acked": acked}, durations, waits)


class Tally:
    """The counters of a worker's messages. Thread-safe."""

    def __init__(self, consumers: Mapping[str, str]) -> None:
        """Count from zero.

        Args:
            consumers: the name of each queue's consumer.
        """
        self._consumers = dict(consumers)
        self._lock = threading.Lock()
        self._epoch = _epoch()
        self._counts = {queue: _Counts() for queue in consumers}

    def ended(self, delivery: Delivery, outcome: Outcome, began: float) -> None:
        """Count a message that is settled.

        Args:
            delivery: its delivery.
            outcome: how it ended.
            began: when it began, by ``time.perf_counter``.
        """
        # The only call for a message, so what it needs stands here. Appending to a list needs no
        # lock, unlike adding to a number, in any Python.
        try:
            counts = self._counts[delivery.queue]
        except KeyError:
            counts = self._counts_of(delivery.queue)
        headers = delivery.headers
        if headers and not delivery.redelivered and ATTEMPT not in headers:  # its first begin
            try:
                wait = began + self._epoch - headers[HEADER_OCCURRED_AT] * 1e-6
                if DELAY_EXCHANGE in headers:
                    wait -= _delay_of(headers)
                counts.waits.append(wait)
            except (KeyError, TypeError, OverflowError):  # another client's message
                pass
        if outcome is not ACK and (name := name_of(outcome)) != "acked":
            self._count(counts, name, began)
            return
        durations = counts.durations
        durations.append(perf_counter() - began)
        if len(durations) >= _FULL:
            with self._lock:
                counts.read()

    def returned(self, delivery: Delivery, began: float) -> None:
        """Count a message that has begun, and is left to be redelivered; see :meth:`ended`."""
        self._count(self._counts_of(delivery.queue), "returned", began)

    def read(self) -> dict[str, Ended]:
        """Return what was counted so far, by queue."""
        self._epoch = _epoch()  # the system's clock may have been set
        with self._lock:
            return {queue: counts.read() for queue, counts in self._counts.items()}

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

    def _count(self, counts: _Counts, name: str, began: float) -> None:
        """Count an outcome other than ``acked``."""
        with self._lock:
            counts.others[name] += 1
            counts.durations.append(perf_counter() - began)
            if len(counts.durations) >= _FULL:
                counts.read()

    def _counts_of(self, queue: str) -> _Counts:
        with self._lock:
            return self._counts.setdefault(queue, _Counts())


def _epoch() -> float:
    """Return the system's time at which ``perf_counter`` was 0."""
    return time() - perf_counter()


def _delay_of(headers: Mapping[str, Any]) -> int:
    """Return the seconds for which RabbitMQ was to delay a message; see ``delay_ladder``."""
    return sum(
        1 << number for number in range(_LEVELS) if headers.get(f"{DELAY_HEADERS}{number:02}")
    )


_LEVELS = 28


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
