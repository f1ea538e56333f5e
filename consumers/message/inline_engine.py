"""An engine for messages that are settled elsewhere: by another process, or by a test."""

from __future__ import annotations

import inspect
from typing import Any

from outbox import Publisher, surroundings
from outbox.consumers.message.deduplication import Inbox
from outbox.consumers.message.message import Message
from outbox.consumers.message.steps import (
    Blocking,
    Call,
    Confirm,
    Parked,
    Pause,
    Step,
    Steps,
    Written,
    call,
    cancelled_in_time,
    drive,
)
from outbox.consumers.message.tally import Tally
from outbox.consumers.message.traced import end_processing
from outbox.consumers.outcome import Outcome, Unconfirmed, of_handler
from outbox.consumers.tasks.task_record import Results
from outbox.transports.subscription import Subscription

__all__ = ["InlineEngine"]


class InlineEngine:
    """An engine that runs one attempt in its caller; see ``Services`` for its attributes."""

    is_stopping = True
    overlaps = False

    def __init__(
        self, publisher: Publisher, inbox: Inbox | None = None, results: Results | None = None
    ) -> None:
        """Create an engine whose messages publish with ``publisher``."""
        self.publisher = publisher
        self.inbox = inbox
        self.results = results
        self.surroundings = surroundings.here()
        self.tally = Tally({})

    @property
    def subscription(self) -> Subscription:
        """Not available; raises a RuntimeError."""
        raise RuntimeError("the message is settled elsewhere")

    def conclude(self, message: Message) -> Outcome:
        """Process ``message`` once, and return its outcome.

        Its consumer's timeout is not enforced here.
        """
        return _without_pause(call(_conclusion(message), self._take))

    async def conclude_async(self, message: Message) -> Outcome:
        """Process ``message`` once in this task, and return its outcome; enforces the timeout."""
        return _without_pause(await drive(_conclusion(message), self._take_async))

    def _take(self, step: Step) -> Any:
        match step:
            case Call():
                try:
                    return step.run()
                except BaseException as error:
                    raise of_handler(error)  # noqa: B904  it has a cause, or is the error itself
            case Confirm(chunk):
                return self.publisher.wait_for(chunk)
            case Blocking(function):
                return function()
            case Written(write):
                write.wait()
        return None

    async def _take_async(self, step: Step) -> Any:
        if isinstance(step, Confirm):
            return await self.publisher.wait_for_async(step.chunk)
        value = self._take(step)
        if value is None or not inspect.isawaitable(value):
            return value
        timeout = step.timeout if isinstance(step, Call) else None
        return await (value if timeout is None else cancelled_in_time(value, timeout))


def _without_pause(outcome: Outcome | Pause | Parked) -> Outcome:
    if isinstance(outcome, Pause | Parked):
        raise RuntimeError("an inline engine can't let a message wait")
    return outcome


def _conclusion(message: Message) -> Steps[Outcome]:
    result = yield from message.attempt()
    if isinstance(result, Unconfirmed):
        raise RuntimeError("an inline engine can't finish an unconfirmed message")
    outcome = yield from message.conclude(result)
    if message.processing is not None:
        end_processing(message.processing, outcome)
    return outcome
