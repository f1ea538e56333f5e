"""What becomes of the events of one transaction: rows for queues, and their fates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from outbox.backlog.chunk import Entry, Fate
from outbox.event import Event, Unroutable
from outbox.messages.dead_letters import PARKING_QUEUE, parked
from outbox.storage.rows import values_of
from outbox.transports.sqlite.routing import Routes

__all__ = ["NO_ROUTE", "Plan", "rows_of"]

NO_ROUTE = "312 NO_ROUTE"
"""What RabbitMQ says of an event that no queue is bound for (AMQP 0-9-1, basic.return)."""


class Plan:
    """Rows to write, and what is to be told when they are. No I/O.

    Attributes:
        rows: in the order of the events, one for each queue that gets one.
        fates: entries by their fate and its reason, in order.
        homeless: entries to be parked, for which there is no queue to park them in.
    """

    def __init__(self, entries: Sequence[Entry], routes: Routes, policy: Unroutable) -> None:
        """Plan for ``entries``.

        Args:
            entries: in order.
            routes: to their queues.
            policy: for what is unroutable and has no policy of its own.
        """
        self.rows: list[dict[str, Any]] = []
        self.fates: dict[tuple[Fate, str], list[Entry]] = {}
        self.homeless: list[Entry] = []
        published: list[Entry] = []
        for entry in entries:
            event = entry.event
            queues = routes.queues(event.exchange, event.target)
            if queues:
                self.rows += rows_of(event, queues)
                published.append(entry)
            else:
                self._unroutable(entry, event.unroutable or policy)
        if published:
            self.fates[Fate.PUBLISHED, ""] = published

    def _unroutable(self, entry: Entry, policy: Unroutable) -> None:
        fate, reason = Fate.IGNORED, f"unroutable: {NO_ROUTE}"
        if policy == "park":
            # A person will look at it: it is there at once, whenever it was to be delivered.
            entry.parked_as = dataclasses.replace(parked(entry.event, NO_ROUTE), deliver_at=None)
            self.rows += rows_of(entry.parked_as, (PARKING_QUEUE,))
            fate, reason = Fate.PARKED, ""
        elif policy == "fail":
            fate = Fate.REJECTED
        self.fates.setdefault((fate, reason), []).append(entry)

    @property
    def parks(self) -> bool:
        """Whether something is to be parked."""
        return (Fate.PARKED, "") in self.fates

    def park_nothing(self) -> None:
        """Park nothing: there is no queue to park in."""
        self.homeless = self.fates.pop((Fate.PARKED, ""), [])
        self.rows = [row for row in self.rows if row["queue"] != PARKING_QUEUE]


def rows_of(event: Event, queues: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row of ``event`` for each of ``queues``."""
    values = values_of(event, queue=queues[0], rank=event.priority or 0)
    return [values, *({**values, "queue": queue} for queue in queues[1:])]
