"""The context shared by a worker's engines: consumers, publisher, subscription, inbox and quota."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from outbox import Publisher
from outbox.consumers.definition import Consumer
from outbox.consumers.message.deduplication import Inbox
from outbox.consumers.message.message import Message
from outbox.consumers.message.services import Services
from outbox.consumers.message.tally import Tally
from outbox.consumers.tasks.task_record import Results
from outbox.consumers.worker.dispatch_queue import DispatchQueue
from outbox.messages.delivery import Delivery
from outbox.surroundings import Surroundings
from outbox.transports.subscription import Subscription

__all__ = ["MakeMessage", "Quota", "WorkerContext"]

MakeMessage = Callable[[Consumer, Delivery, Services], Message]

_REQUEUE = 0.5  # seconds


class Quota:
    """A counter of messages, up to a limit. Thread-safe."""

    def __init__(self, limit: int) -> None:
        """Allow ``limit`` messages, 1 or more."""
        self._limit = limit
        self._lock = threading.Lock()
        self._begun = 0
        self._ended = 0

    @property
    def used_up(self) -> bool:
        """Whether all allowed messages have ended."""
        return self._ended >= self._limit

    @property
    def all_begun(self) -> bool:
        """Whether no further message may start."""
        return self._begun >= self._limit

    def begin(self) -> bool:
        """Return whether one more message may start, and count it."""
        with self._lock:
            if self._begun >= self._limit:
                return False
            self._begun += 1
            return True

    def end(self) -> bool:
        """Note that a message has ended; return whether it was the last allowed one."""
        with self._lock:
            self._ended += 1
            return self._ended == self._limit


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """The consumers of a worker, and everything needed to process their messages.

    Attributes:
        consumers: the consumers, by the name of their queue.
        publisher: the publisher of follow-on events, retries and dead letters.
        subscription: the subscription that delivers the messages.
        inbox: the inbox, or None.
        results: where the results of tasks are kept, or None.
        surroundings, tally: see ``Services``.
        quota: the quota of messages, or None for any number.
        on_used_up: called when the last message of the quota has ended.
        on_failed: called with the reason when the engine can't go on.
        make_message: creates a message from a consumer, a delivery and services.
        resting: the number of deliveries that wait without being processed soon, by queue: those
            of closed queues, for instance.
        make_dispatch_queue: creates the queue in which messages wait until they start.
    """

    consumers: Mapping[str, Consumer]
    publisher: Publisher
    subscription: Subscription
    inbox: Inbox | None
    results: Results | None
    surroundings: Surroundings | None
    tally: Tally
    quota: Quota | None
    on_used_up: Callable[[], object]
    on_failed: Callable[[str], object]
    make_message: MakeMessage
    resting: dict[str, int]
    make_dispatch_queue: Callable[[], DispatchQueue]

    def give_back(self, delivery: Delivery) -> None:
        """Requeue a message that the engine failed to handle."""
        self.subscription.requeue(delivery, _REQUEUE)
