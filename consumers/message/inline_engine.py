"""The engine of messages that are settled elsewhere: by another process, or by a test."""

from __future__ import annotations

import inspect
from typing import Any

from outbox import Publisher
from outbox.consumers.message.deduplication import Inbox
from outbox.consumers.message.message import Message
from outbox.consumers.message.steps import (
    Blocking,
    Call,
    Confirm,
    Pause,
    Step,
    Steps,
    call,
    cancelled_in_time,
    drive,
)
from outbox.consumers.outcome import Outcome, Unconfirmed
from outbox.transports.subscription import Subscription

__all__ = ["InlineEngine"]


class InlineEngine:
    """Runs one attempt of a message here and now; see ``Services`` for its attributes."""

    is_stopping = True
    overlaps = False

    def __init__(self, publisher: Publisher, inbox: Inbox | None = None) -> None:
        """Have follow-on events published by ``publisher``."""
        self.publisher = publisher
        self.inbox = inbox

    @property
    def subscription(self) -> Subscription:
        """There is none."""
        raise RuntimeError("the message is settled elsewhere")

    def conclude(self, message: Message) -> Outcome:
        """Process ``message`` once, and return what is to become of it.

        The limit of its time is not watched here.
        """
        return call(_conclusion(message), self._take)

    async def conclude_async(self, message: Message) -> Outcome:
        """Process the message of an asynchronous consumer in this task; see :meth:`conclude`."""
        return await drive(_conclusion(message), self._take_async)

    def _take(self, step: Step) -> Any:
        match step:
            case Call(function, arguments):
                return function(*arguments)
            case Confirm(chunk):
                return self.publisher.wait_for(chunk)
            case Blocking(function):
                return function()
            case Pause():
                return None

    async def _take_async(self, step: Step) -> Any:
        if isinstance(step, Confirm):
            return await self.publisher.wait_for_async(step.chunk)
        value = self._take(step)
        if value is None or not inspect.isawaitable(value):
            return value
        timeout = step.timeout if isinstance(step, Call) else None
        return await (value if timeout is None else cancelled_in_time(value, timeout))


def _conclusion(message: Message) -> Steps[Outcome]:
    result = yield from message.attempt()
    if isinstance(result, Unconfirmed):
        raise RuntimeError("nothing here waits for the confirms of a message")
    return (yield from message.conclude(result))
