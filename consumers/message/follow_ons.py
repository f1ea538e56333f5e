"""The collector of a message: follow-on events with deterministic ids."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from contextvars import Token

from outbox import Event, EventCollector, Publisher
from outbox.backlog.chunk import Chunk
from outbox.ids import follow_on_id
from outbox.messages.received_event import ReceivedEvent
from outbox.unit_of_work.unit_of_work import Buffer, Scope, UnitOfWork

__all__ = ["CallbackCollector", "MessageCollector"]


class MessageCollector(EventCollector):
    """The collector of one message, whose events' ids derive from the message's id."""

    __slots__ = ()

    def __init__(self, publisher: Publisher, event: ReceivedEvent, *, auto_publish: bool) -> None:
        """Create an empty collector; with ``auto_publish``, the attempt publishes its events."""
        # Every message makes one: what EventCollector's own __init__ does, without calling it.
        self._unit = UnitOfWork(publisher, None, auto_publish, make_id=_FollowOnIds(event))
        self._buffer = Buffer(self._unit)

    @property
    def has_events(self) -> bool:
        """Whether events wait to be published."""
        return bool(self._buffer.events)

    def enter(self) -> Token[Scope | None]:
        """Make it current until ``Scope.leave()``: what ``use()`` does, at half the cost."""
        return Scope.enter(self, self._buffer)

    def refuse(self) -> None:
        """Refuse further events, before the present ones are published.

        A thread or task that outlives the handler must not add to what waits for its confirms.
        """
        self._buffer.closed = True

    def end(self) -> tuple[Event, ...]:
        """Drop the remaining events, refuse further ones, and return what was dropped."""
        dropped = self._buffer.close()
        return self._drop(dropped) if dropped else ()

    def hand_over(self) -> Chunk:
        """Submit the events, without waiting for the confirms."""
        return self._hand_over(self._innermost(), self.publisher)


class CallbackCollector(MessageCollector):
    """The collector of a callback: the outcome is decided already, so its events are kept."""

    __slots__ = ()

    def __init__(self, publisher: Publisher, event: ReceivedEvent, *, auto_publish: bool) -> None:
        super().__init__(publisher, event, auto_publish=auto_publish)
        self._unit.keeps = True


class _FollowOnIds:
    """Event ids that stay the same when the message is processed again. Thread-safe.

    An id derives from the message, the queue, and everything that identifies the event: a different
    event never gets it. Identical events in one attempt are numbered.
    """

    __slots__ = ("_event", "_seen")

    def __init__(self, event: ReceivedEvent) -> None:
        self._event = event
        self._seen: dict[tuple[str, ...], Iterator[int]] = {}

    def __call__(self, exchange: str, target: str, key: str | None, body: bytes) -> str:
        digest = hashlib.sha256(body).hexdigest()
        keyed = "" if key is None else f"={key}"
        parts = (self._event.id, self._event.queue, exchange, target, keyed, digest)
        number = next(self._seen.setdefault(parts, itertools.count()))  # both steps are atomic
        return follow_on_id(*parts, str(number))
