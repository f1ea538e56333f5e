"""The protocol of a transport: how a publisher hands over events."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Protocol

from outbox.backlog.backlog import Backlog
from outbox.backlog.chunk import Chunk
from outbox.event import Event

__all__ = ["Transport"]


class Transport(Protocol):
    """A process's connection to a broker. Thread-safe; never used by another process.

    Attributes:
        supports_delay: whether events with ``deliver_at`` can be carried.
        backlog: the entries without a fate; what is kept, and the counters.
    """

    supports_delay: bool
    backlog: Backlog

    @property
    def longest_delay(self) -> datetime.timedelta | None:
        """The longest time from enqueueing an event to its ``deliver_at``; None for no limit."""
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
        """Start connecting in the background, unless that has started."""
        ...

    def submit(self, events: Sequence[Event], *, keep: bool) -> Chunk:
        """Accept ``events`` and return at once; the chunk's future gets the report."""
        ...

    def release(self, chunk: Chunk) -> None:
        """Report ``chunk`` now: its caller's timeout is over."""
        ...

    def drain(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until all events have a fate; return whether they do."""
        ...

    def close(self, *, graceful: bool = True) -> tuple[Event, ...]:
        """Close the connection and return the events that are left."""
        ...
