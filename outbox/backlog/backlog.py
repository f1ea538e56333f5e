"""The backlog: a publisher's entries that have no fate yet.

The rules:

1.  Entries are sent in the order they were submitted. After a lost connection, those in flight
    return to the head of the queue, ahead of newer ones; an entry that the broker nacked waits
    outside the queue for its back-off, and doesn't hold up the others.
2.  A chunk is *reported* once: when all its entries have a fate, when the link fails, or when its
    caller's timeout is over. Entries without a fate are then *kept* (``keep=True``) until they have
    one, or *withdrawn* (``keep=False``) and never sent again.
3.  While the circuit is open (no connection, blocked, stalled) a new chunk is reported at once.
    The circuit opens when the link fails, or when a caller's timeout is over and the broker has
    confirmed nothing at all meanwhile; it closes when the link is up again, or a confirm arrives.

Everything here is decided without I/O. Methods return the *news*, which the notifier passes on
when the lock is released: futures to resolve, hooks to call, lines to log.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from outbox.backlog.chunk import Chunk, Entry, Fate
from outbox.backlog.stats import Tally
from outbox.errors import BrokerError, PublishTimeout, UsageError
from outbox.event import Event
from outbox.report import PublishReport, Rejection

__all__ = ["Backlog", "News"]


@dataclass(slots=True)
class News:
    """The side effects of a backlog change, to be applied without its lock.

    Attributes:
        reports: chunks to resolve with their reports, in this order.
        kept: events that are kept from now on.
        parked: events that were parked.
        rejected: events that were given up, with the reasons.
        error: the reason why events are kept.
    """

    reports: list[tuple[Chunk, PublishReport]] = field(default_factory=list)
    kept: list[Event] = field(default_factory=list)
    parked: list[Event] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    error: BrokerError | None = None


class Backlog:
    """Queue, kept events and circuit of one publisher. Thread-safe; no I/O, no threads."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._empty = threading.Condition(self._lock)
        self._queue: deque[Entry] = deque()
        self._elsewhere: dict[Entry, None] = {}  # in flight or backing off, in order
        self._unreported: dict[Chunk, None] = {}
        self._unsettled = 0
        self._kept_events = 0
        self._kept_bytes = 0
        self._down: BrokerError | None = None
        self._stalled = False
        self._closed = False
        self._last_confirm = 0.0
        self.tally = Tally()

    @property
    def kept(self) -> tuple[Event, ...]:
        """The kept events, in the order they will be sent."""
        with self._lock:
            return tuple(
                entry.event
                for entries in (self._elsewhere, self._queue)
                for entry in entries
                if entry.kept and entry.fate is None
            )

    @property
    def kept_size(self) -> tuple[int, int]:
        """The number of kept events, and the bytes of their bodies."""
        return self._kept_events, self._kept_bytes

    @property
    def queued(self) -> bool:
        """Whether entries wait to be sent."""
        return bool(self._queue)

    def add(self, chunk: Chunk) -> News:
        """Add ``chunk`` behind all others.

        Raises:
            UsageError: the backlog has been handed over.
        """
        news = News()
        with self._lock:
            if self._closed:
                raise UsageError("this publisher is closed; nothing was published")
            chunk.submitted_at = self._clock()
            if not self._unsettled and not self._elsewhere:
                self._stalled = False  # nothing is in flight: no confirm could close the circuit
            self._unreported[chunk] = None
            self._unsettled += len(chunk.entries)
            error = self._down
            if error is None and self._stalled:
                error = PublishTimeout("the broker has stopped confirming")
            if chunk.keep or error is None:
                self._queue.extend(chunk.entries)
            if error is not None or not chunk.entries:
                self._report(chunk, news, error)
        return news

    def take(self, max_events: int, max_bytes: int) -> list[Entry]:
        """Return the next entries to send, within the limits, but at least one if any waits."""
        taken: list[Entry] = []
        with self._lock:
            queue = self._queue
            while queue and len(taken) < max_events:
                entry = queue[0]
                if entry.fate is None:
                    max_bytes -= len(entry.frames)
                    if max_bytes < 0 and taken:
                        break
                    taken.append(entry)
                queue.popleft()
            self._elsewhere.update(dict.fromkeys(taken))
        return taken

    def give_fate(self, entries: Iterable[Entry], fate: Fate, reason: str = "") -> News:
        """Give ``entries`` their fate, except those that have one."""
        news = News()
        with self._lock:
            before = self._unsettled
            elsewhere = self._elsewhere
            usual = fate is Fate.PUBLISHED
            for entry in entries:
                elsewhere.pop(entry, None)
                if entry.fate is None:
                    if usual and not entry.kept:  # the usual case of _set_fate(), inlined
                        entry.fate = fate
                        self._unsettled -= 1
                        self._count_down(entry.chunk, news)
                    else:
                        self._set_fate(entry, fate, reason, news)
            self.tally.add(fate.value, before - self._unsettled)
            if not self._unsettled:
                self._empty.notify_all()
        return news

    def confirmed(self) -> None:
        """Note a confirm, which closes a circuit that a timeout has opened."""
        self._last_confirm = self._clock()
        self._stalled = False

    def refused(self, entries: Sequence[Entry], error: BrokerError) -> News:
        """Keep ``entries`` outside the queue, or withdraw them: the broker nacked them."""
        news = News()
        with self._lock:
            self.tally.nacked += len(entries)
            for entry in entries:
                entry.attempts += 1
                self._keep_or_withdraw(entry, error, news)
        return news

    def requeue(self, entries: Sequence[Entry]) -> None:
        """Put taken entries back at the head of the queue, in the order given."""
        with self._lock:
            self._requeue(entries)

    def put_behind(self, entries: Iterable[Entry]) -> None:
        """Put taken entries at the end of the queue, in the order given."""
        with self._lock:
            for entry in entries:
                self._elsewhere.pop(entry, None)
                if entry.fate is None:
                    self._queue.append(entry)

    def down(self, entries: Sequence[Entry], error: BrokerError) -> News:
        """Open the circuit: the link failed with ``entries`` in flight."""
        news = News()
        with self._lock:
            self._down = error
            self._stalled = False
            self._requeue(entries)
            for chunk in list(self._unreported):
                self._report(chunk, news, error)
        return news

    def up(self) -> None:
        """Close the circuit: the link works."""
        with self._lock:
            self._down = None
            self._stalled = False

    def release(self, chunk: Chunk) -> News:
        """Report ``chunk`` now: its caller's timeout is over."""
        news = News()
        with self._lock:
            if chunk in self._unreported:
                waited = self._clock() - chunk.submitted_at
                if self._last_confirm < chunk.submitted_at:
                    self._stalled = True  # not one confirm while this caller waited
                error = PublishTimeout(
                    f"{chunk.waiting} of {len(chunk.entries)} event(s) not confirmed "
                    f"after {waited:.3g} s"
                )
                self._report(chunk, news, error)
        return news

    def encode_anew(self, encode: Callable[[Event], bytes]) -> None:
        """Replace the frames of all entries."""
        with self._lock:
            for entries in (self._elsewhere, self._queue):
                for entry in entries:
                    entry.frames = encode(entry.sent_as)

    def wait_empty(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until every entry has a fate; return whether all do."""
        with self._empty:
            return self._empty.wait_for(lambda: not self._unsettled, timeout)

    def hand_over(self, error: BrokerError) -> tuple[tuple[Event, ...], News]:
        """Report every chunk, close, and return the events that are left: to move on, or lost."""
        news = News()
        with self._lock:
            self._closed = True
            for chunk in list(self._unreported):
                self._report(chunk, news, error)
            remaining = [
                entry
                for entries in (self._elsewhere, self._queue)
                for entry in entries
                if entry.fate is None
            ]
            for entry in remaining:
                self._set_fate(entry, Fate.WITHDRAWN, str(error), news)
            self._queue.clear()
            self._elsewhere.clear()
            self._empty.notify_all()
        return tuple(entry.event for entry in remaining), news

    def _requeue(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._elsewhere.pop(entry, None)
        self._queue.extendleft(entry for entry in reversed(entries) if entry.fate is None)

    def _report(self, chunk: Chunk, news: News, error: BrokerError | None = None) -> None:
        """Report ``chunk`` now; without ``error``, none of its entries may be waiting."""
        if error is not None:
            chunk.error = error
            for entry in chunk.entries:
                if entry.fate is None and not entry.kept:
                    self._keep_or_withdraw(entry, error, news)
        if chunk in self._unreported:
            del self._unreported[chunk]
            if chunk.error is None and chunk.entries:
                chunk.took = self._clock() - chunk.submitted_at
                self.tally.took(chunk.took)
            news.reports.append((chunk, chunk.report()))
            # Kept entries refer to their chunk: through this list they would hold all the others.
            chunk.entries = []

    def _set_fate(self, entry: Entry, fate: Fate, reason: str, news: News) -> None:
        entry.fate = fate
        entry.reason = reason
        self._unsettled -= 1
        if fate is Fate.PARKED:
            news.parked.append(entry.event)
        elif fate is Fate.REJECTED:
            news.rejected.append(Rejection(entry.event, reason))
        if entry.kept:
            entry.kept = False
            self._kept_events -= 1
            self._kept_bytes -= len(entry.event.body)
        else:
            self._count_down(entry.chunk, news)

    def _keep_or_withdraw(self, entry: Entry, error: BrokerError, news: News) -> None:
        if entry.fate is not None or entry.kept:
            return
        entry.chunk.error = news.error = error
        if entry.chunk.keep:
            entry.kept = True
            self._kept_events += 1
            self._kept_bytes += len(entry.event.body)
            self.tally.ever_kept += 1
            news.kept.append(entry.event)
            self._count_down(entry.chunk, news)
        else:
            self._set_fate(entry, Fate.WITHDRAWN, f"withdrawn: {error}", news)
            self.tally.add(Fate.WITHDRAWN.value)

    def _count_down(self, chunk: Chunk, news: News) -> None:
        chunk.waiting -= 1
        if not chunk.waiting:
            self._report(chunk, news)
