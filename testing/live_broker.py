"""The broker of a live test: every event of the process goes there, and is read back."""

from __future__ import annotations

import logging
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from outbox import Event, PublishReport
from outbox.backlog.chunk import Chunk, Entry, Fate
from outbox.messages.delivery import Delivery, QueueSpec
from outbox.messages.received_event import Undecodable, decode
from outbox.observer import Attachment, seam
from outbox.settings import Settings
from outbox.system import process
from outbox.system.steady_clock import monotonic
from outbox.testing.matching import is_copy, is_dead_letter
from outbox.testing.queue_reader import QueueReader
from outbox.transports.registry import open_transport
from outbox.transports.transport import Transport

__all__ = ["LiveBroker", "event_of"]

logger = logging.getLogger("outbox.testing")

_QUEUE_PREFIX = "outbox.test"
_ARRIVAL_TIMEOUT = 30.0

Address = tuple[str, str, str]
"""An event's id, exchange and target."""


class LiveBroker:
    """An observer that makes every publisher and worker of the process use the test's broker.

    Events published to an exchange are read back from a queue bound to it with ``#``. Events sent
    straight to a queue, and delayed ones, count as arrived when the broker confirms them.
    Thread-safe.

    Attributes:
        url: the URL of the broker.
        changed: the condition that is notified when an event arrives or a message is settled.
    """

    hands_over = True
    results = None

    def __init__(self, url: str, where: str) -> None:
        """Make a live broker, not connected yet.

        Args:
            url: the URL of a broker that nothing else uses.
            where: the name of the calling test or place, for messages.
        """
        self.url = url
        self.changed = threading.Condition()
        self._where = where
        self._ended = False
        self._opening = threading.Lock()
        self._transports: list[tuple[Settings, _LiveTransport]] = []
        self._readers: dict[str, QueueReader] = {}
        self._settings = self.consumed_with(Settings(declare="create"))
        self._control = open_transport(self._settings)
        self._thread = threading.local()
        # Guarded by `changed`:
        self._pending: dict[int, Event] = {}
        self._stored: dict[str, Event] = {}
        self._attachments: dict[str, Attachment] = {}
        self._cleared: list[Event] = []
        self._unreported: list[Future[PublishReport]] = []
        self._ever_kept: list[Event] = []
        self._parked: list[Event] = []
        self._published: list[Event] = []
        self._present: list[Event] = []
        self._dead_letters: list[Event] = []
        self._confirmed: set[str] = set()
        self._expected: Counter[Address] = Counter()
        self._arrived: Counter[Address] = Counter()
        self._scheduled: Counter[Address] = Counter()

    # ------------------------------------------------------------------------ an observer

    def transport_of(self, settings: Settings) -> _LiveTransport:
        """Return the transport to the test's broker for a publisher with these settings."""
        with self._opening:
            for known, transport in self._transports:
                if known == settings:
                    return transport
            transport = _LiveTransport(self, open_transport(self.consumed_with(settings)))
            self._transports.append((settings, transport))
            return transport

    def consumed_with(self, settings: Settings) -> Settings:
        """Return ``settings`` for the test's broker, where nothing is declared yet."""
        return replace(settings, url=self.url, declare="create")

    def enqueued(self, event: Event) -> None:
        """Note an event that was collected."""
        if self.has_ended([event]):
            return
        with self.changed:
            self._pending[id(event)] = event

    def stored_in_transaction(self, event: Event) -> None:
        """Note an event that was stored."""
        with self.changed:
            self._stored[event.id] = event

    def attached(self, event: Event, attachment: Attachment) -> None:
        """Note that an event is dropped once ``attachment`` doesn't hold."""
        with self.changed:
            self._attachments[event.id] = attachment

    def committed(self, events: Sequence[Event]) -> None:
        """Note that stored events are being published: their rows may be gone soon."""
        with self.changed:
            for event in events:
                self._attachments.pop(event.id, None)

    def cleared(self, events: Sequence[Event]) -> None:
        """Note events that were dropped."""
        with self.changed:
            for event in events:
                self._pending.pop(id(event), None)
                self._stored.pop(event.id, None)
                self._attachments.pop(event.id, None)
                self._cleared.append(event)

    # ------------------------------------------------------------------------- the states

    @property
    def published(self) -> tuple[Event, ...]:
        """The events that the application has published, in order of arrival.

        Raises:
            AssertionError: a confirmed event has not arrived within 30 seconds.
        """
        return self._copy(self._published)

    @property
    def present(self) -> tuple[Event, ...]:
        """The events that have reached their queues; delayed ones only once they are due."""
        return self._copy(self._present)

    @property
    def dropped(self) -> tuple[Event, ...]:
        """The events dropped by a rollback or by ``clear_events()``."""
        with self.changed:
            cleared = tuple(self._cleared)
            candidates = (*self._pending.values(), *self._stored.values())
        return (*cleared, *(event for event in candidates if not self._is_held(event)))

    @property
    def pending(self) -> tuple[Event, ...]:
        """The events neither published nor dropped yet."""
        with self.changed:
            pending = tuple(self._pending.values())
        return tuple(event for event in pending if self._is_held(event))

    @property
    def stored(self) -> tuple[Event, ...]:
        """The events stored in a transaction and not published yet."""
        with self.changed:
            self._take_stock()
            stored = [one for one in self._stored.values() if one.id not in self._confirmed]
        return tuple(event for event in stored if self._is_held(event))

    @property
    def lasting(self) -> tuple[Event, ...]:
        """The events that were published, or are in a transaction that was not rolled back."""
        held = [event for event in self.pending if event.id in self._attachments]
        waiting = (*self.stored, *held)  # before the published ones: they become those
        published = self.published
        ids = {event.id for event in published}
        return (*published, *(event for event in waiting if event.id not in ids))

    @property
    def parked(self) -> tuple[Event, ...]:
        """The events parked because they were unroutable."""
        with self.changed:
            self._take_stock()
            return tuple(self._parked)

    @property
    def dead_letters(self) -> tuple[Event, ...]:
        """The dead letters of the application's consumers."""
        with self.changed:
            self._take_stock()
            return tuple(self._dead_letters)

    @property
    def kept(self) -> tuple[Event, ...]:
        """The events that the publishers keep."""
        transports = list(self._transports)
        return tuple(event for _, transport in transports for event in transport.kept)

    # ------------------------------------------------------------------- for the testing kit

    def read_back(self, exchanges: Iterable[str]) -> None:
        """Read back every event published to ``exchanges`` from now on."""
        for exchange in exchanges:
            if exchange and exchange not in self._readers:
                with self._opening:
                    if exchange not in self._readers:
                        queue = f"{_QUEUE_PREFIX}.{len(self._readers)}"
                        spec = QueueSpec(queue, ("#",), exchange)
                        reader = QueueReader(self._settings, spec, self._on_arrival)
                        reader.open(self._control)
                        self._readers[exchange] = reader

    def advice(self, event: Event) -> str:
        """Return how an event that is not published yet will be; "" if nothing is known."""
        attachment = self._attachments.get(event.id)
        return "" if attachment is None else attachment.advice

    def declare(self, spec: QueueSpec) -> bool:
        """Declare a consumer's queue, with its bindings; return whether it existed already."""
        reader = QueueReader(self._settings, spec, None)
        try:
            return reader.open(self._control)
        finally:
            reader.close()

    def put(self, events: Sequence[Event]) -> None:
        """Publish ``events`` straight to queues, without counting them as the test's.

        Raises:
            PublishFailed: the broker didn't accept them.
        """
        chunk = self._control.prepare(events, keep=False)
        self._control.hand_in(chunk)
        chunk.future.result(_ARRIVAL_TIMEOUT).raise_for_failure()

    def submitting(self, events: Sequence[Event]) -> None:
        """Note that ``events`` are about to be submitted."""
        self.read_back({event.exchange for event in events})
        with self.changed:
            for event in events:
                self._pending.pop(id(event), None)
                if event.deliver_at is not None:
                    self._scheduled[_address(event)] += 1

    def submitted(self, chunk: Chunk) -> None:
        """Note that ``chunk`` was submitted by this thread."""
        with self.changed:
            self._unreported.append(chunk.future)
        self._reports_of_thread().append(chunk.future)

    def take_published_here(self) -> tuple[Event, ...]:
        """Return the events that this thread has published since its last call."""
        futures = self._reports_of_thread()
        reports = [future.result() for future in futures if future.done()]
        futures.clear()
        return tuple(event for report in reports for event in report.published)

    def has_ended(self, events: Sequence[Event]) -> bool:
        """Return whether the test is over; if so, log that ``events`` are too late."""
        if self._ended:
            logger.warning(
                "ignoring %d late event(s): their unit of work began in a test that is over, %s",
                len(events),
                self._where,
            )
        return self._ended

    def end(self) -> None:
        """Disconnect; later events are ignored."""
        handover: Any = sys.modules.get("outbox.sql.handover")
        if handover is not None:
            handover.drain()
        self._ended = True
        with self._opening:
            for _, transport in self._transports:
                transport.close()
            for reader in self._readers.values():
                reader.close()
            self._control.close()

    def leave_to_parent(self) -> None:
        """In a forked child, open new connections to publish; the parent reads what arrives."""
        _inherited.append((self._transports, list(self._readers.values()), self._control))
        self.changed = threading.Condition()
        self._opening = threading.Lock()
        self._transports = []
        self._control = open_transport(self._settings)
        self._unreported, self._ever_kept = [], []

    def _reports_of_thread(self) -> list[Future[PublishReport]]:
        reports: list[Future[PublishReport]] | None = getattr(self._thread, "reports", None)
        if reports is None:
            reports = self._thread.reports = []
        return reports

    def _on_arrival(self, delivery: Delivery) -> None:
        event = event_of(delivery)
        address = _address(event)
        with self.changed:
            self._confirmed.add(event.id)
            self._present.append(event)
            if self._scheduled[address]:
                self._scheduled[address] -= 1
            else:
                self._arrived[address] += 1
                self._published.append(event)
            self.changed.notify_all()

    def _is_held(self, event: Event) -> bool:
        attachment = self._attachments.get(event.id)
        return attachment is None or attachment.holds()

    def _copy(self, events: list[Event]) -> tuple[Event, ...]:
        deadline = monotonic() + _ARRIVAL_TIMEOUT
        with self.changed:
            while missing := self._take_stock():
                if not self.changed.wait(max(0.0, deadline - monotonic())):
                    raise AssertionError(
                        "the broker confirmed events that did not arrive within "
                        f"{_ARRIVAL_TIMEOUT:g} s (id, exchange, target): {sorted(missing)}"
                    )
            return tuple(events)

    def _confirm(self, event: Event) -> None:
        self._confirmed.add(event.id)
        if is_dead_letter(event):
            self._dead_letters.append(event)
            self._present.append(event)
        elif is_copy(event):
            pass  # its message is settled by a later attempt: it is neither published nor present
        elif event.deliver_at is not None:
            self._published.append(event)
        elif not event.exchange:
            self._published.append(event)
            self._present.append(event)

    def _take_stock(self) -> Counter[Address]:
        """Note the fates known by now; return the confirmed events that have not arrived."""
        waiting, self._unreported = self._unreported, []
        for future in waiting:
            if not future.done():
                self._unreported.append(future)
                continue
            report = future.result()
            self._parked += report.parked
            self._ever_kept += report.kept
            for event in report.published:
                self._confirm(event)
                if event.exchange and event.deliver_at is None:
                    self._expected[_address(event)] += 1
        kept = set(map(id, self.kept)) if self._ever_kept else ()
        for event in [event for event in self._ever_kept if id(event) not in kept]:
            self._ever_kept.remove(event)
            self._confirm(event)
        return self._expected - self._arrived


