"""Buffers: where the events of one unit of work wait.

A unit has one root buffer. A savepoint, and a nested block that joins, is a child buffer: appended
to its parent when it succeeds, dropped when it fails. All buffers of a unit share the root's lock
and its bounds.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING

from outbox.errors import CollectorClosed, CollectorFull
from outbox.event import Event, MakeId
from outbox.system import process

if TYPE_CHECKING:
    from outbox.observer import Observer

__all__ = ["Buffer", "ChildBuffer", "RootBuffer", "SavepointBuffer"]


class Buffer:
    """Events in the order in which they were enqueued. Thread-safe."""

    __slots__ = ("closed", "events", "size")

    closed: bool
    events: list[Event]
    size: int
    parent: Buffer | None
    root: RootBuffer

    def append(self, event: Event, max_events: int, max_bytes: int) -> None:
        """Add ``event``.

        Args:
            event: to be added.
            max_events: the bound of the unit, where it was not given its own.
            max_bytes: likewise.

        Raises:
            CollectorClosed: the unit of work, or the savepoint, has ended.
            CollectorFull: a bound of the unit is reached.
        """
        root = self.root
        with root.lock:
            if self.closed:
                raise CollectorClosed(self._why_closed(event))
            size = len(event.body)
            if root.max_events is not None:
                max_events = root.max_events
            if root.max_bytes is not None:
                max_bytes = root.max_bytes
            if root.total >= max_events or root.total_size + size > max_bytes:
                raise CollectorFull(
                    f"the collector holds {root.total} event(s) of {root.total_size} bytes, "
                    f"the bound being max_events={max_events}, max_bytes={max_bytes}; "
                    "publish() what is committed in between, or raise the bound"
                )
            root.total += 1
            root.total_size += size
            self.size += size
            self.events.append(event)

    def take(self) -> list[Event]:
        """Take all events out."""
        root = self.root
        with root.lock:
            events, self.events = self.events, []
            root.total -= len(events)
            root.total_size -= self.size
            self.size = 0
        return events

    def put_back(self, events: Sequence[Event]) -> None:
        """Put what was taken out to the front again; bounds and closing do not apply."""
        size = sum(len(event.body) for event in events)
        root = self.root
        with root.lock:
            self.events[:0] = events
            self.size += size
            root.total += len(events)
            root.total_size += size

    def close(self) -> list[Event]:
        """Refuse events from now on; take out and return those that are there."""
        with self.root.lock:
            self.closed = True
        return self.take()

    def _why_closed(self, event: Event) -> str:
        return (
            f"the event to {event.target!r} came after its unit of work had ended "
            "(a task or thread that outlived its request, block or message?); "
            "give such work an auto_publishing() block of its own"
        )


class RootBuffer(Buffer):
    """The buffer of a whole unit of work.

    Attributes:
        publishes_itself: whether the unit publishes at its end, so that nested blocks join it.
        make_id: makes the ids of events that follow from a message, else None.
        observer: that was in force when the unit began; None for whichever is by now.
        pid: the process that made it.
        max_events: the bound of the unit in events; None for the publisher's setting.
        max_bytes: the bound in bytes of all bodies; None for the publisher's setting.
    """

    __slots__ = (
        "lock",
        "make_id",
        "max_bytes",
        "max_events",
        "observer",
        "pid",
        "publishes_itself",
        "total",
        "total_size",
    )

    parent = None
    lock: threading.Lock
    total: int
    total_size: int

    def __init__(
        self,
        max_events: int | None = None,
        max_bytes: int | None = None,
        make_id: MakeId | None = None,
    ) -> None:
        self.events = []
        self.size = 0
        self.closed = False
        self.lock = threading.Lock()
        self.total = 0
        self.total_size = 0
        self.max_events = max_events
        self.max_bytes = max_bytes
        self.publishes_itself = False
        self.make_id = make_id
        self.observer: Observer | None = None
        self.pid = process.pid

    @property
    def root(self) -> RootBuffer:  # type: ignore[override]
        """Itself."""
        return self


class ChildBuffer(Buffer):
    """The buffer of a nested block, which publishes by itself where all above have ended."""

    __slots__ = ("parent", "root")

    def __init__(self, parent: Buffer) -> None:
        self.events = []
        self.size = 0
        self.closed = False
        self.parent = parent
        self.root = parent.root

    def merge(self) -> bool:
        """Close, and append the events to the nearest buffer above that is open.

        Returns:
            False when none is: the unit has ended, and the events are still here.
        """
        with self.root.lock:
            self.closed = True
            above: Buffer | None = self.parent
            while above is not None and above.closed:
                above = above.parent
            if above is None:
                return False
            above.events += self.events
            above.size += self.size
            self.events = []
            self.size = 0
        return True


class SavepointBuffer(ChildBuffer):
    """The buffer of a savepoint: nobody publishes its events once all blocks above have ended."""

    __slots__ = ()

    def append(self, event: Event, max_events: int, max_bytes: int) -> None:
        """Add ``event``; see :meth:`Buffer.append`."""
        above: Buffer | None = self.parent
        while above is not None and (above.closed or isinstance(above, SavepointBuffer)):
            above = above.parent
        if above is None:
            raise CollectorClosed(self._why_closed(event))
        super().append(event, max_events, max_bytes)
