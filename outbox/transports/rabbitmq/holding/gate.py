"""Lets events pass to the publishing channel once their address is known to take them.

An event that the broker refuses closes its channel, and everything in flight there would have to be
sent again. So whatever may be refused is tried on a channel apart (:mod:`addresses` has the rules),
and what may even end the connection is tried over a connection apart.
"""

from __future__ import annotations

import functools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from outbox.backlog.chunk import Entry
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.system.backoff import backoff
from outbox.transports.rabbitmq import pika_connection
from outbox.transports.rabbitmq.holding.addresses import PARKING, Address, Addresses, Fault, Hold
from outbox.transports.rabbitmq.holding.replies import (
    ACCESS_REFUSED,
    NOT_FOUND,
    Complaint,
    complaint_about,
)
from outbox.transports.rabbitmq.holding.trial import MOST_TRIALS, Answer, Trial

__all__ = ["Apart", "Gate", "Owner"]

logger = logging.getLogger("outbox.publisher")

_FAULTS_OF_MESSAGES = frozenset((311, 406))
_ANSWER_WITHIN = 10.0  # seconds, over a connection apart
_LOGGED_EVERY = 60.0  # seconds
_SURELY_FAULTY = 60.0  # seconds for which the cause of an ended connection is remembered

Declared = Callable[[str | None], None]
"""The callback of a declaration: None, or why the broker refused it."""


class Apart(Protocol):
    """A connection apart, for one trial."""

    def close(self) -> None:
        """Close it, whatever its state."""
        ...


class Owner(Protocol):
    """What the gate asks of its publisher, on the link's thread."""

    def pass_on(self, entries: Sequence[Entry]) -> None:
        """Publish ``entries`` now, ahead of others."""
        ...

    def answered(self, entry: Entry, *, nacked: bool, returned: str) -> None:
        """Treat ``entry`` as answered by the broker."""
        ...

    def unroutable(self, entries: Sequence[Entry], reason: str) -> None:
        """Treat ``entries`` as unroutable."""
        ...

    def reject(self, entries: Sequence[Entry], reason: str) -> None:
        """Give up ``entries``."""
        ...

    def hold(self, entries: Sequence[Entry], reason: str) -> None:
        """Report ``entries`` as kept: they are held."""
        ...

    def written(self) -> None:
        """Watch that the broker answers."""
        ...

    def later(self, delay: float, function: Callable[[], None]) -> None:
        """Call ``function`` in ``delay`` seconds."""
        ...

    def look_for(self, exchange: str, done: Declared) -> None:
        """Declare ``exchange`` passively."""
        ...

    def declare_again(self, done: Declared) -> None:
        """Declare the publisher's own exchange."""
        ...

    def make_parking_queue(self, done: Declared) -> None:
        """Declare the parking queue."""
        ...

    def connect_apart(
        self,
        opened: Callable[[pika_connection.Connection], None],
        ended: Callable[[int, str], None],
    ) -> Apart:
        """Open another connection; ``ended`` gets a code of 0 unless the broker closed it."""
        ...


