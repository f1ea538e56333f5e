"""``memory://``: events that go nowhere, for tests and for development without a broker."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence

from outbox.backlog.backlog import Backlog
from outbox.backlog.chunk import Chunk, Fate
from outbox.backlog.notifier import Notifier
from outbox.event import Event
from outbox.settings import Settings
from outbox.url import BrokerURL

__all__ = ["MemoryTransport", "Transport"]


class MemoryTransport:
    """Confirms at once; remembers the last 100,000 events in ``published``. Thread-safe."""

    supports_delay = True
    longest_delay = None
    connected = True
    on_own_thread = False

    def __init__(self, url: BrokerURL, settings: Settings, notify: Notifier) -> None:
        self.backlog = Backlog()
        self._notify = notify
        self._lock = threading.Lock()
        self.published: deque[Event] = deque(maxlen=100_000)

    def start(self) -> None:
        """Do nothing: there is nothing to connect to."""

    def submit(self, events: Sequence[Event], *, keep: bool) -> Chunk:
        """Publish ``events`` at once."""
        chunk = Chunk(events, keep=keep)
        entries = chunk.entries
        news = self.backlog.add(chunk)
        if entries:
            with self._lock:
                self.published.extend(events)
                self.backlog.take(len(entries), len(entries))
            news = self.backlog.give_fate(entries, Fate.PUBLISHED)
        self._notify(news)
        return chunk

    def release(self, chunk: Chunk) -> None:
        """Do nothing: no caller ever waits."""

    def drain(self, timeout: float) -> bool:
        """Return True: nothing is ever left."""
        return True

    def close(self, *, graceful: bool = True) -> tuple[Event, ...]:
        """Return nothing: nothing is ever left."""
        return ()


Transport = MemoryTransport
