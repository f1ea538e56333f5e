"""Sends delayed events down the ladder, and sees to it that the ladder is there."""

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
    """The delayed entries of one publisher, on their way to the channel. For the link's thread.

    Entries whose way is not known to be there are *grounded* until it is made, on a channel of its
    own; others overtake them meanwhile.
    """

    def __init__(
        self,
        encoder: Encoder,
        mode: Declare,
        made: Callable[[Entries], None],
        no_way: Callable[[Entries, str], None],
        refused: Callable[[Entries, BrokerError], None],
    ) -> None:
        """Know of no connection yet.

        Args:
            encoder: of the publisher.
            mode: whether anything is made.
            made: called with entries whose way is there now, in order.
            no_way: called with entries to a queue or exchange that is not there, and the reason.
            refused: called with entries whose way could not be made for now.
        """
        self._encoder = encoder
        self._creates = mode == "create"
        self._made = made
        self._no_way = no_way
        self._refused = refused
        self._ladder = Ladder()
        self._connection: pika_connection.Connection | None = None
        self._grounded: dict[Entry, list[Part]] = {}
        self._busy = False

    def opened(self, connection: pika_connection.Connection) -> None:
        """Use a new connection, to a broker of which nothing is known."""
        self._connection = connection

    def closed(self) -> list[Entry]:
        """Forget the connection; return what was grounded, in order."""
        grounded = list(self._grounded)
        self._connection = None
        self._grounded.clear()
        self._ladder.forget()
        self._busy = False
        return grounded

    def sendable(self, entries: list[Entry]) -> list[Entry]:
        """Return those of ``entries`` that can be sent now, each written for the time it has left.

        The others are given to ``made`` once their way is there.
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

    def may_be_mended(self, entry: Entry) -> bool:
        """Return whether ``entry`` came back because a part of the ladder is missing.

        Then the ladder is made anew before anything is sent down it again.
        """
        if entry.sent_as is not entry.delayed_as or not self._creates:
            return False
        self._ladder.forget()
        return True

    def _make_next(self) -> None:
        """Make what grounded entries lack: all parts of the ladder, then each destination."""
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
        elif old := self._ladder.to_look_after(time.monotonic()):
            self._make(old, self._on_refused)

    def _make(self, parts: list[Part], refused: Callable[[list[Part], str], None]) -> None:
        connection = self._connection
        if connection is None or not connection.is_open:
            return  # the connection's end brings back what is grounded
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
        logger.error("the ladder for delayed events cannot be made: %s", refused)
        self._ladder.forget()
        entries = list(self._grounded)
        self._grounded.clear()
        if entries:
            self._refused(entries, Nacked(f"the ladder for delayed events: {refused}"))

    def _on_destination_refused(self, parts: list[Part], refused: str) -> None:
        if not refused.startswith("NOT_FOUND") or f"'{PREFIX}" in refused:
            self._on_refused(parts, refused)
            return
        theirs = [entry for entry, way in self._grounded.items() if parts[0] in way]
        for entry in theirs:
            del self._grounded[entry]
        self._no_way(theirs, f"404 {refused}")
