"""What a publisher needs of a transport."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Protocol

from outbox.backlog.backlog import Backlog
from outbox.backlog.chunk import Chunk
from outbox.event import Event

__all__ = ["Transport"]


class Transport(Protocol):
    """One process's way to a broker. Thread-safe; never used by another process.

    Attributes:
        supports_delay: whether events with ``deliver_at`` can be carried.
        backlog: the entries without a fate; what is kept, and the counters.
    """

    supports_delay: bool
    backlog: Backlog

    @property
    def longest_delay(self) -> datetime.timedelta | None:
        """How far ahead ``deliver_at`` may be when an event is enqueued; None for any time."""
        ...

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached now, as far as is known."""
        ...

    @property
    def on_own_thread(self) -> bool:
        """Whether the caller runs on a thread that confirms depend on, and must not wait."""
        ...

    def start(self) -> None:
        """Begin to connect in the background, unless that has begun."""
        ...

    def submit(self, events: Sequence[Event], *, keep: bool) -> Chunk:
        """Take ``events`` over and return at once; the chunk's future gets the report."""
        ...

    def release(self, chunk: Chunk) -> None:
        """Resolve the chunk's future now: the caller's time is up."""
        ...

    def drain(self, timeout: float) -> bool:
        """Wait until every event has its fate, at most ``timeout`` seconds; return whether so."""
        ...

    def close(self, *, graceful: bool = True) -> tuple[Event, ...]:
        """Close the connection and return the events that are left."""
        ...
