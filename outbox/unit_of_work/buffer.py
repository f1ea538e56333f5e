"""Buffers: where the events of a unit of work wait.

A unit has one outermost buffer. A savepoint, and a nested block that joins, has a child buffer:
appended to its parent on success, dropped on failure. All of them share the unit's lock and limits.
"""

from __future__ import annotations

from collections.abc import Sequence

from outbox.errors import CollectorClosed
from outbox.event import Event
from outbox.unit_of_work.unit_of_work import UnitOfWork

__all__ = ["Buffer", "SavepointBuffer"]


class Buffer:
    """Events in the order they were enqueued. Thread-safe.

    Attributes:
        unit: the unit of work that it belongs to.
        parent: the buffer that it is appended to on success; None for the outermost.
        events: the events, in order; changed only under the unit's lock.
        size: the bytes of their bodies.
        closed: whether it refuses events.
    """

    __slots__ = ("closed", "events", "parent", "size", "unit")

    def __init__(self, unit: UnitOfWork, parent: Buffer | None = None) -> None:
        self.unit = unit
        self.parent = parent
        self.events: list[Event] = []
        self.size = 0
        self.closed = False

    @property
    def outermost(self) -> Buffer:
        """The buffer of the whole unit."""
        buffer = self
        while buffer.parent is not None:
            buffer = buffer.parent
        return buffer

    def append(self, event: Event, max_events: int, max_bytes: int) -> None:
        """Add ``event``.

        Args:
            event: the event to add.
            max_events: the limit if the unit has none.
            max_bytes: the limit if the unit has none.

        Raises:
            CollectorClosed: the unit of work, or the savepoint, has ended.
            CollectorFull: the unit has reached a limit.
        """
        unit = self.unit
        size = len(event.body)
        with unit.lock:
            if self.closed:
                raise CollectorClosed(self._why_closed(event))
            unit.add(size, max_events, max_bytes)
            self.size += size
            self.events.append(event)

    def take(self) -> list[Event]:
        """Remove and return all events."""
        unit = self.unit
        with unit.lock:
            events, self.events = self.events, []
            unit.total -= len(events)
            unit.total_size -= self.size
            self.size = 0
        return events

    def put_back(self, events: Sequence[Event]) -> None:
        """Put taken events back at the front, beyond the limits and even after ``close()``."""
        size = sum(len(event.body) for event in events)
        unit = self.unit
        with unit.lock:
            self.events[:0] = events
            self.size += size
            unit.total += len(events)
            unit.total_size += size

    def close(self) -> list[Event]:
        """Refuse further events; remove and return the present ones."""
        with self.unit.lock:
            self.closed = True
        # Nothing is appended to a closed buffer, so this check needs no lock.
        return self.take() if self.events else []

    def merge(self) -> bool:
        """Close, and append the events to the nearest open buffer above.

        Returns:
            Whether there was one. If not, the unit has ended, and the events are still here.
        """
        with self.unit.lock:
            self.closed = True
            above = self.parent
            while above is not None and above.closed:
                above = above.parent
            if above is None:
                return False
            above.events += self.events
            above.size += self.size
            self.events = []
            self.size = 0
        return True

    def _why_closed(self, event: Event) -> str:
        return (
            f"the event to {event.target!r} was enqueued after its unit of work had ended "
            "(a task or thread that outlived its request, block or message?); "
            "give such work its own auto_publishing() block"
        )


class SavepointBuffer(Buffer):
    """The buffer of a savepoint, which can't publish once all blocks above have ended."""

    __slots__ = ()

    def append(self, event: Event, max_events: int, max_bytes: int) -> None:
        """Add ``event``; see :meth:`Buffer.append`."""
        above = self.parent
        while above is not None and (above.closed or isinstance(above, SavepointBuffer)):
            above = above.parent
        if above is None:
            raise CollectorClosed(self._why_closed(event))
        super().append(event, max_events, max_bytes)
