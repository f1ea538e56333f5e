"""Reads from a broker's reply what it says about an address. No I/O.

The texts are those of RabbitMQ 3.10 to 4.3. It cuts them at 255 bytes, so a long name may be
missing; then a reply says nothing here, and the event must be found in another way.
"""

from __future__ import annotations

import enum

from outbox.event import Event
from outbox.transports.rabbitmq.pika_errors import one_line

__all__ = ["ACCESS_REFUSED", "NOT_FOUND", "Complaint", "complaint_about", "is_quoted_whole"]

ACCESS_REFUSED = 403
NOT_FOUND = 404

_LONGEST_TEXT = 255
_AROUND_NAME = 120  # bytes that the broker's longest sentence about an exchange has besides


class Complaint(enum.Enum):
    """What the broker may say about the address of an event."""

    MISSING = "the exchange doesn't exist"
    FORBIDDEN = "the user may not publish to the exchange"
    FORBIDDEN_TOPIC = "the user may not publish with this routing key to the exchange"
    INTERNAL = "no client may publish to the exchange"


def complaint_about(event: Event, code: int, text: str) -> Complaint | None:
    """Return what a reply says about the address of ``event``; None if it says nothing about it.

    Args:
        event: the event that was sent.
        code: the reply code.
        text: the reply text, in one line.
    """
    exchange = f"exchange '{one_line(event.exchange) or 'amq.default'}' in vhost"
    if code == NOT_FOUND and f"no {exchange}" in text:
        return Complaint.MISSING
    if code == ACCESS_REFUSED:
        if f"access to {exchange}" in text:
            return Complaint.FORBIDDEN
        if f"access to topic '{one_line(event.target)}' in {exchange}" in text:
            return Complaint.FORBIDDEN_TOPIC
        if f"internal {exchange}" in text:
            return Complaint.INTERNAL
    return None


def is_quoted_whole(name: str) -> bool:
    """Return whether any broker can complain about the exchange ``name``.

    RabbitMQ 4.3 cuts a text inside a character, can't encode it then, and ends the connection (541)
    instead of the channel.
    """
    return name.isascii() or len(name.encode()) + _AROUND_NAME <= _LONGEST_TEXT
