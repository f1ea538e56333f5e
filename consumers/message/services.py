"""What a message needs of the engine that runs it."""

from __future__ import annotations

from typing import Protocol

from outbox import Publisher
from outbox.consumers.message.deduplication import Inbox
from outbox.transports.subscription import Subscription

__all__ = ["Services"]


class Services(Protocol):
    """What a message needs of the engine that runs it, beside having its steps taken."""

    @property
    def publisher(self) -> Publisher:
        """The publisher of follow-on events, retries and dead letters."""
        ...

    @property
    def subscription(self) -> Subscription:
        """Where the messages come from."""
        ...

    @property
    def inbox(self) -> Inbox | None:
        """What has been done, or None without a database for that."""
        ...

    @property
    def is_stopping(self) -> bool:
        """Whether nothing that can wait is to be done any more."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether another message may begin while the last events of one are being confirmed."""
        ...
