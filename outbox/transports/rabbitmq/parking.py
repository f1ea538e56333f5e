"""Decides what becomes of unroutable events, and sees that there is a queue to park them in.

The rules:

1.  An event's own policy, or the publisher's, says whether it is parked, rejected or ignored.
2.  To park an event is to publish it to the parking queue instead. It counts as parked when the
    broker has confirmed it there, and until then as one that is on its way.
3.  An event that comes back even from there is *homeless*: the parking queue does not exist. The
    queue is made, if it may be, on a channel that nothing else uses; then the event is sent again.
    Otherwise it is tried again after a back-off, since someone may make the queue.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence

from outbox.backlog.chunk import Entry, Fate
from outbox.messages.dead_letters import PARKING_QUEUE, parked
from outbox.settings import Settings
from outbox.transports.rabbitmq import pika_connection, topology
from outbox.transports.rabbitmq.amqp.encoder import Encoder

__all__ = ["Parking"]

logger = logging.getLogger("outbox.publisher")

Entries = Sequence[Entry]


class Parking:
    """The unroutable entries of one publisher. For the link's thread."""

    def __init__(
        self,
        encoder: Encoder,
        settings: Settings,
        made: Callable[[Entries], None],
        refused: Callable[[Entries], None],
    ) -> None:
        """Know of no connection yet.

        Args:
            encoder: of the publisher.
            settings: for the policy, and for whether anything is made.
            made: called with homeless entries when the parking queue is there, in order.
            refused: called with homeless entries for which it could not be made for now.
        """
        self._encoder = encoder
        self._settings = settings
        self._made = made
        self._refused = refused
        self._connection: pika_connection.Connection | None = None
        self._homeless: list[Entry] = []
        self._making_queue = False

    def opened(self, connection: pika_connection.Connection) -> None:
        """Use a new connection."""
        self._connection = connection

    def closed(self) -> list[Entry]:
        """Forget the connection; return what was homeless, in order."""
        self._connection = None
        self._making_queue = False
        homeless, self._homeless = self._homeless, []
        return homeless

    def sort(
        self, unroutable: Iterable[tuple[Entry, str]]
    ) -> tuple[dict[tuple[Fate, str], list[Entry]], list[Entry]]:
        """Decide about entries that no queue would have, each given with the broker's reason.

        Those that come back from the parking queue are taken over, and given to ``made`` or to
        ``refused`` later.

        Returns:
            The entries that have their fate now, by it and its reason; and the entries to be sent,
            which are written for the parking queue now.
        """
        fates: dict[tuple[Fate, str], list[Entry]] = {}
        to_park: list[Entry] = []
        for entry, reason in unroutable:
            policy = entry.event.unroutable or self._settings.unroutable
            if entry.parked_as is not None:
                self._homeless.append(entry)
            elif policy == "park":
                entry.parked_as = parked(entry.event, reason)
                entry.frames = self._encoder.encode(entry.parked_as)
                to_park.append(entry)
            else:
                fate = Fate.IGNORED if policy == "ignore" else Fate.REJECTED
                fates.setdefault((fate, f"unroutable: {reason}"), []).append(entry)
        if self._homeless:
            self._make_queue()
        return fates, to_park

    def _make_queue(self) -> None:
        if not self._making_queue and self._connection is not None:
            self._making_queue = True
            steps = topology.parking_queue(PARKING_QUEUE, self._settings.declare)
            topology.declare(self._connection, steps, self._on_declared)

    def _on_declared(self, refused: str | None) -> None:
        self._making_queue = False
        entries, self._homeless = self._homeless, []
        if refused is None and self._settings.declare == "create":
            self._made(entries)
        else:
            logger.error("there is no queue %r to park events in: %s", PARKING_QUEUE, refused)
            self._refused(entries)
