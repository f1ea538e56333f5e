"""Copies of messages: for the dead letters, or for the same queue.

Any client may have sent the message, so its values are made writable first.
"""

from __future__ import annotations

import datetime
from typing import Any

from outbox.errors import InvalidEvent
from outbox.event import Event
from outbox.header_values import MAX_HEADER_BYTES, plain_table
from outbox.messages.delivery import Delivery
from outbox.messages.headers import (
    HEADER_FORMAT,
    HEADER_OCCURRED_AT,
    RETURNED,
    is_brokers_own,
)
from outbox.serializer import JSONSerializer

__all__ = ["NotCarried", "copy_of", "senders_headers", "writable"]


class NotCarried(Exception):
    """The sender's headers can't be copied; the text is the reason."""


def copy_of(
    delivery: Delivery,
    queue: str,
    headers: dict[str, Any],
    *,
    deliver_at: datetime.datetime | None = None,
) -> Event:
    """Return the event that copies the message to ``queue``, through the default exchange.

    It keeps the message's id, body, content type, priority and time.

    Args:
        delivery: the message.
        queue: the name of the queue.
        headers: all headers of the copy.
        deliver_at: the earliest time of its delivery (aware).
    """
    return Event(
        id=_short(delivery.id_or_new),
        target=queue,
        exchange="",
        body=delivery.body,
        content_type=_short(delivery.content_type or JSONSerializer.content_type),  # as decode()
        headers=headers,
        priority=delivery.priority,
        deliver_at=deliver_at,
        occurred_at=delivery.occurred_at,
        unroutable="fail",
    )


def senders_headers(delivery: Delivery) -> dict[str, Any]:
    """Return the headers to copy: all but the broker's, and the count of a delivery's past.

    Raises:
        NotCarried: they leave no room for ours, or are nested too deeply.
    """
    headers = delivery.headers or {}
    try:
        own = {name: _carried(value) for name, value in headers.items() if _is_senders(name)}
        size = plain_table(own, "headers")[1]
    except (InvalidEvent, RecursionError):
        raise NotCarried("they are nested too deeply") from None
    if size > MAX_HEADER_BYTES:
        raise NotCarried("with these there was no room for them")
    return own


def writable(text: str) -> str:
    """Return ``text`` with everything replaced that UTF-8 can't encode."""
    return text.encode(errors="replace").decode()


def _short(text: str) -> str:
    """Return as much of ``text`` as fits into a short string; replaced bytes made it longer."""
    return text.encode()[:255].decode(errors="ignore")


def _carried(value: Any) -> Any:
    """Return a header's value in a type that can be written again, whatever its sender used."""
    match value:
        case None | bool() | bytes() | float():
            return value
        case int():
            return int(value) if -(1 << 63) <= value < 1 << 63 else str(value)
        case str():
            return writable(value)
        case list():
            return [_carried(item) for item in value]
        case dict():
            return {
                writable(name): _carried(item)
                for name, item in value.items()
                if isinstance(name, str)
            }
        case datetime.datetime():
            return value.isoformat()
    return writable(str(value))


def _is_senders(name: Any) -> bool:
    return (
        isinstance(name, str)
        and not is_brokers_own(name)
        and name not in (HEADER_FORMAT, HEADER_OCCURRED_AT, RETURNED)
    )
