"""The services that an engine provides to the messages it runs."""

from __future__ import annotations

from typing import Protocol

from outbox import Publisher
from outbox.consumers.message.deduplication import Inbox
from outbox.consumers.message.tally import Tally
from outbox.consumers.tasks.task_record import Results
from outbox.surroundings import Surroundings
from outbox.transports.subscription import Subscription

__all__ = ["Services"]


class Services(Protocol):
    """The services of an engine to its messages, besides taking their steps."""

    @property
    def publisher(self) -> Publisher:
        """The publisher of follow-on events, retries and dead letters."""
        ...

    @property
    def subscription(self) -> Subscription:
        """The subscription that delivers the messages."""
        ...

    @property
    def inbox(self) -> Inbox | None:
        """The inbox, or None if no consumer deduplicates."""
        ...

    @property
    def results(self) -> Results | None:
        """Where the results of tasks are kept, or None."""
        ...

    @property
    def surroundings(self) -> Surroundings | None:
        """What each handler and callback needs around it, or None."""
        ...

    @property
    def tally(self) -> Tally:
        """The counters of the messages that end."""
        ...

    @property
    def is_stopping(self) -> bool:
        """Whether the worker is stopping: a message that would have to wait is left."""
        ...

    @property
    def overlaps(self) -> bool:
        """Whether another message may start while the last events of one are being confirmed."""
        ...
