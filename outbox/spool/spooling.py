"""How a publisher uses its spool: what is written, read and forgotten, and when.

Without a spool, kept events are in the backlog. With one, each is written to a file before its
chunk is reported as kept, and deleted there when it has its fate. The first of them, a window,
stay in the backlog as well. Those behind are *aside*: on the disk alone, until the window has room.
While own events are aside, new chunks go there too, so that the order stays.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from outbox.backlog.backlog import Backlog, News
from outbox.backlog.chunk import Chunk, Entry
from outbox.backlog.notifier import Notifier
from outbox.errors import Blocked, BrokerError
from outbox.event import Event
from outbox.report import PublishReport
from outbox.settings import Settings
from outbox.spool.disk_limits import why_full
from outbox.spool.spool import WINDOW, WINDOW_BYTES, Read, Spool
from outbox.spool.spool_file import SpoolFile, Unreadable, Unwritable
from outbox.spool.spool_folder import digest_of, open_spool_folder
from outbox.url import BrokerURL

__all__ = ["Spooling"]

logger = logging.getLogger("outbox.spool")

_LOOK_FOR_ROOM = 1.0
"""Seconds between two looks at the space left on the disk."""

_PEEKING = 5.0
"""Seconds to wait for events from the disk, for ``Publisher.kept``."""

Reports = Sequence[tuple[Chunk, PublishReport]]


class Host(Protocol):
    """The transport whose events are spooled."""

    backlog: Backlog

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached now."""
        ...

    @property
    def idle(self) -> bool:
        """Whether nothing that callers have handed in waits for the thread."""
        ...

    def call_soon(self, request: Callable[[], object]) -> None:
        """Have ``request`` called on the transport's thread."""
        ...

    def encode(self, event: Event) -> bytes:
        """Return the frames of ``event``; on any thread."""
        ...


