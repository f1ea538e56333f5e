"""``memory://``: a transport without a broker, for tests and development."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from outbox.backlog.backlog import Backlog, News
from outbox.backlog.chunk import Chunk, Entry, Fate
from outbox.backlog.notifier import Notifier
from outbox.event import Event
from outbox.settings import Settings
from outbox.transports.transport import Transport as TransportProtocol
from outbox.url import BrokerURL

__all__ = ["MemoryTransport", "Transport"]


class MemoryTransport:
    """Confirms at once, and keeps the last 100,000 events in ``published``.

    Thread-safe, also in signal handlers and finalizers.
    """

    supports_delay = True
    longest_delay = None
    connected = True
    on_own_thread = False
    settled = True
    circuit_open = False
    kept = ()
    waiting_size = (0, 0)

    def __init__(self, url: BrokerURL, settings: Settings, notify: Notifier) -> None:
        self.backlog = Backlog()
        self.successor: TransportProtocol | None = None
        self._notify = notify
        self._counting = threading.RLock()
        self.published: deque[Event] = deque(maxlen=100_000)

    def start(self) -> None:
        """Do nothing: there is no connection."""

    def start_now(self) -> None:
        """Do nothing: there is no thread."""

    def queue_for(self, event: Event, engine: Any, options: Mapping[str, Any]) -> str:
        """Return ``""``: whatever is stored, a relay or this process publishes."""
        return ""

    def look_into(self, queues: Collection[str]) -> None:
        """Do nothing: nothing is delivered from a table."""

    def announce(self, body: bytes) -> None:
        """Do nothing: only RabbitMQ passes it on."""

    def ping(self, answer: Callable[[], None]) -> bool:
        """Return False: it has no thread."""
        return False

    def prepare(self, events: Sequence[Event], *, keep: bool) -> Chunk:
        """Return ``events`` as a chunk."""
        chunk = Chunk(events, keep=keep)
        chunk.holder = self
        chunk.submitted_at = time.monotonic()
        return chunk

    def hand_in(self, chunk: Chunk) -> None:
        """Publish ``chunk`` at once."""
        if chunk.accept():
            self._publish(chunk.entries, lambda: self.backlog.add(chunk))

    def release(self, chunk: Chunk) -> None:
        """Do nothing: ``hand_in`` has reported every chunk."""

    def adopt(self, entries: Sequence[Entry]) -> None:
        """Publish ``entries`` of another transport at once."""
        self._publish(entries, lambda: self.backlog.adopt(entries))

    def retire(self, successor: TransportProtocol, timeout: float) -> bool:
        """Leave to ``successor`` what will be handed in."""
        self.successor = successor
        return True

    def drain(self, timeout: float) -> bool:
        """Return True: every event has its fate."""
        return True

    def close_when_settled(self, then: Callable[[], object]) -> None:
        """Call ``then``: every event has its fate."""
        then()

    def close(self, *, graceful: bool = True) -> tuple[Event, ...]:
        """Return an empty tuple: every event has its fate."""
        return ()

    def _publish(self, entries: Sequence[Entry], add: Callable[[], News]) -> None:
        self.published.extend([entry.event for entry in entries])
        with self._counting:
            news = [add()]
            self.backlog.take(len(entries), len(entries))
            news.append(self.backlog.give_fate(entries, Fate.PUBLISHED))
        for each in news:
            self._notify(each)


Transport = MemoryTransport