class Gate:
    """The events of one publisher that aren't known to be acceptable. For the link's thread.

    Attributes:
        addresses: what is known of addresses.
    """

    def __init__(self, owner: Owner, own_exchange: str) -> None:
        """Start without a connection.

        Args:
            owner: the publisher.
            own_exchange: the exchange to declare again when it is missing; empty for none.
        """
        self._owner = owner
        self._own_exchange = own_exchange
        self.addresses = Addresses()
        self._connection: pika_connection.Connection | None = None
        self._queue: deque[tuple[Address, Hold]] = deque()
        self._running: dict[int, Address] = {}  # by slot
        self._apart: Apart | None = None
        self._ended: dict[Address, int] = {}  # how often one has ended a connection apart

    @property
    def busy(self) -> bool:
        """Whether an answer of the broker is awaited over the publisher's connection."""
        return bool(self._running)

    def opened(self, connection: pika_connection.Connection) -> None:
        """Use a new connection."""
        self._connection = connection
        self.addresses.opened("")

    def exchange_exists(self, exchange: str) -> None:
        """Note that ``exchange`` has been declared."""
        self.addresses.learn((exchange, ""))

    def forget_fault(self, exchange: str) -> None:
        """Try ``exchange`` again, which is about to be declared."""
        self.addresses.forget_fault((exchange, ""))

    def closed(self, *, by_broker: bool) -> list[Entry]:
        """Forget the connection; return the entries held here, in order.

        Args:
            by_broker: whether the broker has ended it because of an error.
        """
        if by_broker:
            self.addresses.suspect(self._running.values())
        self._connection = None
        self._queue.clear()
        self._running.clear()
        if self._apart is not None:
            self._apart.close()
            self._apart = None
        return self.addresses.closed()

    def suspect(self, entry: Entry) -> None:
        """Try ``entry`` over a connection apart, since it was alone when the broker ended one."""
        self.addresses.suspect([entry])

    def note_parked(self) -> None:
        """Note that from now on some entries are sent to the parking queue."""
        self.addresses.note_parked()

    def admit(self, entries: Iterable[Entry]) -> list[Entry]:
        """Return those of ``entries`` that can be published at once; hold or judge the others."""
        result = self.addresses.sort(entries)
        by_fault: dict[Fault, list[Entry]] = {}
        for entry, fault in result.faulty:
            by_fault.setdefault(fault, []).append(entry)
        for fault, faulty in by_fault.items():
            self._judge(faulty, fault.reason, rejects=fault.rejects)
        by_reason: dict[str, list[Entry]] = {}
        for entry, reason in result.refused:
            by_reason.setdefault(reason, []).append(entry)
        for reason, refused in by_reason.items():
            self._owner.hold(refused, reason)
        for address in result.fresh:
            self._try(address, self.addresses.holds[address])
        return result.ready

    def missing(self, entries: Sequence[Entry], reason: str) -> None:
        """Hold or judge ``entries``: the broker said that their exchange is missing."""
        by_exchange: dict[str, list[Entry]] = {}
        for entry in entries:
            by_exchange.setdefault(entry.sent_as.exchange, []).append(entry)
        for exchange, those in by_exchange.items():
            address: Address = (exchange, "")
            hold = self.addresses.hold(address, those)
            if not hold.tried:
                hold.tried = True
                self._on_missing(address, hold, reason)

    def refused(self, entries: Sequence[Entry], reason: str, *, by_topic: bool) -> None:
        """Hold ``entries``: the user may not publish to their exchange.

        Args:
            entries: the entries, in order.
            reason: the broker's reply.
            by_topic: whether only their routing key is refused, which they share with the exchange.
        """
        if by_topic:
            self._owner.pass_on(self.addresses.guard(entries[0].sent_as.exchange))
        by_address: dict[Address, list[Entry]] = {}
        for entry in entries:
            by_address.setdefault(self.addresses.address_of(entry), []).append(entry)
        for address, those in by_address.items():
            hold = self.addresses.hold(address, those)
            if not hold.tried:
                self._refuse(address, hold, reason)

    def unparked(self, entries: Sequence[Entry], reason: str) -> None:
        """Hold ``entries`` that were returned from the parking queue, and create it."""
        hold = self.addresses.hold(PARKING, entries)
        if not hold.tried:
            hold.tried = True
            self._make_parking_queue(hold, reason)

    def hurry(self) -> None:
        """Try all refused addresses now, not at the end of their back-off."""
        for address, hold in list(self.addresses.holds.items()):
            self._try(address, hold)

    # --------------------------------------------------------------------------------- trials

    def _try(self, address: Address, hold: Hold) -> None:
        """Try ``address`` as soon as a trial may begin, unless that is under way."""
        if self._connection is not None and not hold.tried and self._holds(address, hold):
            hold.tried = True
            self._queue.append((address, hold))
            self._start_next()

    def _start_next(self) -> None:
        connection = self._connection
        limit = connection.params.channel_max if connection is not None else 0
        most = min(MOST_TRIALS, limit // 2) if limit else MOST_TRIALS
        for _ in range(len(self._queue)):
            address, hold = self._queue[0]
            apart = self.addresses.must_be_apart(address)
            if (self._apart is not None) if apart else (len(self._running) >= most):
                self._queue.rotate(-1)
                continue
            self._queue.popleft()
            entry = hold.first()
            if entry is None:
                self._abandon(address, hold)
            elif apart:
                self._start_apart(address, hold, entry)
            elif connection is not None and connection.is_open:
                slot = next(one for one in range(most) if one not in self._running)
                self._running[slot] = address
                done = functools.partial(self._on_answer, connection, slot, address, hold, entry)
                Trial(connection, slot, entry, done)
                self._owner.written()

    def _on_answer(
        self,
        connection: pika_connection.Connection,
        slot: int,
        address: Address,
        hold: Hold,
        entry: Entry,
        answer: Answer,
    ) -> None:
        if connection is self._connection:
            del self._running[slot]
            self._conclude(address, hold, entry, answer)
            self._start_next()

    def _start_apart(self, address: Address, hold: Hold, entry: Entry) -> None:
        """Try ``entry`` over a connection apart, one at a time."""
        timer_runs = True

        def done(answer: Answer) -> None:
            nonlocal timer_runs
            if self._apart is not apart:
                return
            timer_runs = False
            self._apart = None
            apart.close()
            self._conclude(address, hold, entry, answer)
            self._start_next()

        def opened(connection: pika_connection.Connection) -> None:
            Trial(connection, 0, entry, done)

        def ended(code: int, text: str) -> None:
            if self._apart is not apart:
                return
            self._apart = None
            if code:
                self._on_connection_ended(address, hold, entry, text)
            elif self._holds(address, hold):
                hold.tried = False
                self._refuse(address, hold, text)
            self._start_next()

        def too_late() -> None:
            if timer_runs and self._apart is apart:
                apart.close()
                ended(0, "no answer over a connection apart")

        apart = self._apart = self._owner.connect_apart(opened, ended)
        self._owner.later(_ANSWER_WITHIN, too_late)

    def _on_connection_ended(self, address: Address, hold: Hold, entry: Entry, text: str) -> None:
        """Blame ``entry``, alone on a connection that the broker has ended, at the second time."""
        if not self._holds(address, hold):
            return
        self._ended[address] = self._ended.pop(address, 0) + 1
        hold.tried = False
        if self._ended[address] < 2:
            self._try(address, hold)
            return
        del self._ended[address]
        if isinstance(address, tuple) and address[1] == "":
            entries = self.addresses.fail(address, text, seconds=_SURELY_FAULTY)
            self._judge(entries, text)
        else:
            hold.entries.pop(entry, None)
            self._judge([entry], text, rejects=entry.parked_as is not None)
            if isinstance(address, tuple):
                self._try(address, hold)
            else:
                self._abandon(address, hold)

    # ------------------------------------------------------------------------------- outcomes

    def _conclude(self, address: Address, hold: Hold, entry: Entry, answer: Answer) -> None:
        if not self._holds(address, hold):
            return
        self._ended.pop(address, None)
        if not answer.closed:
            self._on_answered(address, hold, entry, answer)
            return
        text = answer.text
        complaint = complaint_about(entry.sent_as, answer.closed, text)
        exchange = entry.sent_as.exchange
        if answer.closed == NOT_FOUND:
            self._on_missing(address, hold, text)
        elif complaint is Complaint.INTERNAL:
            self._judge(self.addresses.fail(address, text, rejects=True), text, rejects=True)
        elif complaint is Complaint.FORBIDDEN_TOPIC and address == (exchange, ""):
            hold.entries.pop(entry, None)
            self.refused([entry], text, by_topic=True)
        elif answer.closed == ACCESS_REFUSED:
            self._on_forbidden(address, hold, exchange, text)
        elif answer.closed in _FAULTS_OF_MESSAGES:
            self._on_message_fault(address, hold, entry, text)
        else:
            hold.tried = False
            self._refuse(address, hold, text)

    def _on_answered(self, address: Address, hold: Hold, entry: Entry, answer: Answer) -> None:
        if answer.returned and address == PARKING:
            self._make_parking_queue(hold, answer.returned)
            return
        hold.entries.pop(entry, None)
        if isinstance(address, tuple):
            others = self.addresses.learn(address)
        else:
            others = []
            self._abandon(address, hold)
        if hold.failures:
            logger.info("the broker takes events for %s again", _described(address))
        self._owner.answered(entry, nacked=answer.nacked, returned=answer.returned)
        self._owner.pass_on(others)

    def _on_missing(self, address: Address, hold: Hold, reason: str) -> None:
        if address == (self._own_exchange, "") and self._own_exchange and not hold.mended:
            hold.mended = True
            logger.warning("the exchange %r is missing; declaring it again", self._own_exchange)
            done = functools.partial(self._on_declared, address, hold, reason)
            self._owner.declare_again(done)
            return
        self._judge(self.addresses.fail(address, reason), reason)

    def _on_declared(self, address: Address, hold: Hold, reason: str, refused: str | None) -> None:
        if not self._holds(address, hold):
            return
        hold.tried = False
        if refused is None:
            self._try(address, hold)
        else:
            logger.error("cannot declare the exchange %r: %s", self._own_exchange, refused)
            self._judge(self.addresses.fail(address, reason), reason)

    def _on_forbidden(self, address: Address, hold: Hold, exchange: str, reason: str) -> None:
        """Hold, unless the exchange doesn't exist: permissions are checked before that."""

        def done(refused: str | None) -> None:
            if self._holds(address, hold):
                if refused is not None and refused.startswith("NOT_FOUND"):
                    self._on_missing(address, hold, f"{NOT_FOUND} {refused}")
                else:
                    hold.tried = False
                    self._refuse(address, hold, reason)

        if address == (exchange, "") and exchange and not self.addresses.must_be_apart(address):
            self._owner.look_for(exchange, done)
        else:
            done(None)

    def _on_message_fault(self, address: Address, hold: Hold, entry: Entry, reason: str) -> None:
        """Reject ``entry`` at the second time; then try the next one."""
        hold.tried = False
        if hold.accused is entry:
            hold.accused = None
            hold.entries.pop(entry, None)
            self._owner.reject([entry], reason)
        else:
            hold.accused = entry
        self._try(address, hold)

    def _make_parking_queue(self, hold: Hold, reason: str) -> None:
        def done(refused: str | None) -> None:
            if self._holds(PARKING, hold):
                hold.tried = False
                if refused is None and not hold.mended:
                    hold.mended = True
                    self._try(PARKING, hold)
                else:
                    hold.mended = False
                    why = refused or reason
                    self._refuse(PARKING, hold, f"no queue {PARKING_QUEUE!r}: {why}")

        self._owner.make_parking_queue(done)

    def _refuse(self, address: Address, hold: Hold, reason: str) -> None:
        """Keep what is held for ``address``, and try again after a back-off."""
        hold.reason = reason
        hold.failures += 1
        delay = backoff(hold.failures - 1)
        self._owner.hold(list(hold.entries), reason)
        now = time.monotonic()
        if now - hold.logged_at >= _LOGGED_EVERY:
            hold.logged_at = now
            logger.error(
                "%d event(s) for %s wait: %s; %s",
                len(hold.entries),
                _described(address),
                reason,
                _remedy(address, reason),
            )
        self._owner.later(delay, lambda: self._try(address, hold))

    def _judge(self, entries: Sequence[Entry], reason: str, *, rejects: bool = False) -> None:
        if rejects:
            self._owner.reject(entries, reason)
        elif entries:
            self._owner.unroutable(entries, reason)

    def _holds(self, address: Address, hold: Hold) -> bool:
        return self.addresses.holds.get(address) is hold

    def _abandon(self, address: Address, hold: Hold) -> None:
        if self._holds(address, hold):
            self._ended.pop(address, None)
            self.addresses.abandon(address)


def _described(address: Address) -> str:
    if isinstance(address, Entry):
        return f"the event {address.event.id!r}"
    exchange, target = address
    if address == PARKING:
        return f"the queue {target!r}, which cannot be routed,"
    if target:
        return f"{target!r} on exchange {exchange!r}"
    return f"the exchange {exchange!r}" if exchange else "the default exchange (amq.default)"


def _remedy(address: Address, reason: str) -> str:
    forbidden = reason.startswith(str(ACCESS_REFUSED))
    if isinstance(address, Entry) or (not forbidden and address != PARKING):
        return "they are tried again with back-off"
    exchange, target = address
    if address != PARKING:
        command = f"topic permission for {target!r}" if target else "write permission"
        return f"grant the user {command} on {exchange or 'amq.default'!r}"
    if forbidden:
        return "grant the user write permission on 'amq.default', or set unroutable to fail"
    return f"create the durable queue {PARKING_QUEUE!r}, or set unroutable to fail"