class Spooling:
    """A transport's spool, which takes the notifier's place.

    The methods above the line may be called on any thread, the others on the transport's.
    """

    def __init__(self, url: BrokerURL, settings: Settings, host: Host, notify: Notifier) -> None:
        """Check the folder; nothing is opened yet.

        Raises:
            UsageError: the folder can't be used.
        """
        self._folder = open_spool_folder(settings.spool)
        self._max_bytes = settings.spool_max_bytes
        self._host = host
        self._backlog = host.backlog
        self._notify = notify
        self._spool = Spool(self._folder, digest_of(url, settings.exchange), host.encode)
        self._spool.watch(
            lambda events, size: host.call_soon(partial(self._on_adopted, events, size)),
            lambda events, own: host.call_soon(partial(self._on_lost, events, own)),
        )
        self._pass_on: Callable[[Sequence[SpoolFile]], None] | None = None  # once replaced
        self._own_aside = 0
        self._reading = False
        self._arrived: Read | None = None  # what was read, until the backlog has it
        self._full = (0.0, "")

    @property
    def stored(self) -> tuple[int, int]:
        """The number of events on the disk, adopted ones included, and their bytes."""
        return self._spool.stored

    @property
    def holds_all(self) -> bool:
        """Whether every event without a fate is on the disk, so that the process may end."""
        spool = self._spool
        return (
            self._host.idle and not spool.unwritten and self._backlog.unsettled <= spool.stored[0]
        )

    def why_full(self) -> str:
        """Return why no more events may be promised to the spool; "" if there is room.

        It is full only where it is used: while the broker is available, nothing need be promised.
        """
        if not self._own_aside and self._host.connected:
            return ""
        now = time.monotonic()
        looked_at, why = self._full
        if now - looked_at >= _LOOK_FOR_ROOM or not why:
            why = why_full(self._folder, self._spool.own_size, self._max_bytes)
            self._full = now, why
        return why

    def peek(self, most: int) -> list[Event]:
        """Return the next ``most`` own events that are on the disk alone, in order."""
        return self._spool.peek(most, _PEEKING) if self._own_aside and most > 0 else []

    def report(self, chunk: Chunk, entries: Sequence[Entry], report: PublishReport) -> None:
        """Resolve ``chunk`` with ``report`` when ``entries``, which have no fate, are written."""
        self._spool.write(entries, partial(_resolve, [(chunk, report)]))

    # ------------------------------------------------------------------ on the transport's thread

    def __call__(self, news: News) -> None:
        """Pass on ``news``; reports with kept events when those are written."""
        keeps = bool(news.kept)
        for _, report in news.reports:  # each answer of the broker pays for this; any() costs twice
            keeps = keeps or bool(report.kept)
        if keeps:
            self._keep(news)
        if news.no_longer_kept:
            self._spool.settle(news.no_longer_kept)
            self._fill()
        self._notify(news)

    def reason_to_hold_back(self, chunk: Chunk) -> BrokerError | None:
        """Return why a new chunk must be spooled though the broker is available, or None."""
        if not self._own_aside or not chunk.keep or self._backlog.circuit is not None:
            return None
        # The log has a line for each chunk that is kept by an outage: not for what follows it.
        chunk.quiet = True
        return Blocked(
            f"{self._own_aside} event(s) that were published before are still in the spool"
        )

    def released(self, chunk: Chunk, entries: Sequence[Entry], report: PublishReport) -> None:
        """Follow up on a report that the caller has made.

        Args:
            chunk: the chunk; what has no fate is kept meanwhile.
            entries: its entries.
            report: its report.
        """
        self._spool.settle([entry for entry in entries if entry.fate is not None])
        if chunk.reported is None:  # being written; or the caller was interrupted
            self.report(chunk, (), report)

    def up(self) -> None:
        """Publish what is on the disk: the broker is available."""
        self._spool.look()
        self._fill()

    def adopted(self, entries: Sequence[Entry]) -> None:
        """Write those of another publisher's entries that are kept, and in no file."""
        kept = [entry for entry in entries if entry.kept and entry.row is None]
        if kept:
            self._spool.write(kept, _nothing)

    def take_over(self, files: Sequence[SpoolFile]) -> None:
        """Go on with the files of a publisher that this one replaces; called on its thread."""
        if files:
            self._host.call_soon(partial(self._take_over, files))

    def hand_over(self, successor: Spooling | None) -> Callable[[], None]:
        """End; return a function that gives the files to ``successor``.

        Call it when the entries have moved.
        """
        files = self._spool.hand_over()
        self._restore()  # the file counts it as in memory: else it would be nowhere
        self._pass_on = self._leave if successor is None else successor.take_over
        return partial(self._pass_on, files)

    def secure(self) -> None:
        """Write what is kept, and end; forget what is written, so that it doesn't count as lost."""
        left = self._spool.stop()
        on_disk = [entry for entry in self._backlog.kept_entries if entry.row is not None]
        self._backlog.leave(on_disk)
        if left:
            logger.info("%d event(s) stay in the spool %s", left, self._folder)

    def _keep(self, news: News) -> None:
        held = [each for each in news.reports if each[1].kept]
        news.reports = [each for each in news.reports if not each[1].kept]
        kept, news.kept = news.kept, []
        later = News(kept=kept, error=news.error, quiet=news.quiet)
        inside, aside = self._divided(kept)

        def written() -> None:
            _resolve(held)
            if kept:
                self._host.call_soon(partial(self._notify, later))

        if aside:
            self._spool.write(inside, _nothing)
            self._spool.write(aside, written, aside=True)
        else:
            self._spool.write(inside, written)

    def _divided(self, kept: Sequence[Entry]) -> tuple[Sequence[Entry], Sequence[Entry]]:
        """Return those of ``kept`` that stay in memory, and those that go aside."""
        room = 0
        if not self._own_aside:
            events, size = self._backlog.kept_in_memory  # with those of kept
            room, left = len(kept), WINDOW_BYTES - size
            while room and (events > WINDOW or left < 0):
                room -= 1
                events -= 1
                left += kept[room].size
        if room == len(kept):
            return kept, ()
        aside = self._backlog.put_aside(kept[room:])
        self._own_aside += len(aside)
        chosen = set(aside)
        return [entry for entry in kept if entry not in chosen], aside

    def _fill(self) -> None:
        """Have the next window read, once the present one is half empty."""
        if self._reading or not self._backlog.aside_size[0] or not self._host.connected:
            return
        events, size = self._backlog.kept_in_memory
        if events <= WINDOW // 2 and size <= WINDOW_BYTES // 2:
            self._reading = True
            self._spool.read(self._on_read)

    def _on_read(self, read: Read) -> None:
        """Have the backlog take what was read; on the spool's thread."""
        self._arrived = read
        self._host.call_soon(self._go_on)

    def _go_on(self) -> None:
        if self._arrived is None:  # taken by hand_over()
            return
        self._reading = False
        if self._restore():
            self._fill()

    def _restore(self) -> bool:
        """Add to the backlog what has arrived; return whether there was any event."""
        read, self._arrived = self._arrived, None
        if read is None:
            return False
        self._own_aside -= read.own
        self._backlog.restore(read.entries)
        return bool(read.entries)

    def _on_adopted(self, events: int, size: int) -> None:
        if self._pass_on is not None:
            return
        self._backlog.add_aside(events, size)
        self._fill()

    def _take_over(self, files: Sequence[SpoolFile]) -> None:
        if self._pass_on is not None:  # replaced itself, meanwhile
            self._pass_on(files)
            return
        self._own_aside += 1  # whatever is published from now on is behind them
        self._spool.take_over(
            files,
            lambda events, size: self._host.call_soon(partial(self._on_taken_over, events, size)),
        )

    def _on_taken_over(self, events: int, size: int) -> None:
        if self._pass_on is not None:  # counted by the successor
            return
        self._own_aside += events - 1
        self._backlog.add_aside(events, size)
        self._fill()

    def _on_lost(self, events: int, own: int) -> None:
        self._own_aside -= own
        self._notify(self._backlog.lose_aside(events))
        self._fill()

    def _leave(self, files: Sequence[SpoolFile]) -> None:
        left = sum(file.unread for file in files)
        for file in files:
            if file.in_memory:  # the successor has them, in its memory
                try:
                    file.change((), list(file.in_memory))
                except (Unreadable, Unwritable) as error:
                    logger.error(
                        "cannot delete %d event(s) that the next publisher has; who adopts their "
                        "file sends them again: %s",
                        len(file.in_memory),
                        error,
                    )
            if file.events:
                file.abandon()
            else:
                file.remove()
        if left:
            logger.warning(
                "%d event(s) stay in the spool %s, since the publisher that replaces this one has "
                "none; `outbox spool drain` publishes them",
                left,
                self._folder,
            )


def _resolve(reports: Reports) -> None:
    for chunk, report in reports:
        if chunk.reported is None:
            chunk.resolve(report)


def _nothing() -> None: ...
