"""A message that an engine has begun, and the steps that are left of it."""

from __future__ import annotations

from contextvars import Context
from dataclasses import dataclass

from outbox.consumers.message.message import Message
from outbox.consumers.message.steps import Steps
from outbox.consumers.outcome import Outcome, Unconfirmed

__all__ = ["Life"]


@dataclass(eq=False)
class Life:
    """A message that was begun; one thread or task at a time works on it.

    Attributes:
        message: the message.
        steps: the steps to take next.
        context: the context to take them in.
        keeps_context: whether it goes on in the same context after a pause.
        is_after_timeout: whether it ends a message whose handler is late, and goes on.
        has_failed_to_open: whether its queue was closed, and stayed so although it probed.
        is_alone: whether its own pauses no longer close its queue, see ``Pen``.
    """

    message: Message
    steps: Steps[Outcome | Unconfirmed | None]
    context: Context

    # On the class, not fields: only the few lives that wait change them.
    keeps_context = False
    is_after_timeout = False
    has_failed_to_open = False
    is_alone = False
