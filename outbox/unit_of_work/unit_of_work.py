"""The unit of work: a request, a block or a message, whose events share one fate."""

from __future__ import annotations

import threading

from outbox.errors import CollectorFull
from outbox.event import MakeId
from outbox.observer import Observer
from outbox.publisher import Publisher
from outbox.system import process

__all__ = ["UnitOfWork"]


class UnitOfWork:
    """The owner of what all buffers and collectors of a unit share. Thread-safe.

    It doesn't refer to its buffers, which refer to it: a unit is freed as soon as its last
    collector is, without waiting for the garbage collector.

    Attributes:
        publisher: the publisher of its events; None for the process's default publisher.
        autoflush: whether to publish each event as it is enqueued.
        publishes_itself: whether it publishes at its end, so that nested blocks join it.
        make_id: the function that makes the ids of follow-on events; None outside a message.
        keeps: whether the publisher keeps what the broker hasn't confirmed; otherwise such events
            are withdrawn, and publishing raises.
        observer: the observer installed when the unit began; None to use the present one.
        pid: the id of the process that made it.
        max_events: the limit in events; None for the publisher's setting.
        max_bytes: the limit in bytes of all bodies; None for the publisher's setting.
        lock: guards its buffers and the two totals.
        total: the number of events in all its buffers.
        total_size: the bytes of their bodies.
    """

    __slots__ = (
        "autoflush",
        "keeps",
        "lock",
        "make_id",
        "max_bytes",
        "max_events",
        "observer",
        "pid",
        "publisher",
        "publishes_itself",
        "total",
        "total_size",
    )

    def __init__(
        self,
        publisher: Publisher | None,
        observer: Observer | None,
        publishes_itself: bool = False,
        autoflush: bool = False,
        max_events: int | None = None,
        max_bytes: int | None = None,
        make_id: MakeId | None = None,
    ) -> None:
        """Begin a unit in this process; see the attributes."""
        self.publisher = publisher
        self.observer = observer
        self.publishes_itself = publishes_itself
        self.autoflush = autoflush
        self.max_events = max_events
        self.max_bytes = max_bytes
        self.make_id = make_id
        self.keeps = make_id is None
        self.pid = process.pid
        self.lock = threading.Lock()
        self.total = 0
        self.total_size = 0

    def follow(self, outer: UnitOfWork) -> None:
        """Inherit publisher and ids from ``outer``, without joining it.

        In an independent block within a message, events are still follow-on events; and the inner
        unit uses the outer one's publisher, unless it has its own.
        """
        self.publisher = self.publisher or outer.publisher
        self.make_id = outer.make_id
        self.keeps = outer.make_id is None

    def add(self, size: int, max_events: int, max_bytes: int) -> None:
        """Count one more event; the caller holds the lock.

        Args:
            size: the bytes of its body.
            max_events: the limit if the unit has none.
            max_bytes: the limit if the unit has none.

        Raises:
            CollectorFull: a limit is reached.
        """
        if self.max_events is not None:
            max_events = self.max_events
        if self.max_bytes is not None:
            max_bytes = self.max_bytes
        if self.total >= max_events or self.total_size + size > max_bytes:
            raise CollectorFull(
                f"the collector holds {self.total} event(s) of {self.total_size} bytes; its limits "
                f"are max_events={max_events}, max_bytes={max_bytes}; call publish() after each "
                "commit, or raise the limit"
            )
        self.total += 1
        self.total_size += size
