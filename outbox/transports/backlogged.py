"""The base class of transports that hold events in a backlog until they are confirmed."""

from __future__ import annotations

import _thread
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from outbox.backlog.backlog import Backlog, News, not_confirmed
from outbox.backlog.chunk import Chunk, Entry
from outbox.backlog.notifier import Notifier, ids, log_kept
from outbox.errors import BrokerError, ConnectionLost, UsageError
from outbox.event import Event
from outbox.system import log_lines
from outbox.transports.transport import Transport

if TYPE_CHECKING:
    from outbox.spool.spooling import Spooling

__all__ = ["BackloggedTransport"]

logger = logging.getLogger("outbox.publisher")

_SILENCE = 1.0
"""Seconds after which what waits for confirms counts as kept."""

_BUSY = 1000
"""Items in the inbox that show that the thread is stuck, in a hook or a log handler."""

_HURRY = 0.5  # seconds between two attempts to connect during drain()


class BackloggedTransport:
    """The part of a ``Transport`` between its callers and its thread.

    Callers put chunks and requests into an inbox, each by a single instruction, and only the
    transport's thread touches the backlog. So there is no lock that a caller holds while a signal
    handler or a finalizer interrupts it, and none for which the thread could wait.

    Attributes:
        backlog: the entries without a fate.
        successor: the transport that everything was moved to, or None.
        spool: where kept events are written to, or None.
    """

    def __init__(self, notify: Notifier) -> None:
        self._notify: Callable[[News], None] = notify
        self.spool: Spooling | None = None
        self.backlog = Backlog()
        self.successor: Transport | None = None
        self._inbox: deque[Chunk | Callable[[], object]] = deque()
        self._taking_in = False
        self._looks = 0
        self._woken_at = -1
        self._ended = False
        self._to_finish = [None]
        self._left: tuple[Event, ...] = ()
        self._retires_to: Transport | None = None
        self._retired = _thread.allocate_lock()
        self._retired.acquire()

    @property
    def on_own_thread(self) -> bool:
        """Whether the caller runs on the transport's thread."""
        raise NotImplementedError

    @property
    def settled(self) -> bool:
        """Whether every event that was handed in has a fate."""
        # In this order: the thread takes a chunk out of the inbox before it adds it to the backlog.
        return self.idle and not self.backlog.unsettled

    @property
    def idle(self) -> bool:
        """Whether nothing that callers have handed in waits for the thread."""
        return not self._inbox and not self._taking_in

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached now, as far as is known."""
        raise NotImplementedError

    @property
    def circuit_open(self) -> bool:
        """Whether chunks are reported at once, because the broker is unavailable."""
        return self.backlog.circuit is not None

    @property
    def kept(self) -> tuple[Event, ...]:
        """The kept events, in the order they will be sent."""
        waiting = [item for item in list(self._inbox) if isinstance(item, Chunk)]
        return self.backlog.kept + tuple(
            [
                entry.event
                for chunk in waiting
                if chunk.claimed and chunk.keep
                for entry in chunk.entries
            ]
        )

    @property
    def waiting_size(self) -> tuple[int, int]:
        """The number of events that wait for a broker which doesn't answer, and their bytes.

        Those that it is about to confirm don't count.
        """
        if self.connected and self.backlog.silence < _SILENCE and len(self._inbox) < _BUSY:
            return self.backlog.kept_size
        events, size = self.backlog.waiting_size
        for item in list(self._inbox):
            if isinstance(item, Chunk):
                events += len(item.entries)
                size += item.size
        return events, size

    def queue_for(self, event: Event, engine: Any, options: Mapping[str, Any]) -> str:
        """Return ``""``: whatever is stored, a relay or this process publishes."""
        return ""

    def look_into(self, queues: Collection[str]) -> None:
        """Do nothing: nothing is delivered from a table."""

    def use_spool(self, spool: Spooling) -> None:
        """Write kept events to ``spool``, before the transport is used."""
        self.spool = self._notify = self.backlog.spool = spool

    def call_soon(self, request: Callable[[], object]) -> None:
        """Have ``request`` called on the transport's thread."""
        self._ask(request)

    def encode(self, event: Event) -> bytes:
        """Return the frames of ``event``; on any thread."""
        return self._encode(event)

    def announce(self, body: bytes) -> None:
        """Do nothing: only RabbitMQ passes it on."""

    def ping(self, answer: Callable[[], None]) -> bool:
        """Return False: another process may keep a database locked for long."""
        return False

    def start(self) -> None:
        """Start connecting on the transport's thread, unless that has been done."""
        raise NotImplementedError

    def prepare(self, events: Sequence[Event], *, keep: bool) -> Chunk:
        """Encode ``events`` as a chunk, which ``hand_in`` accepts."""
        encode = self._encode
        chunk = Chunk(events, keep=keep, frames=[encode(event) for event in events])
        chunk.holder = self
        return chunk

    def hand_in(self, chunk: Chunk) -> None:
        """Accept a chunk that was prepared, and return at once.

        Raises:
            UsageError: the transport was closed.
        """
        chunk.submitted_at = time.monotonic()
        chunk.quiet = self.on_own_thread or log_lines.here.logging
        self.start()
        self._inbox.append(chunk)
        if self._ended:
            self._pass_on()
            if self.successor is None and chunk.revoke():
                raise UsageError("this publisher is closed; nothing was published")
        self._wake()

    def release(self, chunk: Chunk) -> None:
        """Report ``chunk`` now: its caller's timeout is over.

        The caller itself reports what it sees, since the thread may be busy; the thread then keeps
        or withdraws the rest. With a spool, the report waits until the kept events are written.
        """
        if not chunk.claim_report():
            return
        entries = chunk.entries
        try:
            if chunk.error is None:
                chunk.error = self.backlog.circuit or not_confirmed(chunk, time.monotonic())
            self.backlog.doubt(chunk)
            report = chunk.report()
            if self.spool is None or not report.kept:
                chunk.resolve(report)
            else:
                self.spool.report(chunk, [each for each in entries if each.fate is None], report)
            if report.kept and not chunk.quiet:
                chunk.quiet = True
                log_kept(report.kept, chunk.error)
        finally:
            self._ask(partial(self._on_released, chunk, entries))

    def drain(self, timeout: float) -> bool:
        """Wait until every event has its fate; return whether all do.

        Meanwhile another attempt is made every 0.5 s: after a long outage, the back-off would be
        longer than ``timeout``. Events that move to a successor meanwhile are drained there.
        """
        deadline = time.monotonic() + timeout
        if not self.settled and not self._wait_until_settled(deadline):
            return False
        last = self._retires_to or self.successor  # moved from one to the other
        while last is not None and last.successor is not None:
            last = last.successor
        return last is None or last.drain(max(0.0, deadline - time.monotonic()))

    def _wait_until_settled(self, deadline: float) -> bool:
        waiter = _thread.allocate_lock()
        waiter.acquire()
        self._ask(lambda: self._notify(self.backlog.when_settled(waiter.release)))
        remaining = deadline - time.monotonic()
        while not waiter.acquire(timeout=max(0.0, min(remaining, _HURRY))):
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return self.settled
            self._ask(self._hurry)
        return True

    def adopt(self, entries: Sequence[Entry]) -> None:
        """Take over ``entries`` of another transport's backlog, and their chunks."""
        last = self.successor
        if last is not None:
            while last.successor is not None:
                last = last.successor
            last.adopt(entries)
            return
        for entry in entries:
            entry.parked_as = entry.delayed_as = None
            entry.frames = self._encode(entry.event)
            entry.chunk.holder = self
        self.start()
        self._ask(partial(self._on_adopted, entries))

    def retire(self, successor: Transport, timeout: float) -> bool:
        """Move to ``successor`` all events that are here or will be handed in, in their order.

        Args:
            successor: a transport of another publisher.
            timeout: the seconds to wait.

        Returns:
            Whether everything was moved within ``timeout``; the rest follows.
        """
        self._retires_to = successor
        if self._stop_before_start():
            self._surrender()
            return True
        self._ask(self._on_retire)
        return self._retired.acquire(timeout=timeout)

    def close(self, *, graceful: bool = True) -> tuple[Event, ...]:
        """End the thread, and return the events that are left."""
        if self._stop(graceful=graceful) or self.on_own_thread:
            self._finish()
        elif not self._ended:
            logger.error("the publisher's thread is stuck, in a hook or a log handler")
            self._finish()
        return self._left

    def close_when_settled(self, then: Callable[[], object]) -> None:
        """Close once every event has a fate, and call ``then``; return at once."""

        def close() -> None:
            if not self._ended:  # otherwise the thread ends anyway, and must not be waited for
                self._stop(graceful=True)
            then()

        if self.settled and self._stop_before_start():
            then()
        else:
            self._ask(lambda: self._notify(self.backlog.when_settled(close)))

    def _ask(self, request: Callable[[], object]) -> None:
        """Have ``request`` called soon on the transport's thread."""
        self._inbox.append(request)
        if self._ended:
            self._pass_on()
        self._wake()

    def _wake(self) -> None:
        """Have the thread look into the inbox soon.

        The thread counts its looks. A wake-up since the latest one makes another unnecessary. One
        that is interrupted before it is noted is repeated.
        """
        looks = self._looks
        if self._woken_at != looks:
            self._wake_thread()
            self._woken_at = looks

    def _encode(self, event: Event) -> bytes:
        """Return the frames of ``event``, in the caller's thread."""
        raise NotImplementedError

    def _wake_thread(self) -> None:
        """Have ``_on_wake`` called on the thread; do nothing if it isn't started."""
        raise NotImplementedError

    def _stop_before_start(self) -> bool:
        """Prevent the thread from being started; return False if it has been."""
        raise NotImplementedError

    def _stop(self, *, graceful: bool) -> bool:
        """End the thread, within seconds; return whether it has ended or never began."""
        raise NotImplementedError

    # -------------------------------------------------------------------------------- on the thread

    def _hurry(self) -> None:
        """Make the next attempt now."""
        raise NotImplementedError

    def _on_retire(self) -> None:
        """Stop sending, and call ``_surrender`` when the confirms under way have arrived."""
        raise NotImplementedError

    def _take_in(self) -> None:
        """Add what is in the inbox to the backlog."""
        self._looks += 1
        self._taking_in = True
        inbox = self._inbox
        while inbox:
            item = inbox.popleft()
            try:
                if not isinstance(item, Chunk):
                    item()
                elif item.accept():
                    self._notify(self.backlog.add(item, self._held_back(item)))
            except Exception:  # a bug in outbox must not hold up the others
                logger.exception("unexpected error")
        self._taking_in = False

    def _held_back(self, chunk: Chunk) -> BrokerError | None:
        return None if self.spool is None else self.spool.reason_to_hold_back(chunk)

    def _on_adopted(self, entries: Sequence[Entry]) -> None:
        if self.successor is not None:  # this transport was replaced before it took them
            self.successor.adopt(entries)
            return
        self._notify(self.backlog.adopt(entries, self._held_back))
        if self.spool is not None:
            self.spool.adopted(entries)
        if self._ended:
            lost, news = self.backlog.close(ConnectionLost("the publisher was closed"))
            self._notify(news)
            logger.error("%d event(s) lost, the publisher was closed: %s", len(lost), ids(lost))

    def _up(self) -> None:
        """Note that the broker is available."""
        self.backlog.up()
        if self.spool is not None:
            self.spool.up()

    def _on_released(self, chunk: Chunk, entries: Sequence[Entry]) -> None:
        if chunk.reported is None and self.spool is None:  # the caller was interrupted
            chunk.resolve(chunk.report())
        holder = chunk.holder
        if holder is not self and isinstance(holder, BackloggedTransport):  # moved meanwhile
            holder._ask(partial(holder._on_released, chunk, entries))
            return
        report = chunk.report()
        self._notify(self.backlog.release(chunk))
        if self.spool is not None:
            self.spool.released(chunk, entries, report)

    def _surrender(self) -> None:
        """Move the backlog to the successor, and end."""
        successor = self._retires_to
        if successor is None or self.successor is not None:
            return
        while successor.successor is not None:
            successor = successor.successor
        spool = successor.spool if isinstance(successor, BackloggedTransport) else None
        hand_over = None if self.spool is None else self.spool.hand_over(spool)
        successor.adopt(self.backlog.surrender())
        if hand_over is not None:
            hand_over()
        self.successor, self._retires_to = successor, None
        self._finish()
        self._retired.release()

    def _finish(self) -> None:
        """Report every chunk, and refuse what comes later or pass it on; only once."""
        try:
            self._to_finish.pop()
        except IndexError:
            return
        self._ended = True
        if self.successor is None:
            self._take_in()
        else:
            self._pass_on()
        if self.spool is not None and self.successor is None:
            self._notify(self.backlog.down((), ConnectionLost("the publisher was closed")))
            self.spool.secure()
        self._left, news = self.backlog.close(ConnectionLost("the publisher was closed"))
        self._notify(news)

    def _pass_on(self) -> None:
        """Give what is left in the inbox to the successor; on any thread, after the end."""
        while True:
            try:
                item = self._inbox.popleft()
            except IndexError:
                return
            if not isinstance(item, Chunk):
                item()
            elif self.successor is not None and item.accept():
                self.successor.adopt(item.entries)
