"""Records every event of the process in place of every publisher; fails where a test says so."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence

from outbox import BrokerError, ConnectionLost, Event, PublishReport, UsageError
from outbox.backlog.chunk import Chunk, Entry, Fate
from outbox.backlog.stats import Tally
from outbox.configuration import configured_publisher
from outbox.messages.topics import matches
from outbox.settings import Settings

__all__ = ["Recorder", "SimulatedCrash"]


logger = logging.getLogger("outbox.testing")


class SimulatedCrash(BaseException):
    """Stands for the death of the process right after the broker has confirmed.

    No ``except Exception`` catches it, as none would catch the real thing.
    """


class Recorder:
    """An observer (``outbox.observer``) that is also everybody's transport. Thread-safe.

    Nothing of it depends on context variables: events of bare threads, of tasks and of explicit
    publishers are recorded alike.
    """

    hands_over = False
    supports_delay = True
    longest_delay = None
    on_own_thread = False

    def __init__(self, where: str = "a test") -> None:
        self._where = where
        self._ended = False
        self._lock = threading.Lock()
        self._enqueued: dict[int, Event] = {}  # by identity: a test may enqueue equal events
        self._stored: dict[int, Event] = {}
        self._published: list[Event] = []
        self._cleared: list[Event] = []
        self._pretended: dict[int, Fate] = {}
        self._parked: list[Event] = []
        self._rejected: list[Event] = []
        self._kept: list[Event] = []
        self._left: int | None = None  # how many events are still confirmed; None for all
        self._error: BrokerError = ConnectionLost("the test has the broker away")
        self._unroutable: list[str] = []
        self._crashes = False
        self.tally = Tally()

    def transport_of(self, settings: Settings) -> Recorder:
        """Return itself, in place of every publisher's transport."""
        return self

    def consumed_with(self, settings: Settings) -> Settings:
        """Refuse: nothing is published that a worker could consume.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "events are recorded here, not published: a worker has nothing to consume; have them "
            "processed with deliver_all(), or publish them really, with the fixture live_events"
        )

    @property
    def connected(self) -> bool:
        """Whether the test lets the broker be there."""
        return self._left != 0

    @property
    def pending(self) -> tuple[Event, ...]:
        """What was enqueued and neither published nor dropped, in the order of enqueueing."""
        return self._copy(self._enqueued.values())

    @property
    def stored(self) -> tuple[Event, ...]:
        """What was stored in a transaction of the application's database."""
        return self._copy(self._stored.values())

    @property
    def published(self) -> tuple[Event, ...]:
        """What was published, in that order."""
        return self._copy(self._published)

    @property
    def parked(self) -> tuple[Event, ...]:
        """What no queue was bound for, and was parked."""
        return self._copy(self._parked)

    @property
    def rejected(self) -> tuple[Event, ...]:
        """What was given up."""
        return self._copy(self._rejected)

    @property
    def dropped(self) -> tuple[Event, ...]:
        """What was dropped, by a rollback or by ``clear_events()``, in that order."""
        return self._copy(self._cleared)

    @property
    def kept(self) -> tuple[Event, ...]:
        """What is kept while the broker is away, in that order."""
        return self._copy(self._kept)

    @property
    def kept_size(self) -> tuple[int, int]:
        """How many events are kept, and the bytes of their bodies."""
        kept = self.kept
        return len(kept), sum(len(event.body) for event in kept)

    def enqueued(self, event: Event) -> None:
        """Record an event that was collected."""
        if self._ended:
            logger.warning(
                "the event %r came when the test was over that its unit of work began in, %s",
                event.id,
                self._where,
            )
        with self._lock:
            self._enqueued[id(event)] = event

    def stored_in_transaction(self, event: Event) -> None:
        """Record an event that was stored."""
        with self._lock:
            self._stored[id(event)] = event

    def cleared(self, events: Sequence[Event]) -> None:
        """Record events that were dropped."""
        with self._lock:
            for event in events:
                self._enqueued.pop(id(event), None)
                self._stored.pop(id(event), None)
                if id(event) not in self._pretended:
                    self._cleared.append(event)

    def pretend(self, events: Sequence[Event], *, success: bool) -> None:
        """Record events as published or dropped, whatever becomes of their unit of work."""
        with self._lock:
            for event in events:
                self._enqueued.pop(id(event), None)
                self._stored.pop(id(event), None)
                self._pretended[id(event)] = Fate.PUBLISHED if success else Fate.IGNORED
                (self._published if success else self._cleared).append(event)

    def end(self) -> None:
        """Note that the test is over: what comes later is of no interest to anybody."""
        self._ended = True

    # ---------------------------------------------------------------- what a test may break

    @contextlib.contextmanager
    def failing(self, after: int, error: BrokerError | None) -> Iterator[None]:
        """Confirm ``after`` more events and then none, until the end of the block."""
        before = self._left, self._error
        self._left, self._error = after, error or self._error
        try:
            yield
        finally:
            self._left, self._error = before
            if self._left is None:
                self._publish_kept()

    @contextlib.contextmanager
    def unroutable(self, target: str) -> Iterator[None]:
        """Have no queue for events to ``target``, until the end of the block."""
        self._unroutable.append(target)
        try:
            yield
        finally:
            self._unroutable.remove(target)

    @contextlib.contextmanager
    def crashing(self) -> Iterator[None]:
        """Raise :class:`SimulatedCrash` when a chunk has been confirmed, in the block."""
        self._crashes = True
        try:
            yield
        finally:
            self._crashes = False

    # ------------------------------------------------------------------------- a transport

    def start(self) -> None:
        """Do nothing: there is nothing to connect to."""

    def submit(self, events: Sequence[Event], *, keep: bool) -> Chunk:
        """Record what becomes of ``events``, at once."""
        chunk = Chunk(events, keep=keep)
        with self._lock:
            for entry in chunk.entries:
                self._enqueued.pop(id(entry.event), None)
                self._decide(entry, chunk)
        chunk.resolve(self._told(chunk))
        if self._crashes and events:
            raise SimulatedCrash
        return chunk

    def release(self, chunk: Chunk) -> None:
        """Do nothing: no caller ever waits."""

    def drain(self, timeout: float) -> bool:
        """Return whether nothing is kept."""
        return not self._kept

    def close(self, *, graceful: bool = True) -> tuple[Event, ...]:
        """Return nothing: what is kept is the test's."""
        return ()

    def _decide(self, entry: Entry, chunk: Chunk) -> None:
        event = entry.event
        if id(event) in self._pretended:
            self._end(entry, self._pretended[id(event)])
            return
        if self._left is not None:
            if self._left == 0:
                chunk.error = self._error
                if chunk.keep:
                    self._kept.append(event)
                else:
                    self._end(entry, Fate.WITHDRAWN, f"withdrawn: {self._error}")
                return
            self._left -= 1
        if any(matches(one, event.target) for one in self._unroutable):
            self._find_no_queue(entry)
        else:
            self._published.append(event)
            self._end(entry, Fate.PUBLISHED)

    def _find_no_queue(self, entry: Entry) -> None:
        publisher = configured_publisher()
        default = "park" if publisher is None else publisher.settings.unroutable
        match entry.event.unroutable or default:
            case "park":
                self._parked.append(entry.event)
                self._end(entry, Fate.PARKED)
            case "fail":
                self._rejected.append(entry.event)
                self._end(entry, Fate.REJECTED, "unroutable: 312 NO_ROUTE")
            case _:
                self._end(entry, Fate.IGNORED)

    def _end(self, entry: Entry, fate: Fate, reason: str = "") -> None:
        entry.fate = fate
        entry.reason = reason
        self.tally.add(fate.value)

    def _told(self, chunk: Chunk) -> PublishReport:
        return chunk.report()

    def _publish_kept(self) -> None:
        with self._lock:
            self._published += self._kept
            self.tally.add(Fate.PUBLISHED.value, len(self._kept))
            self._kept = []

    def _copy(self, events: object) -> tuple[Event, ...]:
        with self._lock:
            return tuple(events)  # type: ignore[arg-type]
