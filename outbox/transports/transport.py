"""The protocol of a transport: how a publisher hands over events."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Protocol

from outbox.backlog.backlog import Backlog
from outbox.backlog.chunk import Chunk, Entry
from outbox.event import Event

__all__ = ["Transport"]


class Transport(Protocol):
    """A process's connection to a broker. Never used by another process.

    Thread-safe, also in signal handlers and finalizers: a caller may be interrupted anywhere.

    Attributes:
        supports_delay: whether events with ``deliver_at`` can be carried.
        backlog: the entries without a fate; what is kept, and the counters.
        successor: the transport that everything was moved to, or None.
    """

    supports_delay: bool
    backlog: Backlog
    successor: Transport | None

    @property
    def longest_delay(self) -> datetime.timedelta | None:
        """The longest time from enqueueing an event to its ``deliver_at``; None for no limit."""
        ...

    @property
    def connected(self) -> bool:
        """Whether the broker can be reached now, as far as is known."""
        ...

    @property
    def settled(self) -> bool:
        """Whether every event that was handed in has a fate."""
        ...

    @property
    def circuit_open(self) -> bool:
        """Whether chunks are reported at once, because the broker is unavailable."""
        ...

    @property
    def kept(self) -> tuple[Event, ...]:
        """The kept events, in the order they will be sent."""
        ...

    @property
    def waiting_size(self) -> tuple[int, int]:
        """The number of events that wait for a broker which doesn't answer, and their bytes."""
        ...

    @property
    def on_own_thread(self) -> bool:
        """Whether the caller runs on a thread that confirms depend on, and must not wait."""
        ...

    def start(self) -> None:
        """Start connecting in the background, unless that has started."""
        ...

    def start_now(self) -> None:
        """Start the background thread, if there is one, without connecting; wait until it runs."""
        ...

    def prepare(self, events: Sequence[Event], *, keep: bool) -> Chunk:
        """Return ``events`` as a chunk, encoded and not yet accepted."""
        ...

    def hand_in(self, chunk: Chunk) -> None:
        """Accept ``chunk`` and return at once; the chunk gets the report."""
        ...

    def queue_for(self, event: Event, engine: Any, options: Mapping[str, Any]) -> str:
        """Return the queue of a row that the application is about to store for ``event``.

        It is ``""``, the relay's, unless the events of that queue are delivered from the same
        table.

        Args:
            event: the event.
            engine: the SQLAlchemy engine with which it is stored.
            options: what the connection's execution options add to the engine's.
        """
        ...

    def look_into(self, queues: Collection[str]) -> None:
        """Have workers look into ``queues``: the application has committed rows there.

        Returns at once.
        """
        ...

    def announce(self, body: bytes) -> None:
        """Send what this process announces of itself, or do nothing; return at once."""
        ...

    def ping(self, answer: Callable[[], None]) -> bool:
        """Have ``answer`` called soon on the transport's thread.

        Returns:
            False if that thread isn't running, or may rightly be busy for long.
        """
        ...

    def adopt(self, entries: Sequence[Entry]) -> None:
        """Take over the entries of another transport, and their chunks."""
        ...

    def retire(self, successor: Transport, timeout: float) -> bool:
        """Move all events to ``successor``; return whether that took at most ``timeout`` s."""
        ...

    def release(self, chunk: Chunk) -> None:
        """Report ``chunk`` now: its caller's timeout is over."""
        ...

    def drain(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds until all events have a fate; return whether they do."""
        ...

    def close_when_settled(self, then: Callable[[], object]) -> None:
        """Close once every event has a fate, and call ``then``; return at once."""
        ...

    def close(self, *, graceful: bool = True) -> tuple[Event, ...]:
        """Close the connection and return the events that are left."""
        ...
