"""Decides in a transaction which queues events go to, by the bindings in the database."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from sqlalchemy import Connection

from outbox.backlog.chunk import Fate
from outbox.event import Event
from outbox.messages import task_queues
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.messages.delivery import dead_letter_queue
from outbox.messages.rows import UNROUTED
from outbox.settings import Settings
from outbox.storage.store import Claimed, Store
from outbox.transports.database import routing
from outbox.transports.database.plan import Plan, Planned
from outbox.transports.database.routing import Routes

__all__ = ["Router", "StoredEvent"]

_P = TypeVar("_P", bound=Planned)

_AT_ONCE = 500
"""The most stored events that are routed in one transaction."""

_NO_PARKING_QUEUE = f"no queue {PARKING_QUEUE!r} to park it in"
_PARK_AGAIN = 30.0
"""Seconds after which an event is routed again that couldn't be parked."""


@dataclass(slots=True)
class StoredEvent:
    """An event that the application has stored, and that is to be routed.

    Attributes:
        row: its row, which is leased.
        parked_as: see ``Planned``.
    """

    row: Claimed
    parked_as: Event | None = None

    @property
    def event(self) -> Event:
        """The event."""
        return self.row.event


class Router:
    """Plans by the bindings of the moment, and creates the queues that it may. For one thread."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._routes = Routes()
        self._digest: bytes | None = None

    def plan_known(self, entries: Sequence[_P]) -> tuple[Plan[_P], bytes] | None:
        """Return the plan by the bindings that were read last, and their digest.

        None if the database has none to compare, or an event has no queue by those bindings.
        """
        if self._digest is None:
            return None
        events = (entry.event for entry in entries)
        if not all(self._routes.queues(event.exchange, event.target) for event in events):
            return None
        return Plan(entries, self._routes, self._settings.unroutable), self._digest

    def plan(self, entries: Sequence[_P], connection: Connection) -> Plan[_P]:
        """Return the plan for ``entries``, after creating the queues that it needs.

        Those are the queues of tasks that no worker has declared yet, and the parking queue, all
        only with ``declare="create"``.
        """
        bindings, self._digest = routing.load_with_digest(connection)
        self._routes.update(bindings)
        plan = Plan(entries, self._routes, self._settings.unroutable, self._makes_queue)
        for new_queue in plan.new_queues:
            names = (new_queue, dead_letter_queue(new_queue))
            routing.add(connection, [routing.of_queue(name) for name in names])
        if plan.parks and not self._make_parking_queue(connection):
            plan.park_nothing()  # the other events must not wait for the queue
        return plan

    def route_stored(self, store: Store, connection: Connection) -> Plan[StoredEvent] | None:
        """Move stored events that are due to their queues, the oldest of them.

        Each stays where it is, or is in all of its queues, when the transaction is over.

        Returns:
            What becomes of them; None if there are none.
        """
        rows = store.claim(_AT_ONCE, queue=UNROUTED, connection=connection)
        if not rows:
            return None
        plan = self.plan([StoredEvent(row) for row in rows], connection)
        store.put_rows(plan.rows, connection=connection)
        for (fate, reason), stored in plan.fates.items():
            done = [each.row for each in stored]
            if fate is Fate.REJECTED:
                store.bury(done, reason, connection=connection)
            else:
                store.complete(done, connection=connection)
        waiting = [each.row for each in plan.without_queue]
        store.release(
            waiting, _PARK_AGAIN, reason=_NO_PARKING_QUEUE, failed=True, connection=connection
        )
        return plan

    def _makes_queue(self, event: Event) -> bool:
        """Return whether the queue of ``event`` is created for it: it is a task's."""
        return (
            self._settings.declare == "create"
            and task_queues.is_task(event)
            and task_queues.spec_of(event.target, self._settings) is not None
        )

    def _make_parking_queue(self, connection: Connection) -> bool:
        """Create the parking queue if necessary and allowed; return whether it exists."""
        if self._routes.has_queue(PARKING_QUEUE):
            return True
        if self._settings.declare != "create":
            return False
        routing.add(connection, [routing.of_queue(PARKING_QUEUE)])
        return True
