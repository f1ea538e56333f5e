"""Decides the fates of unroutable events, and creates the parking queue when it is missing.

The rules:

1.  The event's policy, by default the publisher's, says whether it is parked, rejected or ignored.
2.  An event is parked by publishing it to the parking queue instead. Its fate is *parked* once the
    broker has confirmed that; until then it is in flight.
3.  If an event is returned from there too, the parking queue doesn't exist. If allowed, the queue
    is created on a separate channel, and the event is sent again. Otherwise the event is retried
    after a back-off, because someone may create the queue.
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
        """Start without a connection.

        Args:
            encoder: the publisher's encoder.
            settings: the policy, and whether queues may be created.
            made: the callback for waiting entries, in order, once the parking queue exists.
            refused: the callback for waiting entries when it could not be created.
        """
        self._encoder = encoder
        self._settings = settings
        self._made = made
        self._refused = refused
        self._connection: pika_connection.Connection | None = None
        self._waiting: list[Entry] = []
        self._making_queue = False

    def opened(self, connection: pika_connection.Connection) -> None:
        """Use a new connection."""
        self._connection = connection

    def closed(self) -> list[Entry]:
        """Forget the connection; return the entries waiting for the parking queue, in order."""
        self._connection = None
        self._making_queue = False
        waiting, self._waiting = self._waiting, []
        return waiting

    def sort(
        self, unroutable: Iterable[tuple[Entry, str]]
    ) -> tuple[dict[tuple[Fate, str], list[Entry]], list[Entry]]:
        """Decide about unroutable entries, each given with the broker's reason.

        Entries that were returned from the parking queue wait here, and are passed to ``made`` or
        ``refused`` later.

        Returns:
            The entries with a fate, by fate and reason; and the entries to send, now encoded for
            the parking queue.
        """
        fates: dict[tuple[Fate, str], list[Entry]] = {}
        to_park: list[Entry] = []
        for entry, reason in unroutable:
            policy = entry.event.unroutable or self._settings.unroutable
            if entry.parked_as is not None:
                self._waiting.append(entry)
            elif policy == "park":
                entry.parked_as = parked(entry.event, reason)
                entry.frames = self._encoder.encode(entry.parked_as)
                to_park.append(entry)
            else:
                fate = Fate.IGNORED if policy == "ignore" else Fate.REJECTED
                fates.setdefault((fate, f"unroutable: {reason}"), []).append(entry)
        if self._waiting:
            self._make_queue()
        return fates, to_park

    def _make_queue(self) -> None:
        if not self._making_queue and self._connection is not None:
            self._making_queue = True
            steps = topology.parking_queue(PARKING_QUEUE, self._settings.declare)
            topology.declare(self._connection, steps, self._on_declared)

    def _on_declared(self, refused: str | None) -> None:
        self._making_queue = False
        entries, self._waiting = self._waiting, []
        if refused is None and self._settings.declare == "create":
            self._made(entries)
        else:
            why = refused or f"not created, as declare={self._settings.declare!r}"
            logger.error(
                "cannot park %d event(s): no queue %r: %s", len(entries), PARKING_QUEUE, why
            )
            self._refused(entries)
