"""The protocol of parking and dead-letter queues: how commands list and replay them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Protocol, Self

from outbox.messages.parked_message import ParkedMessage, ReplayResult

__all__ = ["Browsing", "ParkedQueues"]


class Browsing(Protocol):
    """Messages of one queue, in order, until they are removed or returned to it."""

    def windows(self) -> Iterator[Sequence[ParkedMessage]]:
        """Yield the messages window by window, each message once."""
        ...

    def remove(self, messages: Sequence[ParkedMessage]) -> None:
        """Delete ``messages``, which are from the last window."""
        ...


class ParkedQueues(Protocol):
    """A broker's parking and dead-letter queues. For one thread."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def count(self, queue: str) -> int:
        """Return the number of messages waiting in ``queue``."""
        ...

    def browse(self, queue: str, bound: int) -> AbstractContextManager[Browsing]:
        """Browse up to ``bound`` messages of ``queue`` in a block; the rest then goes back."""
        ...

    def obstacle(self, message: ParkedMessage, *, to_origin: bool) -> str | None:
        """Return why a replay of ``message`` would fail, as far as that is known beforehand."""
        ...

    def replay(self, messages: Sequence[ParkedMessage], *, to_origin: bool) -> ReplayResult:
        """Publish ``messages`` and wait for the confirms; ``Browsing.remove`` deletes them."""
        ...
