"""The message that is being processed here: of this thread's context, or task's."""

from __future__ import annotations

from contextvars import ContextVar

from outbox.consumers.received_event import ReceivedEvent

__all__ = ["current_message", "set_current_message"]

_current: ContextVar[ReceivedEvent | None] = ContextVar("outbox_message", default=None)


def current_message() -> ReceivedEvent | None:
    """Return the message whose ``process`` this is part of, or None.

    Tasks know it, and so do threads that were given a copy of the context, as those of
    ``asyncio.to_thread`` are; a bare ``threading.Thread`` does not.
    """
    return _current.get()


set_current_message = _current.set
"""Makes an event the current message until the end of this context."""
