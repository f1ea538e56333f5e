"""What the engines of a worker share: consumers, publisher, subscription, inbox and quota."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from outbox import Publisher
from outbox.consumers.definition import Consumer
from outbox.consumers.message.deduplication import Inbox
from outbox.consumers.message.message import Message
from outbox.consumers.message.services import Services
from outbox.consumers.worker.dispatch_queue import Arrivals
from outbox.messages.delivery import Delivery
from outbox.transports.subscription import Subscription

__all__ = ["MakeMessage", "Quota", "Work"]

MakeMessage = Callable[[Consumer, Delivery, Services], Message]

_REQUEUE = 0.5  # seconds


class Quota:
    """Counts messages up to a bound. Thread-safe."""

    def __init__(self, limit: int) -> None:
        """Allow ``limit`` messages, 1 or more."""
        self._limit = limit
        self._lock = threading.Lock()
        self._begun = 0
        self._ended = 0

    @property
    def used_up(self) -> bool:
        """Whether all messages that are allowed have ended."""
        return self._ended >= self._limit

    def begin(self) -> bool:
        """Return whether one more message may be begun."""
        with self._lock:
            if self._begun >= self._limit:
                return False
            self._begun += 1
            return True

    def end(self) -> bool:
        """Note that a message has ended; return whether it was the last one that is allowed."""
        with self._lock:
            self._ended += 1
            return self._ended == self._limit


@dataclass(frozen=True, slots=True)
class Work:
    """Whose messages are processed, and with what.

    Attributes:
        consumers: by the name of their queue.
        publisher: of follow-on events, retries and dead letters.
        subscription: where the messages come from.
        inbox: what has been done, or None.
        quota: how many messages may be begun, or None for any number.
        on_used_up: called when the last message of the quota has ended.
        make_message: makes what is taken through its life.
        make_arrivals: makes what holds messages until they begin, in the order of their queues.
    """

    consumers: Mapping[str, Consumer]
    publisher: Publisher
    subscription: Subscription
    inbox: Inbox | None
    quota: Quota | None
    on_used_up: Callable[[], object]
    make_message: MakeMessage
    make_arrivals: Callable[[], Arrivals]

    def give_back(self, delivery: Delivery) -> None:
        """Have a message that could not be handled come again, soon."""
        self.subscription.requeue(delivery, _REQUEUE)
