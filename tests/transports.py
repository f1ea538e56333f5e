"""A transport whose confirms a test gives."""

from __future__ import annotations

import threading
from typing import Any

from outbox import Event
from outbox.backlog.backlog import Backlog
from outbox.backlog.chunk import Chunk, Fate
from outbox.transports.transport import Transport

__all__ = ["SlowTransport"]


class SlowTransport:
    """Confirms on request."""

    supports_delay = True
    longest_delay = None
    connected = True
    on_own_thread = False
    settled = True
    circuit_open = False
    kept = ()
    waiting_size = (0, 0)
    successor: Transport | None = None

    def __init__(self) -> None:
        self.backlog = Backlog()
        self.chunks: list[Chunk] = []
        self.events: list[Event] = []
        self.submitted = threading.Event()

    def start(self) -> None: ...

    def start_now(self) -> None: ...

    def queue_for(self, event: Any, engine: Any, options: Any) -> str:
        return ""

    def look_into(self, queues: Any) -> None: ...

    def announce(self, body: bytes) -> None: ...

    def ping(self, answer: Any) -> bool:
        return False

    def prepare(self, events: Any, *, keep: bool) -> Chunk:
        chunk = Chunk(events, keep=keep)
        chunk.holder = self
        return chunk

    def hand_in(self, chunk: Chunk) -> None:
        chunk.accept()
        self.chunks.append(chunk)
        self.events += [entry.event for entry in chunk.entries]
        self.submitted.set()

    def adopt(self, entries: Any) -> None: ...

    def retire(self, successor: Any, timeout: float) -> bool:
        return True

    def close_when_settled(self, then: Any) -> None: ...

    def confirm(self) -> None:
        """Confirm what has been handed in."""
        for chunk in self.chunks:
            for entry in chunk.entries:
                entry.fate = Fate.PUBLISHED
            if chunk.claim_report():
                chunk.resolve(chunk.report())

    def release(self, chunk: Chunk) -> None:
        if chunk.claim_report():
            chunk.resolve(chunk.report())

    def drain(self, timeout: float) -> bool:
        return True

    def close(self, *, graceful: bool = True) -> tuple[Any, ...]:
        return ()