class _LiveTransport:
    """A transport to the test's broker that notes the events it publishes."""

    def __init__(self, broker: LiveBroker, inner: Transport) -> None:
        self._broker = broker
        self._inner = inner
        self.supports_delay = inner.supports_delay
        self.longest_delay = inner.longest_delay
        self.backlog = inner.backlog
        self.successor: Transport | None = None

    @property
    def connected(self) -> bool:
        return self._inner.connected

    @property
    def on_own_thread(self) -> bool:
        return self._inner.on_own_thread

    def start(self) -> None:
        self._inner.start()

    @property
    def settled(self) -> bool:
        return self._inner.settled

    @property
    def circuit_open(self) -> bool:
        return self._inner.circuit_open

    @property
    def kept(self) -> tuple[Event, ...]:
        return self._inner.kept

    @property
    def waiting_size(self) -> tuple[int, int]:
        return self._inner.waiting_size

    def start_now(self) -> None:
        self._inner.start_now()

    def queue_for(self, event: Event, engine: Any, options: Mapping[str, Any]) -> str:
        return ""  # the test follows what is published after the commit

    def look_into(self, queues: Collection[str]) -> None:
        self._inner.look_into(queues)

    def announce(self, body: bytes) -> None:
        self._inner.announce(body)

    def ping(self, answer: Callable[[], None]) -> bool:
        return self._inner.ping(answer)

    def prepare(self, events: Sequence[Event], *, keep: bool) -> Chunk:
        return self._inner.prepare(events, keep=keep)

    def hand_in(self, chunk: Chunk) -> None:
        events = [entry.event for entry in chunk.entries]
        if self._broker.has_ended(events):
            _withdraw(chunk)
            return
        self._broker.submitting(events)
        self._inner.hand_in(chunk)
        self._broker.submitted(chunk)

    def release(self, chunk: Chunk) -> None:
        self._inner.release(chunk)

    def adopt(self, entries: Sequence[Entry]) -> None:
        self._inner.adopt(entries)

    def retire(self, successor: Transport, timeout: float) -> bool:
        return True  # the events belong to the test

    def close_when_settled(self, then: Callable[[], object]) -> None:
        self._inner.close_when_settled(then)

    def drain(self, timeout: float) -> bool:
        return self._inner.drain(timeout)

    def close(self, *, graceful: bool = True) -> tuple[Event, ...]:
        return self._inner.close(graceful=graceful)


_inherited: list[object] = []
"""The parent's connections, kept in a forked child so that it never closes their sockets."""


def _leave_to_parent() -> None:
    observer = seam.observer
    if isinstance(observer, LiveBroker):
        observer.leave_to_parent()


process.after_fork(_leave_to_parent)


def event_of(delivery: Delivery) -> Event:
    """Return ``delivery`` as an event, even if it can't be decoded."""
    try:
        return decode(delivery)
    except Undecodable:
        return Event(
            id=delivery.message_id or "",
            target=delivery.target,
            exchange=delivery.exchange,
            body=delivery.body,
            content_type=delivery.content_type or "",
        )


def _withdraw(chunk: Chunk) -> None:
    if chunk.accept() and chunk.claim_report():
        for entry in chunk.entries:
            entry.fate, entry.reason = Fate.WITHDRAWN, "withdrawn: the test is over"
        chunk.resolve(chunk.report())


def _address(event: Event) -> Address:
    return event.id, event.exchange, event.target
