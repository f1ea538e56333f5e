"""The message that is being processed in the current context, of a thread or a task."""

from __future__ import annotations

from contextvars import ContextVar

from outbox.messages.received_event import ReceivedEvent

__all__ = ["message_here", "set_message_here"]

_current: ContextVar[ReceivedEvent | None] = ContextVar("outbox_message", default=None)

message_here = _current.get
"""Returns the message, or None."""
set_message_here = _current.set
"""Makes an event the current message until the end of this context."""
