"""Decides the fates of unroutable events, and creates the parking queue when it is missing.

The rules:

1.  The event's policy, by default the publisher's, says whether it is parked, rejected or ignored.
2.  An event is parked by publishing it to the parking queue instead. Its fate is *parked* once the
    broker has confirmed that; until then it is in flight.
3.  If an event is returned from there too, the parking queue doesn't exist. If allowed, the queue
    is created on a separate channel, and the event is sent again. Otherwise the event is held, and
    tried again after a back-off, because someone may create the queue.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from outbox.backlog.chunk import Entry, Fate
from outbox.messages.dead_letters import PARKING_QUEUE, parked
from outbox.settings import Settings
from outbox.transports.rabbitmq import pika_connection, topology
from outbox.transports.rabbitmq.amqp.encoder import Encoder

__all__ = ["Parking"]

Entries = Sequence[Entry]


class Parking:
    """The unroutable entries of one publisher. For the link's thread."""

    def __init__(self, encoder: Encoder, settings: Settings) -> None:
        """Take the publisher's encoder, the policy, and whether queues may be created."""
        self._encoder = encoder
        self._settings = settings

    def sort(
        self, unroutable: Iterable[tuple[Entry, str]]
    ) -> tuple[dict[tuple[Fate, str], list[Entry]], list[Entry], dict[str, list[Entry]]]:
        """Decide about unroutable entries, each given with the broker's reason.

        Returns:
            The entries with a fate, by fate and reason; the entries to send, now encoded for the
            parking queue; and those that were returned from there, by reason.
        """
        fates: dict[tuple[Fate, str], list[Entry]] = {}
        to_park: list[Entry] = []
        returned: dict[str, list[Entry]] = {}
        for entry, reason in unroutable:
            policy = entry.event.unroutable or self._settings.unroutable
            if entry.parked_as is not None:
                returned.setdefault(reason, []).append(entry)
            elif policy == "park":
                entry.parked_as = parked(entry.event, reason)
                entry.frames = self._encoder.encode(entry.parked_as)
                to_park.append(entry)
            else:
                fate = Fate.IGNORED if policy == "ignore" else Fate.REJECTED
                fates.setdefault((fate, f"unroutable: {reason}"), []).append(entry)
        return fates, to_park, returned

    def make_queue(
        self, connection: pika_connection.Connection, done: Callable[[str | None], None]
    ) -> None:
        """Create the parking queue if that is allowed; ``done`` gets None or the reason why not."""
        mode = self._settings.declare
        if mode == "create":
            topology.declare(connection, topology.parking_queue(PARKING_QUEUE, mode), done)
        else:
            done(f"not created, as declare={mode!r}")
