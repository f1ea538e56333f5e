"""Knows which addresses take events, and holds back the events for others. No I/O.

The rules:

1.  On a new connection nothing is known but what was declared, and the default exchange, which
    always exists. The first event for any other exchange is tried on a channel apart, while later
    ones for it are held, in order.
2.  An exchange that takes an event is known until the connection ends or the broker complains. So
    is the parking queue, apart from the default exchange: a user may be forbidden to write to it.
3.  A faulty address, such as a missing exchange, is remembered for some seconds. Until then its
    events are judged without the broker.
4.  A refused address, such as one that the user may not write to, holds its events until a trial
    succeeds; trials are repeated with back-off.
5.  Once a routing key was refused, its exchange is *guarded*: each target of it is an address.
6.  What was being tried when the broker ended the connection is a *suspect*: it is tried over
    another connection, as an exchange whose name some brokers can't quote is from the beginning.
"""

from __future__ import annotations

import operator
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from outbox.backlog.chunk import Entry
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.transports.rabbitmq.holding.replies import is_quoted_whole

__all__ = ["PARKING", "Address", "Addresses", "Fault", "Hold", "Sorted"]

Address = tuple[str, str] | Entry
"""An exchange and, if it is guarded, a target, else ""; or a suspected entry alone."""

PARKING: Address = ("", PARKING_QUEUE)

_REMEMBERED = 5.0  # seconds
_MOST = 10_000  # names may come from users

exchange_of = operator.attrgetter("event.exchange")


@dataclass(frozen=True, slots=True)
class Fault:
    """What is wrong with an address.

    Attributes:
        reason: the broker's reply.
        rejects: whether its events are rejected; otherwise they are unroutable.
        until: the time when it is forgotten, by the clock.
    """

    reason: str
    rejects: bool
    until: float


@dataclass(slots=True, eq=False)
class Hold:
    """The events that wait for one address.

    Attributes:
        entries: the events, in order.
        failures: how often it has been refused.
        reason: the last refusal; empty before the first.
        tried: whether a trial is under way, or waits for its turn.
        mended: whether what was missing has been declared since the last success.
        accused: the last event that was tried and closed the channel by its own fault.
        logged_at: the time of the last log line about it.
    """

    entries: dict[Entry, None] = field(default_factory=dict)
    failures: int = 0
    reason: str = ""
    tried: bool = False
    mended: bool = False
    accused: Entry | None = None
    logged_at: float = float("-inf")

    def first(self) -> Entry | None:
        """Return the first event that has no fate; forget those before it."""
        for entry in list(self.entries):
            if entry.fate is None:
                return entry
            del self.entries[entry]
        return None


@dataclass(slots=True)
class Sorted:
    """Events, sorted by what is known of their addresses.

    Attributes:
        ready: those to publish, in order.
        faulty: those whose address is faulty.
        refused: those held by a refused address.
        fresh: addresses to try, since the first event for them has come.
    """

    ready: list[Entry] = field(default_factory=list)
    faulty: list[tuple[Entry, Fault]] = field(default_factory=list)
    refused: list[tuple[Entry, str]] = field(default_factory=list)
    fresh: list[Address] = field(default_factory=list)


