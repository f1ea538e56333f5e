"""The backlog: every event that a publisher answers for and that has no fate yet.

The rules:

1.  Events leave in the order in which they were submitted. What a lost connection threw back goes
    to the head of the queue again, ahead of all that is newer; what the broker refused for the
    time being waits apart and blocks nobody.
2.  A chunk is *reported* once: when all its events have a fate, when the link fails, or when its
    caller's time is up. What has no fate then is *kept* (``keep=True``) and stays until it has
    one, or is *withdrawn* (``keep=False``) and never sent again.
3.  While the circuit is open (no connection, blocked, stalled) a new chunk is reported at once.
    The circuit opens when the link fails, or when a caller's time ran out without any confirm for
    anybody; it closes when the link is up again, or a confirm arrives.

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
    """What a change of the backlog means for the world outside.

    Attributes:
        reports: chunks to resolve with their report, in this order.
        kept: events that are kept from now on, and why.
        parked: events that were parked.
        rejected: events that were given up.
        error: why events are kept.
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
        self._elsewhere: dict[Entry, None] = {}  # in flight or waiting apart, in order
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
        """The kept events, in the order in which they will be sent."""
        with self._lock:
            return tuple(
                entry.event
                for entries in (self._elsewhere, self._queue)
                for entry in entries
                if entry.kept and entry.fate is None
            )

    @property
    def kept_size(self) -> tuple[int, int]:
        """How many events are kept, and the bytes of their bodies."""
        return self._kept_events, self._kept_bytes

    @property
    def queued(self) -> bool:
        """Whether something waits to be taken."""
        return bool(self._queue)

    def add(self, chunk: Chunk) -> News:
        """Take ``chunk`` in, behind all others.

        Raises:
            UsageError: what was here has been handed over.
        """
        news = News()
        with self._lock:
            if self._closed:
                raise UsageError("this publisher is closed; nothing was published")
            chunk.submitted_at = self._clock()
            if not self._unsettled and not self._elsewhere:
                self._stalled = False  # no confirm can come: nothing is on its way
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
        """Return the next entries to send, at most so many; at least one, if one waits."""
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
        """Give ``entries`` their fate, unless they have one."""
        news = News()
        with self._lock:
            before = self._unsettled
            elsewhere = self._elsewhere
            usual = fate is Fate.PUBLISHED
            for entry in entries:
                elsewhere.pop(entry, None)
                if entry.fate is None:
                    if usual and not entry.kept:  # what _set_fate does, for nearly every event
                        entry.fate = fate
                        self._unsettled -= 1
                        self._waits_no_longer(entry.chunk, news)
                    else:
                        self._set_fate(entry, fate, reason, news)
            self.tally.add(fate.value, before - self._unsettled)
            if not self._unsettled:
                self._empty.notify_all()
        return news

    def confirmed(self) -> None:
        """Note that the broker answers: it closes a circuit that a timeout has opened."""
        self._last_confirm = self._clock()
        self._stalled = False

    def refused(self, entries: Sequence[Entry], error: BrokerError) -> News:
        """Keep ``entries`` apart, or withdraw them, since the broker would not have them now."""
        news = News()
        with self._lock:
            self.tally.nacked += len(entries)
            for entry in entries:
                entry.attempts += 1
                self._keep_or_withdraw(entry, error, news)
        return news

    def requeue(self, entries: Sequence[Entry]) -> None:
        """Put what was taken to the head of the queue again, in the order given."""
        with self._lock:
            self._requeue(entries)

    def put_behind(self, entries: Iterable[Entry]) -> None:
        """Put what was taken behind all that waits, in the order given."""
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
        """Report ``chunk`` now, since its caller's time is up."""
        news = News()
        with self._lock:
            if chunk in self._unreported:
                waited = self._clock() - chunk.submitted_at
                if self._last_confirm < chunk.submitted_at:
                    self._stalled = True
                error = PublishTimeout(
                    f"{chunk.waiting} of {len(chunk.entries)} event(s) not confirmed "
                    f"after {waited:.3g} s"
                )
                self._report(chunk, news, error)
        return news

    def encode_anew(self, encode: Callable[[Event], bytes]) -> None:
        """Replace the frames of all that waits."""
        with self._lock:
            for entries in (self._elsewhere, self._queue):
                for entry in entries:
                    entry.frames = encode(entry.sent_as)

    def wait_empty(self, timeout: float) -> bool:
        """Wait until every event has a fate, at most ``timeout`` seconds; return whether so."""
        with self._empty:
            return self._empty.wait_for(lambda: not self._unsettled, timeout)

    def hand_over(self, error: BrokerError) -> tuple[tuple[Event, ...], News]:
        """Report every chunk, and give up what is kept: to another publisher, or as lost."""
        news = News()
        with self._lock:
            self._closed = True
            for chunk in list(self._unreported):
                self._report(chunk, news, error)
            left = [
                entry
                for entries in (self._elsewhere, self._queue)
                for entry in entries
                if entry.fate is None
            ]
            for entry in left:
                self._set_fate(entry, Fate.WITHDRAWN, str(error), news)
            self._queue.clear()
            self._elsewhere.clear()
            self._empty.notify_all()
        return tuple(entry.event for entry in left), news

    def _requeue(self, entries: Sequence[Entry]) -> None:
        for entry in entries:
            self._elsewhere.pop(entry, None)
        self._queue.extendleft(entry for entry in reversed(entries) if entry.fate is None)

    def _report(self, chunk: Chunk, news: News, error: BrokerError | None = None) -> None:
        """Report ``chunk`` now: without ``error`` nothing of it may be waiting."""
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
            # The entries still on their way know their chunk; it need not know them any longer.
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
            self._waits_no_longer(entry.chunk, news)

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
            self._waits_no_longer(entry.chunk, news)
        else:
            self._set_fate(entry, Fate.WITHDRAWN, f"withdrawn: {error}", news)
            self.tally.add(Fate.WITHDRAWN.value)

    def _waits_no_longer(self, chunk: Chunk, news: News) -> None:
        chunk.waiting -= 1
        if not chunk.waiting:
            self._report(chunk, news)
