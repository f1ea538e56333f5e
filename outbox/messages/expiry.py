"""Events that expire: the instant from which no consumer begins them.

It travels in a header, which every copy of the event keeps. AMQP's own ``expiration`` would do
something else: RabbitMQ moves what expires in a consumer's queue to the dead letters, and a delayed
event would arrive early.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from typing import Any

from outbox.errors import InvalidEvent
from outbox.event import Event
from outbox.messages.headers import EXPIRES_AT

__all__ = ["expires_at", "has_expired", "headers_with_expiry"]

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)


def headers_with_expiry(event: Event, ttl: float | datetime.timedelta) -> dict[str, Any]:
    """Return the headers of ``event`` with the end of its time to live.

    That begins when the event is enqueued, or when it may be delivered if that is later.

    Args:
        event: the event.
        ttl: seconds or a timedelta, more than 0.

    Raises:
        InvalidEvent: it isn't that, or ends after the year 9999.
    """
    begin = max(event.occurred_at, event.deliver_at or event.occurred_at)
    try:
        if isinstance(ttl, bool):
            raise TypeError("bool")
        span = ttl if isinstance(ttl, datetime.timedelta) else datetime.timedelta(seconds=ttl)
        if span <= datetime.timedelta():
            raise ValueError("not more than 0")
        end = begin + span
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidEvent(
            f"ttl={ttl!r} is invalid; pass seconds (more than 0) or a timedelta"
        ) from error
    return {**event.headers, EXPIRES_AT: (end - _EPOCH) // _MICROSECOND}


def has_expired(headers: Mapping[str, Any]) -> bool:
    """Return whether a message with these headers has expired, by this machine's clock."""
    moment = headers.get(EXPIRES_AT)
    return isinstance(moment, int) and moment <= time.time() * 1e6


def expires_at(headers: Mapping[str, Any]) -> datetime.datetime | None:
    """Return the instant from which a message is dropped (aware), or None."""
    moment = headers.get(EXPIRES_AT)
    if not isinstance(moment, int):
        return None
    try:
        return _EPOCH + datetime.timedelta(microseconds=moment)
    except OverflowError:
        return None