class Addresses:
    """What one publisher knows of the addresses on its broker. For one thread.

    Attributes:
        holds: what is held, by address.
        plain: the exchanges whose events can be published without asking further; they are looked
            up for every event.
    """

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._known: set[str] = set()
        self._known_targets: set[Address] = set()  # of guarded exchanges, and parking
        self._guarded: set[str] = set()
        self._faulty: dict[Address, Fault] = {}
        self._suspects: set[Address] = set()
        self._some_parked = False
        self.holds: dict[Address, Hold] = {}
        self.plain: set[str] = set()

    def opened(self, exchange: str) -> None:
        """Begin with a new connection, on which ``exchange`` has been declared."""
        self._known = {"", exchange}
        self._refresh()

    def closed(self) -> list[Entry]:
        """Forget all but the suspects; return what was held, in order."""
        held = [entry for hold in self.holds.values() for entry in hold.entries]
        for collection in (
            self._known,
            self._known_targets,
            self._guarded,
            self._faulty,
            self.holds,
        ):
            collection.clear()
        self._refresh()
        return held

    def all_known(self, entries: Sequence[Entry]) -> bool:
        """Return whether all ``entries`` can be published at once; False if that is unclear."""
        return self.plain.issuperset(map(exchange_of, entries))

    def note_parked(self) -> None:
        """Note that from now on some entries are sent to the parking queue."""
        self._some_parked = True
        self._refresh()

    def address_of(self, entry: Entry) -> Address:
        """Return the address that decides about ``entry``."""
        if entry in self._suspects:
            return entry
        if entry.parked_as is not None:
            return PARKING
        event = entry.sent_as
        return (event.exchange, event.target if event.exchange in self._guarded else "")

    def is_known(self, address: Address) -> bool:
        """Return whether ``address`` takes events."""
        return address in self._known_targets or (
            isinstance(address, tuple) and not address[1] and address[0] in self._known
        )

    def must_be_apart(self, address: Address) -> bool:
        """Return whether a trial may end the connection."""
        return address in self._suspects or (
            isinstance(address, tuple) and not is_quoted_whole(address[0])
        )

    def sort(self, entries: Iterable[Entry]) -> Sorted:
        """Hold back those of ``entries`` that can't be published at once."""
        result = Sorted()
        now = self._clock()
        for entry in entries:
            address = self.address_of(entry)
            hold = self.holds.get(address)
            if hold is not None:
                hold.entries[entry] = None
                if hold.failures:
                    result.refused.append((entry, hold.reason))
            elif self.is_known(address):
                result.ready.append(entry)
            elif (fault := self.fault_of(address, now)) is not None:
                result.faulty.append((entry, fault))
            else:
                self.hold(address).entries[entry] = None
                result.fresh.append(address)
        return result

    def fault_of(self, address: Address, now: float | None = None) -> Fault | None:
        """Return what is remembered to be wrong with ``address``."""
        fault = self._faulty.get(address)
        if fault is not None and fault.until <= (self._clock() if now is None else now):
            del self._faulty[address]
            return None
        return fault

    def forget_fault(self, address: Address) -> None:
        """Forget what is wrong with ``address``."""
        self._faulty.pop(address, None)

    def hold(self, address: Address, entries: Iterable[Entry] = ()) -> Hold:
        """Forget that ``address`` takes events, and hold ``entries`` for it, ahead of others."""
        self.forget(address)
        hold = self.holds.setdefault(address, Hold())
        hold.entries = {**dict.fromkeys(entries), **hold.entries}
        return hold

    def forget(self, address: Address) -> None:
        """Forget that ``address`` takes events."""
        self._known_targets.discard(address)
        if isinstance(address, tuple) and not address[1]:
            self._known.discard(address[0])
        self._refresh()

    def learn(self, address: Address) -> list[Entry]:
        """Note that ``address`` takes events; return those that were held for it, in order."""
        self._faulty.pop(address, None)
        self._suspects.discard(address)
        if isinstance(address, tuple):
            if address[1]:
                if len(self._known_targets) >= _MOST:
                    self._known_targets.clear()
                self._known_targets.add(address)
            else:
                if len(self._known) >= _MOST:
                    self._known.clear()
                self._known.add(address[0])
        self._refresh()
        return self._drop(address)

    def fail(
        self, address: Address, reason: str, *, rejects: bool = False, seconds: float = _REMEMBERED
    ) -> list[Entry]:
        """Note that ``address`` is faulty; return the events that were held for it, in order."""
        self.forget(address)
        self._suspects.discard(address)
        self._refresh()
        if len(self._faulty) >= _MOST:
            self._faulty.clear()
        self._faulty[address] = Fault(reason, rejects, self._clock() + seconds)
        return self._drop(address)

    def guard(self, exchange: str) -> list[Entry]:
        """Look at each target of ``exchange`` separately; return what was held for all of them."""
        self._guarded.add(exchange)
        self.forget((exchange, ""))
        return self._drop((exchange, ""))

    def suspect(self, addresses: Iterable[Address]) -> None:
        """Try ``addresses`` over another connection from now on."""
        if len(self._suspects) >= _MOST:
            self._suspects.clear()
        self._suspects.update(addresses)
        self._refresh()

    def abandon(self, address: Address) -> None:
        """Forget what is held for ``address``, and any suspicion."""
        self._suspects.discard(address)
        self._refresh()
        self.holds.pop(address, None)

    def _refresh(self) -> None:
        parking_is_clear = not self._some_parked or PARKING in self._known_targets
        nothing_else = not self._suspects and not self._guarded and parking_is_clear
        self.plain = self._known if nothing_else else set()

    def _drop(self, address: Address) -> list[Entry]:
        hold = self.holds.pop(address, None)
        return [] if hold is None else list(hold.entries)
