"""What transports have in common whose events wait in a backlog until they are confirmed."""

from __future__ import annotations

from outbox.backlog.backlog import Backlog
from outbox.backlog.chunk import Chunk
from outbox.backlog.notifier import Notifier
from outbox.errors import ConnectionLost
from outbox.event import Event

__all__ = ["BackloggedTransport"]


class BackloggedTransport:
    """Answers from the backlog what a publisher asks of a ``Transport``.

    Those that inherit take from the backlog, and move events.

    Attributes:
        backlog: the entries without a fate.
    """

    def __init__(self, notify: Notifier) -> None:
        self._notify = notify
        self.backlog = Backlog()

    def release(self, chunk: Chunk) -> None:
        """Report ``chunk`` as it stands."""
        self._notify(self.backlog.release(chunk))

    def _hand_over(self) -> tuple[Event, ...]:
        """Report every chunk, and return what is left: nothing moves any more."""
        left, news = self.backlog.hand_over(ConnectionLost("the publisher was closed"))
        self._notify(news)
        return left
