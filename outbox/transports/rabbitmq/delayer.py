"""Sends delayed events down the delay ladder, and creates the missing parts of it."""

from __future__ import annotations

import datetime
import functools
import logging
import time
from collections.abc import Callable, Sequence

from outbox.backlog.chunk import Entry
from outbox.errors import BrokerError, Nacked
from outbox.settings import Declare
from outbox.transports.rabbitmq import pika_connection, topology
from outbox.transports.rabbitmq.amqp.encoder import Encoder
from outbox.transports.rabbitmq.delay_ladder import (
    PREFIX,
    Ladder,
    Part,
    delayed,
    seconds_left,
    steps_of,
    way_of,
)

__all__ = ["Delayer"]

logger = logging.getLogger("outbox.publisher")

Entries = Sequence[Entry]


class Delayer:
    """The delayed entries of one publisher, until they can be sent. For the link's thread.

    If parts that an entry needs aren't known to exist, it waits in ``_grounded`` until they have
    been declared on a separate channel; other entries overtake it meanwhile. Declarations run one
    after the other (``_busy``), so that each part is declared once for all entries that need it.
    """

    def __init__(
        self,
        encoder: Encoder,
        mode: Declare,
        made: Callable[[Entries], None],
        no_destination: Callable[[Entries, str], None],
        refused: Callable[[Entries, BrokerError], None],
    ) -> None:
        """Start without a connection.

        Args:
            encoder: the publisher's encoder.
            mode: whether parts may be created.
            made: the callback for entries whose parts exist now, in order.
            no_destination: the callback for entries whose queue or exchange doesn't exist, with
                the reason.
            refused: the callback for entries whose parts could not be created.
        """
        self._encoder = encoder
        self._creates = mode == "create"
        self._made = made
        self._no_destination = no_destination
        self._refused = refused
        self._ladder = Ladder()
        self._connection: pika_connection.Connection | None = None
        self._grounded: dict[Entry, list[Part]] = {}
        self._busy = False

    def opened(self, connection: pika_connection.Connection) -> None:
        """Use a new connection; nothing is known about the parts on its broker."""
        self._connection = connection

    def closed(self) -> list[Entry]:
        """Forget the connection; return the entries waiting for the ladder, in order."""
        grounded = list(self._grounded)
        self._connection = None
        self._grounded.clear()
        self._ladder.forget()
        self._busy = False
        return grounded

    def sendable(self, entries: list[Entry]) -> list[Entry]:
        """Return those of ``entries`` that can be sent now, encoded for the time they have left.

        The others are passed to ``made`` once their parts exist.
        """
        later = [one for one in entries if one.event.deliver_at is not None and not one.parked_as]
        if not later:
            return entries
        now = datetime.datetime.now(datetime.UTC)
        grounded: set[Entry] = set()
        for entry in later:
            event = entry.event
            seconds = seconds_left(event.deliver_at or now, now)
            entry.delayed_as = delayed(event, seconds) if seconds else None
            entry.frames = self._encoder.encode(entry.sent_as)
            if not seconds or not self._creates:
                continue
            way = way_of(event.exchange, event.target, seconds)
            if self._ladder.lacks(way):
                self._grounded[entry] = way
                grounded.add(entry)
        if not self._busy:
            self._make_next()
        return [entry for entry in entries if entry not in grounded]

    def needs_ladder(self, entry: Entry) -> bool:
        """Return whether ``entry`` was returned because a part of the ladder is missing.

        If so, all parts count as missing, and are declared before the next delayed entry is sent.
        """
        if entry.sent_as is not entry.delayed_as or not self._creates:
            return False
        self._ladder.forget()
        return True

    def _make_next(self) -> None:
        """Declare what waiting entries need: all parts of the ladder, then each destination.

        Destinations come last, one by one: a missing one fails the declaration, and must not hold
        up the entries for other destinations.
        """
        lacking = [part for way in self._grounded.values() for part in self._ladder.lacks(way)]
        rungs = [part for part in dict.fromkeys(lacking) if not part.is_destination]
        if rungs:
            self._make(rungs, self._on_refused)
        elif lacking:
            self._make(lacking[:1], self._on_destination_refused)
        elif self._grounded:
            entries = list(self._grounded)
            self._grounded.clear()
            self._made(entries)
        elif old := self._ladder.parts_to_recheck(time.monotonic()):
            self._make(old, self._on_refused)

    def _make(self, parts: list[Part], refused: Callable[[list[Part], str], None]) -> None:
        connection = self._connection
        if connection is None or not connection.is_open:
            return  # closed() returns the waiting entries when the connection ends
        self._busy = True
        steps = [step for part in parts for step in steps_of(part)]
        done = functools.partial(self._on_made, connection, parts, refused)
        topology.declare(connection, steps, done)

    def _on_made(
        self,
        connection: pika_connection.Connection,
        parts: list[Part],
        on_refused: Callable[[list[Part], str], None],
        refused: str | None,
    ) -> None:
        if connection is not self._connection:
            return
        self._busy = False
        if refused is None:
            self._ladder.made(parts, time.monotonic())
        else:
            on_refused(parts, refused)
        if not self._busy:
            self._make_next()

    def _on_refused(self, _parts: list[Part], refused: str) -> None:
        logger.error("cannot declare the delay ladder: %s", refused)
        self._ladder.forget()
        entries = list(self._grounded)
        self._grounded.clear()
        if entries:
            self._refused(entries, Nacked(f"cannot declare the delay ladder: {refused}"))

    def _on_destination_refused(self, parts: list[Part], refused: str) -> None:
        if not refused.startswith("NOT_FOUND") or f"'{PREFIX}" in refused:
            self._on_refused(parts, refused)
            return
        entries = [entry for entry, way in self._grounded.items() if parts[0] in way]
        for entry in entries:
            del self._grounded[entry]
        self._no_destination(entries, f"404 {refused}")
