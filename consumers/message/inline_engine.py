"""Attempts whose messages are settled elsewhere: by another process, or by a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from outbox import Event, EventCollector, Publisher
from outbox.consumers.message.deduplication import Inbox
from outbox.consumers.message.message import Message
from outbox.consumers.message.steps import Steps, call
from outbox.consumers.outcome import Outcome, Unconfirmed
from outbox.transports.subscription import Subscription

__all__ = ["SettledElsewhere", "concluded", "conclusion"]


class SettledElsewhere:
    """What an attempt needs, here and now; see ``life.Services``."""

    is_stopping = True
    overlaps = False

    def __init__(
        self, publisher: Publisher, inbox: Inbox | None = None, *, is_async: bool = False
    ) -> None:
        """Have follow-on events published by ``publisher``; with ``is_async`` to be awaited."""
        self.publisher = publisher
        self.inbox = inbox
        self._is_async = is_async

    @property
    def subscription(self) -> Subscription:
        """There is none."""
        raise RuntimeError("the message is settled elsewhere")

    def publish(self, collector: EventCollector) -> Any:
        """Publish, and wait or return what is to be awaited."""
        return collector.publish_async() if self._is_async else collector.publish()

    def publish_one(self, event: Event) -> Any:
        """Refuse."""
        raise RuntimeError("the message is settled elsewhere")

    def apart(self, function: Callable[[], Any]) -> Any:
        """Call ``function``."""
        return function()

    def pause(self, seconds: float) -> None:
        """Wait for nothing."""


def concluded(message: Message) -> Outcome:
    """Process ``message`` once, and return what is to become of it."""
    return call(conclusion(message))


def conclusion(message: Message) -> Steps[Outcome]:
    """Return the steps of :func:`concluded`."""
    result = yield from message.attempt()
    if isinstance(result, Unconfirmed):
        raise RuntimeError("nothing here waits for the confirms of a message")
    return (yield from message.conclude(result))
