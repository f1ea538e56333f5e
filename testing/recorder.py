"""Records every event of the process instead of publishing it, and simulates failures."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from outbox import BrokerError, ConnectionLost, Event, UsageError
from outbox.backlog.backlog import Backlog, News
from outbox.backlog.chunk import Chunk, Entry, Fate
from outbox.configuration import configured_publisher
from outbox.messages.topics import matches
from outbox.observer import Attachment
from outbox.results.memory_results import MemoryResults
from outbox.settings import Settings
from outbox.testing.matching import is_copy, is_dead_letter
from outbox.transports.transport import Transport

__all__ = ["Recorder", "SimulatedCrash"]


logger = logging.getLogger("outbox.testing")


class SimulatedCrash(BaseException):
    """A simulated crash of the process, right after the broker has confirmed a chunk.

    ``except Exception`` doesn't catch it, as it wouldn't catch a real crash.
    """


class Recorder:
    """An observer (``outbox.observer``) that is also the transport of every publisher. Thread-safe.

    It doesn't depend on context variables: events of plain threads, of tasks and of explicit
    publishers are recorded alike.
    """

    hands_over = False
    supports_delay = True
    longest_delay = None
    on_own_thread = False
    circuit_open = False
    successor: Transport | None = None

    def __init__(self, where: str = "a test") -> None:
        self._where = where
        self._ended = False
        self._lock = threading.RLock()  # a signal handler may enqueue, too
        self._enqueued: dict[int, Event] = {}  # by identity: a test may enqueue equal events
        self._stored: dict[int, Event] = {}
        self._attachments: dict[int, Attachment] = {}  # of events that are pending or stored
        self._published: list[Event] = []
        self._sent: list[Event] = []
        self._cleared: list[Event] = []
        self._committed: list[Event] = []  # stored, but the broker was away
        self._pretended: dict[int, Fate] = {}
        self._parked: list[Event] = []
        self.results = MemoryResults()
        self.backlog = Backlog()
        self._left: int | None = None  # how many events are still confirmed; None for all
        self._error: BrokerError = ConnectionLost("the connection was lost (simulated by the test)")
        self._unroutable: list[str] = []
        self._crashes = False

    def transport_of(self, settings: Settings) -> Recorder:
        """Return itself, instead of the publisher's transport."""
        return self

    def consumed_with(self, settings: Settings) -> Settings:
        """Refuse, since a worker would have nothing to consume.

        Raises:
            UsageError: always.
        """
        raise UsageError(
            "this test's events are recorded, not published, so a worker has nothing to consume: "
            "process them with deliver_all(), or really publish them, with the fixture live_events"
        )

    @property
    def connected(self) -> bool:
        """Whether the simulated broker is reachable."""
        return self._left != 0

    @property
    def settled(self) -> bool:
        """Whether every published event has a fate."""
        return not self.backlog.unsettled

    @property
    def waiting_size(self) -> tuple[int, int]:
        """The number of kept events, and their bytes."""
        return self.backlog.kept_size

    @property
    def pending(self) -> tuple[Event, ...]:
        """The events neither published nor dropped yet, in order of enqueueing."""
        return self._held_among(self._enqueued)

    @property
    def stored(self) -> tuple[Event, ...]:
        """The events stored in a transaction of the application's database."""
        return self._held_among(self._stored)

    @property
    def lasting(self) -> tuple[Event, ...]:
        """The events that were published, or are in a transaction that was not rolled back."""
        held = [event for event in self.pending if id(event) in self._attachments]
        waiting = (*self.stored, *held)  # before the published ones: they become those
        published = self.published
        ids = set(map(id, published))
        return (*published, *(event for event in waiting if id(event) not in ids))

    @property
    def published(self) -> tuple[Event, ...]:
        """The events that the application has published, in order of publishing."""
        return self._copy(self._published)

    @property
    def dead_letters(self) -> tuple[Event, ...]:
        """The dead letters of the application's consumers, in order of publishing."""
        return tuple(event for event in self.sent if is_dead_letter(event))

    @property
    def sent(self) -> tuple[Event, ...]:
        """All events published, also dead letters and copies for retries, in order."""
        return self._copy(self._sent)

    @property
    def parked(self) -> tuple[Event, ...]:
        """The events parked because they were unroutable."""
        return self._copy(self._parked)

    @property
    def dropped(self) -> tuple[Event, ...]:
        """The events dropped by a rollback or by ``clear_events()``, in order of dropping.

        At the end, those of which no rollback was announced.
        """
        with self._lock:
            candidates = (*self._enqueued.values(), *self._stored.values())
        gone = [event for event in candidates if not self._is_held(event)]
        return (*self._copy(self._cleared), *gone)

    @property
    def kept(self) -> tuple[Event, ...]:
        """The events kept while the broker is away, in order."""
        return self.backlog.kept

    def enqueued(self, event: Event) -> None:
        """Record an event that was collected."""
        if self._ended:
            logger.warning(
                "late event %r: its unit of work began in a test that is over, %s",
                event.id,
                self._where,
            )
        with self._lock:
            self._enqueued[id(event)] = event

    def stored_in_transaction(self, event: Event) -> None:
        """Record an event that was stored."""
        with self._lock:
            self._stored[id(event)] = event

    def attached(self, event: Event, attachment: Attachment) -> None:
        """Record that an event is dropped once ``attachment`` doesn't hold."""
        with self._lock:
            self._attachments[id(event)] = attachment

    def committed(self, events: Sequence[Event]) -> None:
        """Record stored events as published, as a relay does after the commit."""
        with self._lock:
            for event in events:
                if id(event) not in self._stored:
                    continue
                self._attachments.pop(id(event), None)
                match self._fate_of(event):
                    case None:
                        self._committed.append(event)  # the broker is away: they stay stored
                    case Fate.REJECTED, _:
                        pass  # as a dead row does
                    case _:
                        self._forget(event)

    def advice(self, event: Event) -> str:
        """Return how an event that is not published yet will be; "" if nothing is known."""
        attachment = self._attachments.get(id(event))
        return "" if attachment is None else attachment.advice

    def cleared(self, events: Sequence[Event]) -> None:
        """Record events that were dropped."""
        with self._lock:
            for event in events:
                self._forget(event)
                if id(event) not in self._pretended:
                    self._cleared.append(event)

    def pretend(self, events: Sequence[Event], *, success: bool) -> None:
        """Record events as published or dropped, whatever happens to their unit of work."""
        with self._lock:
            for event in events:
                self._forget(event)
                self._pretended[id(event)] = Fate.PUBLISHED if success else Fate.IGNORED
                if success:
                    self._note_published(event)
                else:
                    self._cleared.append(event)

    def end(self) -> None:
        """Note that the test is over; later events are recorded, but logged as late."""
        self._ended = True

    # ------------------------------------------------------------------ simulated failures

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
        """Make events to ``target`` unroutable until the end of the block."""
        self._unroutable.append(target)
        try:
            yield
        finally:
            self._unroutable.remove(target)

    @contextlib.contextmanager
    def crashing(self) -> Iterator[None]:
        """Raise :class:`SimulatedCrash` in the block whenever a chunk has been confirmed."""
        self._crashes = True
        try:
            yield
        finally:
            self._crashes = False

    # ------------------------------------------------------------------------- a transport

    def start(self) -> None:
        """Do nothing: there is nothing to connect to."""

    def start_now(self) -> None:
        """Do nothing: there is no thread."""

    def queue_for(self, event: Event, engine: Any, options: Mapping[str, Any]) -> str:
        """Return ``""``: whatever is stored, a relay or this process publishes."""
        return ""

    def look_into(self, queues: Collection[str]) -> None:
        """Do nothing: nothing is delivered from a table."""

    def announce(self, body: bytes) -> None:
        """Do nothing: only RabbitMQ passes it on."""

    def ping(self, answer: Callable[[], None]) -> bool:
        """Return False: it has no thread."""
        return False

    def prepare(self, events: Sequence[Event], *, keep: bool) -> Chunk:
        """Return ``events`` as a chunk."""
        chunk = Chunk(events, keep=keep)
        chunk.holder = self
        return chunk

    def hand_in(self, chunk: Chunk) -> None:
        """Record the fates of the events of ``chunk`` at once."""
        if not chunk.accept():
            return
        entries = chunk.entries
        with self._lock:
            self.backlog.up()  # each chunk tries the broker again
            news = [self.backlog.add(chunk)]
            waiting = self.backlog.take(sys.maxsize, 0)
            for entry in entries:
                self._forget(entry.event)
                fate = self._fate_of(entry.event)
                if fate is not None:
                    news.append(self.backlog.give_fate([entry], *fate))
            self.backlog.requeue(waiting)
            if any(entry.fate is None for entry in entries):
                news.append(self.backlog.down((), self._error))
        _resolve(*news)
        if self._crashes and entries:
            raise SimulatedCrash

    def release(self, chunk: Chunk) -> None:
        """Do nothing: callers never wait."""

    def drain(self, timeout: float) -> bool:
        """Return whether nothing is kept."""
        return not self.kept

    def adopt(self, entries: Sequence[Entry]) -> None:
        """Do nothing: publishers have nothing to move in a test."""

    def retire(self, successor: Transport, timeout: float) -> bool:
        """Leave the events where they are: they belong to the test."""
        return True

    def close_when_settled(self, then: Callable[[], object]) -> None:
        """Call ``then``."""
        then()

    def close(self, *, graceful: bool = True) -> tuple[Event, ...]:
        """Return no events: the kept ones belong to the test."""
        return ()

    def _fate_of(self, event: Event) -> tuple[Fate, str] | None:
        """Return the fate of ``event``, and its reason; None while the broker is unavailable."""
        if id(event) in self._pretended:
            return self._pretended[id(event)], ""
        if self._left is not None:
            if self._left == 0:
                return None
            self._left -= 1
        if any(matches(pattern, event.target) for pattern in self._unroutable):
            return self._fate_without_queue(event)
        self._note_published(event)
        return Fate.PUBLISHED, ""

    def _note_published(self, event: Event) -> None:
        self._sent.append(event)
        if not is_copy(event):
            self._published.append(event)

    def _fate_without_queue(self, event: Event) -> tuple[Fate, str]:
        publisher = configured_publisher()
        default = "park" if publisher is None else publisher.settings.unroutable
        match event.unroutable or default:
            case "park":
                self._parked.append(event)
                return Fate.PARKED, ""
            case "fail":
                return Fate.REJECTED, "unroutable: 312 NO_ROUTE"
            case _:
                return Fate.IGNORED, ""

    def _publish_kept(self) -> None:
        with self._lock:
            self.backlog.up()
            entries = self.backlog.take(sys.maxsize, 0)
            for entry in entries:
                self._note_published(entry.event)
            news = self.backlog.give_fate(entries, Fate.PUBLISHED)
            committed, self._committed = self._committed, []
            self.committed(committed)
        _resolve(news)

    def _forget(self, event: Event) -> None:
        self._enqueued.pop(id(event), None)
        self._stored.pop(id(event), None)
        self._attachments.pop(id(event), None)

    def _held_among(self, events: dict[int, Event]) -> tuple[Event, ...]:
        return tuple(event for event in self._copy(events.values()) if self._is_held(event))

    def _is_held(self, event: Event) -> bool:
        attachment = self._attachments.get(id(event))
        return attachment is None or attachment.holds()

    def _copy(self, events: object) -> tuple[Event, ...]:
        with self._lock:
            return tuple(events)  # type: ignore[arg-type]


def _resolve(*changes: News) -> None:
    """Resolve the reported chunks; call it without the lock: callbacks may publish."""
    for news in changes:
        for chunk, report in news.reports:
            chunk.resolve(report)
