"""What the life of a message needs of the engine that runs it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from outbox import (
    Event,
    EventCollector,
    Publisher,
)
from outbox.consumers.message.deduplication import Inbox
from outbox.transports.subscription import Subscription

__all__ = ["Services"]


class Services(Protocol):
    """What the life of a message needs of the engine that runs it."""

    @property
    def publisher(self) -> Publisher:
        """Of follow-on events, retries and dead letters."""
        ...

    @property
    def subscription(self) -> Subscription:
        """Where the messages come from."""
        ...

    @property
    def inbox(self) -> Inbox | None:
        """What has been done, or None, where nobody has named a database for that."""
        ...

    @property
    def is_stopping(self) -> bool:
        """Whether nothing that can wait is to be done any more."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether another message may begin while the last events of one are being confirmed."""
        ...

    def publish(self, collector: EventCollector) -> Any:
        """Publish what ``collector`` holds; return the report, or something to await."""
        ...

    def publish_one(self, event: Event) -> Any:
        """Publish ``event``, withdrawn when it is not confirmed; return the report, or so."""
        ...

    def apart(self, function: Callable[[], Any]) -> Any:
        """Call what waits for a database; return its result, or something to await."""
        ...

    def pause(self, seconds: float) -> Any:
        """Wait, but not when the worker is stopping; return None, or something to await."""
        ...
