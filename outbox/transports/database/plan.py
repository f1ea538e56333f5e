"""Plans one transaction: the rows to write for its events, and the fates of their entries."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from outbox.backlog.chunk import Fate
from outbox.event import Event, Unroutable
from outbox.messages.dead_letters import PARKING_QUEUE, parked
from outbox.messages.rows import values_of
from outbox.transports.database.routing import Routes

__all__ = ["NO_ROUTE", "Plan", "Planned", "rows_of"]

NO_ROUTE = "312 NO_ROUTE"
"""RabbitMQ's reason for an unroutable event (AMQP 0-9-1, basic.return)."""


class Planned(Protocol):
    """What an event belongs to, such as an entry of the backlog.

    Attributes:
        parked_as: the event that is written because this one is unroutable, or None.
    """

    parked_as: Event | None

    @property
    def event(self) -> Event:
        """The event."""
        ...


_P = TypeVar("_P", bound=Planned)


class Plan(Generic[_P]):
    """The rows to write, and the fates to give once they are committed. No I/O.

    Attributes:
        rows: the rows in the order of the events, one for each of an event's queues.
        fates: the entries by fate and reason, in order.
        without_queue: entries to park, while the parking queue doesn't exist.
        new_queues: the queues to create, of tasks that are called before a worker has run.
    """

    def __init__(
        self,
        entries: Sequence[_P],
        routes: Routes,
        policy: Unroutable,
        makes: Callable[[Event], bool] = lambda _: False,
    ) -> None:
        """Plan for ``entries``.

        Args:
            entries: the entries to write, in order.
            routes: the routes to queues.
            policy: the policy for unroutable events that don't set one.
            makes: returns whether the queue of an event to the exchange ``""`` is created for it.
        """
        self.rows: list[dict[str, Any]] = []
        self.fates: dict[tuple[Fate, str], list[_P]] = {}
        self.without_queue: list[_P] = []
        self.new_queues: dict[str, None] = {}
        published: list[_P] = []
        for entry in entries:
            event = entry.event
            queues = routes.queues(event.exchange, event.target)
            if not queues and makes(event):
                queues = (event.target,)
                self.new_queues[event.target] = None
            if queues:
                self.rows += rows_of(event, queues)
                published.append(entry)
            else:
                self._unroutable(entry, event.unroutable or policy)
        if published:
            self.fates[Fate.PUBLISHED, ""] = published

    def _unroutable(self, entry: _P, policy: Unroutable) -> None:
        fate, reason = Fate.IGNORED, f"unroutable: {NO_ROUTE}"
        if policy == "park":
            # Parked events are for people to look at, so even a delayed one appears at once.
            entry.parked_as = dataclasses.replace(parked(entry.event, NO_ROUTE), deliver_at=None)
            self.rows += rows_of(entry.parked_as, (PARKING_QUEUE,))
            fate, reason = Fate.PARKED, ""
        elif policy == "fail":
            fate = Fate.REJECTED
        self.fates.setdefault((fate, reason), []).append(entry)

    @property
    def parks(self) -> bool:
        """Whether any event is to be parked."""
        return (Fate.PARKED, "") in self.fates

    @property
    def is_complete(self) -> bool:
        """Whether every event has a queue."""
        return not self.without_queue and self.fates.keys() <= {(Fate.PUBLISHED, "")}

    def park_nothing(self) -> None:
        """Move the entries to park to ``without_queue``: the parking queue doesn't exist."""
        self.without_queue = self.fates.pop((Fate.PARKED, ""), [])
        self.rows = [row for row in self.rows if row["queue"] != PARKING_QUEUE]


def rows_of(event: Event, queues: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row of ``event`` for each of ``queues``."""
    values = values_of(event, queue=queues[0], rank=event.priority or 0)
    return [values, *({**values, "queue": queue} for queue in queues[1:])]
