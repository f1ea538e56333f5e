"""Records every event of the process in place of every publisher."""

from __future__ import annotations

import threading
from collections.abc import Sequence

from outbox import Event, PublishReport
from outbox.chunk import Chunk, Fate
from outbox.stats import Tally

__all__ = ["Recorder"]


class Recorder:
    """An observer (``outbox.observing``) that is also everybody's transport. Thread-safe.

    Nothing of it depends on context variables: events of bare threads, of tasks and of explicit
    publishers are recorded alike.
    """

    supports_delay = True
    connected = True
    kept: tuple[Event, ...] = ()
    kept_size = (0, 0)
    on_own_thread = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._enqueued: dict[int, Event] = {}  # by identity: a test may enqueue equal events
        self._published: list[Event] = []
        self._cleared: list[Event] = []
        self.tally = Tally()

    @property
    def transport(self) -> Recorder:
        """Itself, in place of every publisher's transport."""
        return self

    @property
    def pending(self) -> tuple[Event, ...]:
        """What was enqueued and neither published nor dropped, in the order of enqueueing."""
        with self._lock:
            return tuple(self._enqueued.values())

    @property
    def published(self) -> tuple[Event, ...]:
        """What was published, in that order."""
        with self._lock:
            return tuple(self._published)

    @property
    def dropped(self) -> tuple[Event, ...]:
        """What was dropped, by a rollback or by ``clear_events()``, in that order."""
        with self._lock:
            return tuple(self._cleared)

    def enqueued(self, event: Event) -> None:
        """Record an event that was collected."""
        with self._lock:
            self._enqueued[id(event)] = event

    def cleared(self, events: Sequence[Event]) -> None:
        """Record events that were dropped."""
        with self._lock:
            for event in events:
                self._enqueued.pop(id(event), None)
                self._cleared.append(event)

    def start(self) -> None:
        """Do nothing: there is nothing to connect to."""

    def submit(self, events: Sequence[Event], *, keep: bool) -> Chunk:
        """Record ``events`` as published, at once."""
        with self._lock:
            for event in events:
                self._enqueued.pop(id(event), None)
                self._published.append(event)
            self.tally.add(Fate.PUBLISHED.value, len(events))
        chunk = Chunk(events, keep=keep)
        for entry in chunk.entries:
            entry.fate = Fate.PUBLISHED
        chunk.future.set_result(PublishReport(published=tuple(events)))
        return chunk

    def release(self, chunk: Chunk) -> None:
        """Do nothing: no caller ever waits."""

    def drain(self, timeout: float) -> bool:
        """Return True: nothing is ever left."""
        return True

    def close(self, *, graceful: bool = True) -> tuple[Event, ...]:
        """Return nothing: nothing is ever left."""
        return ()
