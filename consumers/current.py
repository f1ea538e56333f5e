"""The message that is being processed in the current context, of a thread or a task."""

from __future__ import annotations

from outbox.messages.current_message import message_here, set_message_here
from outbox.messages.received_event import ReceivedEvent

__all__ = ["current_message", "set_current_message"]


def current_message() -> ReceivedEvent | None:
    """Return the message that the calling code is processing, or None.

    Tasks inherit it, and so do threads that run in a copy of the context, such as those of
    ``asyncio.to_thread``; a bare ``threading.Thread`` does not.
    """
    return message_here()


set_current_message = set_message_here
"""Makes an event the current message until the end of this context."""
