"""The base class of transports that hold events in a backlog until they are confirmed."""

from __future__ import annotations

from outbox.backlog.backlog import Backlog
from outbox.backlog.chunk import Chunk
from outbox.backlog.notifier import Notifier
from outbox.errors import ConnectionLost
from outbox.event import Event

__all__ = ["BackloggedTransport"]


class BackloggedTransport:
    """The part of a ``Transport`` that the backlog answers; subclasses move the events.

    Attributes:
        backlog: the entries without a fate.
    """

    def __init__(self, notify: Notifier) -> None:
        self._notify = notify
        self.backlog = Backlog()

    def release(self, chunk: Chunk) -> None:
        """Report ``chunk`` now: its caller's timeout is over."""
        self._notify(self.backlog.release(chunk))

    def _hand_over(self) -> tuple[Event, ...]:
        """Report every chunk, close the backlog, and return the events that are left."""
        remaining, news = self.backlog.hand_over(ConnectionLost("the publisher was closed"))
        self._notify(news)
        return remaining
