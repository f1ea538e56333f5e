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
    confirmed nothing at all since it submitted, for half a second or more; it closes when the link
    is up again, or a confirm arrives.

Everything here is decided without I/O, on one thread. Methods return the *news*, which the notifier
passes on when the change is complete: futures to resolve, hooks to call, lines to log.
"""

from __future__ import annotations

import bisect
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from outbox.backlog.chunk import Chunk, Entry, Fate
from outbox.backlog.stats import LATENCY_BOUNDS, Tally
from outbox.errors import BrokerError, PublishTimeout
from outbox.event import Event
from outbox.report import PublishReport, Rejection
from outbox.telemetry import tracing

__all__ = ["SILENCE", "Backlog", "News", "Spool", "not_confirmed"]

SILENCE = 0.5
"""Seconds without any confirm that open the circuit. A caller's own timeout may be far shorter than
a round trip, and must not make the others fail."""


@dataclass(slots=True)
class News:
    """The side effects of a backlog change, to be applied without its lock.

    Attributes:
        reports: chunks to resolve with their reports, in this order.
        kept: entries that are kept from now on.
        no_longer_kept: entries that were kept, and have their fate now.
        parked: events that were parked.
        rejected: events that were given up, with the reasons.
        error: the reason why events are kept.
        quiet: whether not to log any of it, see :class:`Chunk`.
        settled: functions to call because every entry has a fate.
    """

    reports: list[tuple[Chunk, PublishReport]] = field(default_factory=list)
    kept: list[Entry] = field(default_factory=list)
    no_longer_kept: list[Entry] = field(default_factory=list)
    parked: list[Event] = field(default_factory=list)
    rejected: list[Rejection] = field(default_factory=list)
    error: BrokerError | None = None
    quiet: bool = True
    settled: list[Callable[[], object]] = field(default_factory=list)


class Spool(Protocol):
    """Where kept events are written to, as a publisher sees it. Thread-safe."""

    @property
    def stored(self) -> tuple[int, int]:
        """The number of events on the disk, and their bytes."""
        ...

    @property
    def holds_all(self) -> bool:
        """Whether every event without a fate is on the disk, so that the process may end."""
        ...

    def why_full(self) -> str:
        """Return why no more events may be promised; "" if there is room."""
        ...

    def peek(self, most: int) -> list[Event]:
        """Return the next ``most`` events that are on the disk alone, in order."""
        ...


class Backlog:
    """Queue, kept events and circuit of one publisher. No I/O, no threads, no locks.

    Only the transport's thread may change it. Any thread may read its properties, except
    ``queued`` and ``kept_entries``.

    Attributes:
        tally: the counters.
        spool: where kept events are written to, or None.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._queue: deque[Entry] = deque()
        self._elsewhere: dict[Entry, None] = {}  # in flight or backing off, in order
        self._unreported: dict[Chunk, None] = {}
        self._unsettled = 0
        self._kept_events = 0
        self._kept_bytes = 0
        self._unreported_bytes = 0
        self._held = [0, 0]  # those of the kept events that are held, and their bytes
        self._aside = [0, 0]  # the kept events that are on the disk alone, and their bytes
        self._down: BrokerError | None = None
        self._doubted_since: float | None = None
        self._busy_since = 0.0
        self._settled: list[Callable[[], object]] = []
        self._last_confirm = 0.0
        self.tally = Tally()
        self.spool: Spool | None = None

    @property
    def kept(self) -> tuple[Event, ...]:
        """The kept events, in the order they will be sent."""
        # A copy by one instruction each: the transport's thread may change both meanwhile.
        return tuple(
            entry.event
            for entries in (list(self._elsewhere), list(self._queue))
            for entry in entries
            if entry.fate is None and (entry.kept or (entry.chunk.claimed and entry.chunk.keep))
        )

    @property
    def oldest_kept(self) -> Event | None:
        """The kept event that will be sent first, or None. Any thread may ask."""
        if not self._kept_events:
            return None
        for entries in (list(self._elsewhere), list(self._queue)):
            for entry in entries:
                if entry.kept:
                    return entry.event
        return None

    @property
    def kept_size(self) -> tuple[int, int]:
        """The number of kept events, and the bytes they take, in memory or on the disk."""
        events, size = self._aside
        return self._kept_events + events, self._kept_bytes + size

    @property
    def aside_size(self) -> tuple[int, int]:
        """The number of kept events that are on the disk alone, and their bytes.

        They are behind those of :attr:`kept`. See :meth:`put_aside`.
        """
        events, size = self._aside
        return events, size

    @property
    def kept_in_memory(self) -> tuple[int, int]:
        """The number of kept events that aren't on the disk alone, and their bytes."""
        return self._kept_events, self._kept_bytes

    @property
    def kept_entries(self) -> list[Entry]:
        """The kept entries in memory; only for the transport's thread."""
        return [entry for entry in (*self._elsewhere, *self._queue) if entry.kept]

    @property
    def held_size(self) -> tuple[int, int]:
        """The number of kept events that the broker refuses for now, and the bytes they take.

        They wait until a permission is granted or a queue is created. See :meth:`hold`.
        """
        events, size = self._held
        return events, size

    @property
    def waiting_size(self) -> tuple[int, int]:
        """The number of entries without a fate, and the bytes they take."""
        return self._unsettled, self.kept_size[1] + self._unreported_bytes

    @property
    def unsettled(self) -> int:
        """The number of entries without a fate."""
        return self._unsettled

    @property
    def circuit(self) -> BrokerError | None:
        """The reason why new chunks are reported at once; None while the circuit is closed."""
        since = self._doubted_since
        if self._down is None and since is not None and self._clock() - since >= SILENCE:
            return PublishTimeout("the broker has stopped confirming")
        return self._down

    @property
    def silence(self) -> float:
        """The seconds for which entries have been waiting without any confirm."""
        if not self._unsettled:
            return 0.0
        return self._clock() - max(self._last_confirm, self._busy_since)

    @property
    def queued(self) -> bool:
        """Whether entries wait to be sent."""
        return bool(self._queue)

    def add(self, chunk: Chunk, held_back: BrokerError | None = None) -> News:
        """Add ``chunk`` behind all others.

        Args:
            chunk: the events.
            held_back: why they are kept and the chunk is reported, though the broker is available;
                None if there is no such reason.
        """
        news = News()
        if not chunk.submitted_at:
            chunk.submitted_at = self._clock()
        if not self._unsettled:
            self._busy_since = chunk.submitted_at
            if not self._elsewhere:  # nothing is in flight: no confirm could close the circuit
                self._doubted_since = None
        self._unsettled += len(chunk.entries)
        self.tally.submitted += len(chunk.entries)
        if chunk.claimed:  # its caller's timeout was over before
            self._queue.extend(chunk.entries if chunk.keep else ())
            self._keep_rest(chunk, chunk.error or not_confirmed(chunk, self._clock()), news)
            return self._complete(news)
        self._expect_report(chunk)
        error = self.circuit or held_back
        if chunk.keep or error is None:
            self._queue.extend(chunk.entries)
        if error is not None or not chunk.entries:
            self._report(chunk, news, error)
        return self._complete(news)

    def take(self, max_events: int, max_bytes: int) -> list[Entry]:
        """Return the next entries to send, within the limits, but at least one if any waits."""
        taken: list[Entry] = []
        queue = self._queue
        while queue and len(taken) < max_events:
            entry = queue[0]
            if entry.fate is None and (entry.chunk.keep or not entry.chunk.claimed):
                max_bytes -= len(entry.frames)
                if max_bytes < 0 and taken:
                    break
                taken.append(entry)
            queue.popleft()
        self._elsewhere.update(dict.fromkeys(taken))
        if tracing.seam.tracer is not None:
            tracing.seam.tracer.sends_again(taken)
        return taken

    def give_fate(self, entries: Iterable[Entry], fate: Fate, reason: str = "") -> News:
        """Give ``entries`` their fate, except those that have one."""
        news = News()
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
        self._count(fate, before - self._unsettled)
        return self._complete(news)

    def confirmed(self) -> None:
        """Note a confirm, which closes a circuit that a timeout has opened."""
        self._last_confirm = self._clock()
        self._doubted_since = None

    def refused(self, entries: Sequence[Entry], error: BrokerError) -> News:
        """Keep ``entries`` outside the queue, or withdraw them: the broker nacked them."""
        news = News()
        self.tally.nacked += len(entries)
        for entry in entries:
            entry.attempts += 1
            self._keep_or_withdraw(entry, error, news)
            _trace_kept(entry, error)
        return self._complete(news)

    def hold(self, entries: Iterable[Entry], error: BrokerError) -> News:
        """Keep ``entries`` outside the queue, or withdraw them: their address takes no events.

        Held events are kept, but counted separately: work for other addresses need not be refused
        on their account.
        """
        news = News()
        for entry in entries:
            self._keep_or_withdraw(entry, error, news)
            if entry.kept and not entry.held:
                entry.held = True
                self._count_held(entry, 1)
            _trace_kept(entry, error)
        return self._complete(news)

    def release_held(self, entries: Iterable[Entry]) -> None:
        """Count ``entries`` as kept like others again: their address takes events."""
        for entry in entries:
            if entry.kept:
                self._no_longer_held(entry)

    def requeue(self, entries: Sequence[Entry]) -> None:
        """Put taken entries back at the head of the queue, in the order given."""
        for entry in entries:
            self._elsewhere.pop(entry, None)
        self._queue.extendleft(entry for entry in reversed(entries) if entry.fate is None)

    def put_behind(self, entries: Iterable[Entry]) -> None:
        """Put taken entries at the end of the queue, in the order given."""
        for entry in entries:
            self._elsewhere.pop(entry, None)
            if entry.fate is None:
                self._queue.append(entry)

    def down(self, entries: Sequence[Entry], error: BrokerError) -> News:
        """Open the circuit: the link failed with ``entries`` in flight."""
        news = News()
        self._down = error
        self._doubted_since = None
        for entry in entries:
            _trace_kept(entry, error)
        self.requeue(entries)
        for chunk in list(self._unreported):
            self._report(chunk, news, error)
        return self._complete(news)

    def up(self) -> None:
        """Close the circuit: the link works."""
        self._down = None
        self._doubted_since = None

    def release(self, chunk: Chunk) -> News:
        """Report ``chunk`` now, unless its caller has done so: the caller's timeout is over."""
        news = News()
        if chunk in self._unreported:
            self.doubt(chunk)
            self._report(chunk, news, chunk.error or not_confirmed(chunk, self._clock()))
        return self._complete(news)

    def doubt(self, chunk: Chunk) -> None:
        """Note that the timeout of ``chunk`` is over. Any thread may do this."""
        if self._last_confirm < chunk.submitted_at and self._doubted_since is None:
            self._doubted_since = chunk.submitted_at

    def when_settled(self, callback: Callable[[], object]) -> News:
        """Have ``callback`` called once, as soon as every entry has a fate."""
        self._settled.append(callback)
        return self._complete(News())

    def put_aside(self, entries: Iterable[Entry]) -> list[Entry]:
        """Forget those of ``entries`` that wait in the queue; return them, in their order.

        They are kept, and count as such. Something else, the spool, has them from now on, until it
        gives them back to :meth:`restore`.
        """
        chosen = {entry for entry in entries if entry.fate is None}
        chosen -= self._elsewhere.keys()
        queue, left, found = self._queue, [], []
        while chosen and queue:
            entry = queue.pop()  # from the end: there they are
            if entry in chosen:
                chosen.remove(entry)
                found.append(entry)
            else:
                left.append(entry)
        queue.extend(reversed(left))
        found.reverse()
        for entry in found:
            self._no_longer_held(entry)
        size = sum(entry.size for entry in found)
        self._kept_events -= len(found)
        self._kept_bytes -= size
        self._count_aside(len(found), size)
        return found

    def restore(self, entries: Sequence[Entry]) -> None:
        """Add entries that were put aside, or others in their place, behind all in the queue."""
        self._queue.extend(entries)
        size = sum(entry.size for entry in entries)
        self._kept_events += len(entries)
        self._kept_bytes += size
        self._count_aside(-len(entries), -size)

    def leave(self, entries: Iterable[Entry]) -> None:
        """Forget kept ``entries`` and those that were put aside: something else has them."""
        for entry in entries:
            self._elsewhere.pop(entry, None)
            self._no_longer_held(entry)
            entry.fate = Fate.WITHDRAWN  # here, that is: it is skipped in the queue
            self._unsettled -= 1
            self._kept_events -= 1
            self._kept_bytes -= entry.size
        self._unsettled -= self._aside[0]
        self._aside = [0, 0]

    def add_aside(self, events: int, size: int) -> None:
        """Count events that something else has, which another process or publisher had before."""
        if not self._unsettled:
            self._busy_since = self._clock()
        self._unsettled += events
        self._count_aside(events, size)

    def lose_aside(self, events: int) -> News:
        """Count events no longer that were put aside and can't be restored."""
        self._unsettled -= events
        self._count_aside(-events, 0)
        return self._complete(News())

    def surrender(self) -> list[Entry]:
        """Remove and return the entries without a fate, for another backlog to adopt.

        Their chunks go with them.
        """
        entries = [*self._elsewhere, *self._queue]
        self._elsewhere.clear()
        self._queue.clear()
        self._unreported.clear()
        self._unsettled = self._unreported_bytes = 0
        self._kept_events = self._kept_bytes = 0
        self._held, self._aside = [0, 0], [0, 0]
        return [entry for entry in entries if entry.fate is None]

    def adopt(
        self,
        entries: Sequence[Entry],
        held_back: Callable[[Chunk], BrokerError | None] = lambda _: None,
    ) -> News:
        """Add ``entries`` that another backlog has surrendered, behind all others.

        Args:
            entries: the entries, and with them their chunks.
            held_back: returns what ``add`` takes as such, for a chunk without a report.
        """
        news = News()
        if not self._unsettled:
            self._busy_since = self._clock()
        self._unsettled += len(entries)
        self._queue.extend(entries)
        for entry in entries:
            entry.attempts = 0
            if entry.kept:
                self._count_kept(entry)
        for chunk in dict.fromkeys(entry.chunk for entry in entries if not entry.kept):
            if chunk.claimed:  # its caller's timeout was over
                self._keep_rest(chunk, chunk.error or not_confirmed(chunk, self._clock()), news)
            else:
                self._expect_report(chunk)
                error = self.circuit or held_back(chunk)
                if error is not None:
                    self._report(chunk, news, error)
        return self._complete(news)

    def close(self, error: BrokerError) -> tuple[tuple[Event, ...], News]:
        """Report every chunk, and return the events that are left, which are lost."""
        news = News()
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
        self._unsettled, self._aside = 0, [0, 0]
        return tuple(entry.event for entry in remaining), self._complete(news)

    def _complete(self, news: News) -> News:
        """Add what follows from a change to ``news``."""
        if not self._unsettled and self._settled:
            news.settled, self._settled = self._settled, []
        return news

    def _report(self, chunk: Chunk, news: News, error: BrokerError | None = None) -> None:
        """Report ``chunk`` now; without ``error``, none of its entries may be waiting."""
        if error is not None:
            self._keep_rest(chunk, error, news)
        if chunk not in self._unreported:
            return
        self._expect_no_report(chunk)
        if chunk.claim_report():  # else its caller has reported it
            if chunk.error is None and chunk.entries:
                chunk.took = self._clock() - chunk.submitted_at
                self._count_chunk(chunk.took)
            news.reports.append((chunk, chunk.report()))
        # Kept entries refer to their chunk: through this list they would hold all the others.
        chunk.entries = []

    def _expect_report(self, chunk: Chunk) -> None:
        self._unreported[chunk] = None
        self._unreported_bytes += chunk.size

    def _expect_no_report(self, chunk: Chunk) -> None:
        del self._unreported[chunk]
        self._unreported_bytes -= chunk.size

    def _count_kept(self, entry: Entry) -> None:
        entry.held = False
        entry.size = len(entry.frames) or len(entry.event.body)
        self._kept_events += 1
        self._kept_bytes += entry.size

    def _keep_rest(self, chunk: Chunk, error: BrokerError, news: News) -> None:
        chunk.error = error
        for entry in chunk.entries:
            if entry.fate is None and not entry.kept:
                self._keep_or_withdraw(entry, error, news)

    def _set_fate(self, entry: Entry, fate: Fate, reason: str, news: News) -> None:
        entry.fate = fate
        entry.reason = reason
        news.quiet = news.quiet and entry.chunk.quiet
        self._unsettled -= 1
        if fate is Fate.PARKED:
            news.parked.append(entry.event)
        elif fate is Fate.REJECTED:
            news.rejected.append(Rejection(entry.event, reason))
        if entry.kept:
            _trace_kept(entry, None)
            self._no_longer_held(entry)
            entry.kept = False
            news.no_longer_kept.append(entry)
            self._kept_events -= 1
            self._kept_bytes -= entry.size
        else:
            self._count_down(entry.chunk, news)

    def _keep_or_withdraw(self, entry: Entry, error: BrokerError, news: News) -> None:
        if entry.fate is not None or entry.kept:
            return
        entry.chunk.error = news.error = error
        if entry.chunk.keep:
            entry.kept = True
            self._count_kept(entry)
            self.tally.ever_kept += 1
            news.kept.append(entry)
            news.quiet = news.quiet and entry.chunk.quiet
            self._count_down(entry.chunk, news)
        else:
            self._set_fate(entry, Fate.WITHDRAWN, f"withdrawn: {error}", news)
            self._count(Fate.WITHDRAWN, 1)

    def _count(self, fate: Fate, events: int) -> None:
        fates = self.tally.fates
        fates[fate.value] = fates.get(fate.value, 0) + events

    def _count_chunk(self, seconds: float) -> None:
        tally = self.tally
        tally.buckets[bisect.bisect_left(LATENCY_BOUNDS, seconds)] += 1
        tally.total += seconds
        tally.maximum = max(tally.maximum, seconds)

    def _count_aside(self, events: int, size: int) -> None:
        aside = self._aside
        aside[0] += events
        aside[1] = max(0, aside[1] + size) if aside[0] else 0

    def _no_longer_held(self, entry: Entry) -> None:
        if entry.held:
            entry.held = False
            self._count_held(entry, -1)

    def _count_held(self, entry: Entry, step: int) -> None:
        self._held[0] += step
        self._held[1] += step * entry.size

    def _count_down(self, chunk: Chunk, news: News) -> None:
        chunk.waiting -= 1
        if not chunk.waiting:
            self._report(chunk, news)


def _trace_kept(entry: Entry, error: BrokerError | None) -> None:
    if tracing.seam.tracer is not None and entry.kept:
        tracing.seam.tracer.sent_again(entry, error)


def not_confirmed(chunk: Chunk, now: float) -> PublishTimeout:
    """Return the reason why ``chunk`` is reported although events of it have no fate."""
    return PublishTimeout(
        f"{chunk.waiting} of {len(chunk.entries)} event(s) not confirmed "
        f"after {now - chunk.submitted_at:.3g} s"
    )
