"""``memory://``: a transport without a broker, for tests and development."""

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
    """Confirms at once, and keeps the last 100,000 events in ``published``. Thread-safe."""

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
        """Do nothing: there is no connection."""

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
        """Do nothing: ``submit`` has reported every chunk."""

    def drain(self, timeout: float) -> bool:
        """Return True: every event has its fate."""
        return True

    def close(self, *, graceful: bool = True) -> tuple[Event, ...]:
        """Return an empty tuple: every event has its fate."""
        return ()


Transport = MemoryTransport
