"""How long an inbox remembers messages, and when it forgets them, whatever it is stored in."""

from __future__ import annotations

import datetime
import threading
import time
from collections.abc import Callable
from typing import Protocol

__all__ = ["FORGOTTEN_AT_ONCE", "Deduplicating", "Forgetting", "Identified", "window_of"]

_WINDOW = datetime.timedelta(days=7)
_EVERY = 3600.0  # seconds between two looks for older messages
FORGOTTEN_AT_ONCE = 1000
"""Rows deleted in a transaction, which on SQLite holds up all other writers."""


class Deduplicating(Protocol):
    """A consumer, as an inbox sees it."""

    @property
    def queue(self) -> str:
        """The queue, which identifies the consumer."""
        ...

    @property
    def deduplicate(self) -> bool | datetime.timedelta:
        """Whether it deduplicates, or for how long messages are remembered."""
        ...


class Identified(Protocol):
    """A message, as an inbox sees it."""

    @property
    def id(self) -> str:
        """The id."""
        ...


def window_of(consumer: Deduplicating) -> datetime.timedelta:
    """Return how long the messages of ``consumer`` are remembered: 7 days unless it says so."""
    window = consumer.deduplicate
    return window if isinstance(window, datetime.timedelta) else _WINDOW


class Forgetting:
    """Has older messages forgotten now and then, apart for each consumer. Thread-safe."""

    def __init__(self) -> None:
        """Begin with a look for each consumer."""
        self._looked_at: dict[str, float] = {}
        self._lock = threading.Lock()

    def now_and_then(self, consumer: str, forget_some: Callable[[], int]) -> None:
        """Call ``forget_some``, unless it found few within the last hour.

        Args:
            consumer: the queue of the consumer.
            forget_some: deletes at most ``FORGOTTEN_AT_ONCE`` rows, and returns how many.
        """
        now = time.monotonic()
        with self._lock:
            if now - self._looked_at.get(consumer, -_EVERY) < _EVERY:
                return
            self._looked_at[consumer] = now
        if forget_some() >= FORGOTTEN_AT_ONCE:
            # A message waits for this, so it leaves the rest to the next one.
            self._looked_at.pop(consumer, None)
