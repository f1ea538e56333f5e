"""Dead letters and parked events: their headers, written and read.

A message that a consumer gave up on goes to the dead letters of its queue; an event that no queue
is bound for goes to the parking queue. ``docs/wire-format.md`` lists the headers.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from typing import Any

from outbox.event import Event
from outbox.header_values import MAX_HEADER_BYTES, plain_table
from outbox.messages.delivery import Delivery, dead_letter_queue
from outbox.messages.headers import (
    ATTEMPT,
    DEAD_AT,
    DEAD_CONTENT_ENCODING,
    DEAD_ERROR,
    DEAD_EXCHANGE,
    DEAD_FIRST_AT,
    DEAD_HEADERS,
    DEAD_PREFIX,
    DEAD_QUEUE,
    DEAD_REASON,
    DEAD_TARGET,
    DEAD_TRACEBACK,
    DELAY_HEADERS,
    EXPIRES_AT,
    FIRST_FAILURE,
    ORIGIN_EXCHANGE,
    ORIGIN_TARGET,
    PARKED_AT,
    PARKED_EXCHANGE,
    PARKED_PREFIX,
    PARKED_REASON,
    PARKED_TARGET,
    REPLAYED_AT,
    RETURNED,
    is_brokers_own,
)
from outbox.messages.message_copy import NotCarried, copy_of, senders_headers, writable
from outbox.messages.parked_message import Address, Kind

__all__ = [
    "PARKING_QUEUE",
    "dead_letter",
    "encoding_of",
    "fields_of",
    "is_kept_on_replay",
    "origin_headers",
    "origin_of",
    "parked",
    "renewed",
    "replay_headers",
    "restore_origin",
]

PARKING_QUEUE = "outbox.unroutable"

_LONGEST_REASON = 2_000  # characters

_ADDED: dict[Kind, str] = {"parked": PARKED_PREFIX, "dead": DEAD_PREFIX}

# A replayed dead letter starts over: it has no attempts yet.
_OF_AN_ATTEMPT = (ORIGIN_EXCHANGE, ORIGIN_TARGET, ATTEMPT, FIRST_FAILURE, RETURNED)

Header = Callable[[str], Any]
"""Returns the value of a header, or None."""


def dead_letter(
    delivery: Delivery,
    reason: str,
    *,
    attempts: int,
    first_failure: datetime.datetime | None = None,
    error: str | None = None,
    traceback: str | None = None,
) -> Event:
    """Return the event to publish to the dead letters of the message's queue.

    It keeps the message's id, body, content type and headers, except those that the broker would
    act on.

    Args:
        delivery: the message.
        reason: the reason, cut at 2,000 characters.
        attempts: the number of attempts.
        first_failure: the time when the first of them failed (aware); None for now.
        error: the class of the exception, if there was one.
        traceback: the traceback of the exception; left out if it doesn't fit.
    """
    now = datetime.datetime.now(datetime.UTC)
    added: dict[str, Any] = {
        DEAD_REASON: writable(reason[:_LONGEST_REASON]),
        DEAD_QUEUE: delivery.queue,
        DEAD_EXCHANGE: delivery.exchange,
        DEAD_TARGET: delivery.target,
        DEAD_AT: now.isoformat(),
        DEAD_FIRST_AT: (first_failure or now).isoformat(),
        ATTEMPT: attempts,
    }
    if error is not None:
        added[DEAD_ERROR] = writable(error)
    if traceback is not None:
        added[DEAD_TRACEBACK] = writable(traceback)
    if delivery.content_encoding:
        added[DEAD_CONTENT_ENCODING] = delivery.content_encoding
    own: dict[str, Any] = {}
    try:
        own = senders_headers(delivery)
    except NotCarried as why:
        added[DEAD_HEADERS] = f"dropped: {why}"
    headers = {**own, **added}
    if plain_table(headers, "headers")[1] > MAX_HEADER_BYTES:
        headers.pop(DEAD_TRACEBACK, None)
    return copy_of(delivery, dead_letter_queue(delivery.queue), headers)


def renewed(delivery: Delivery) -> Event | None:
    """Return the copy that returns a message to its queue with the broker's count at 0.

    It is delivered as the message was: with its id, body, headers, attempt, exchange and target.
    None if that can't be done: the sender's headers leave no room for outbox's, or are nested too
    deeply, or the body has an encoding, which a copy can't name.
    """
    if delivery.is_encoded:
        return None
    try:
        headers = senders_headers(delivery)
    except NotCarried:
        return None
    origin = origin_headers(Address(delivery.exchange, delivery.target))
    headers = {**headers, **origin, RETURNED: delivery.returned}
    return copy_of(delivery, delivery.queue, headers)


def parked(event: Event, reason: str) -> Event:
    """Return the event to publish to the parking queue instead of ``event``.

    It has the same id, body and headers, and headers with its address and the ``reason``.
    """
    return dataclasses.replace(
        event,
        exchange="",
        target=PARKING_QUEUE,
        headers={
            **event.headers,
            PARKED_REASON: reason,
            PARKED_EXCHANGE: event.exchange,
            PARKED_TARGET: event.target,
            PARKED_AT: datetime.datetime.now(datetime.UTC).isoformat(),
        },
    )


def fields_of(queue: str, header: Header) -> dict[str, Any] | None:
    """Return what outbox's headers say of a message in ``queue``: fields of ``ParkedMessage``.

    None if it has no such headers.
    """
    # A consumer of the parking queue may dead-letter a parked event, which then has both.
    if queue == PARKING_QUEUE:
        return _parked(header) or _dead(header)
    return _dead(header) or _parked(header)


def is_kept_on_replay(kind: Kind, name: str) -> bool:
    """Return whether a message of ``kind`` keeps the header ``name`` when it is replayed."""
    added = _ADDED.get(kind)
    return not (
        is_brokers_own(name)
        or name == EXPIRES_AT  # who replays it wants it processed
        or name == REPLAYED_AT
        or name.startswith(DELAY_HEADERS)
        or (added is not None and name.startswith(added))
        or (kind == "dead" and name in _OF_AN_ATTEMPT)
    )


def replay_headers(*, is_traced: bool) -> dict[str, str]:
    """Return the headers that a replay adds: a replayed message begins a new trace, if any."""
    now = datetime.datetime.now(datetime.UTC)
    return {REPLAYED_AT: now.isoformat()} if is_traced else {}


def encoding_of(header: Header) -> str | None:
    """Return the content encoding of the original message, if it had one."""
    return _text(header, DEAD_CONTENT_ENCODING)


def origin_headers(origin: Address) -> dict[str, str]:
    """Return the headers that hold the address a message was first published to."""
    return {ORIGIN_EXCHANGE: origin.exchange, ORIGIN_TARGET: origin.target}


def origin_of(header: Header) -> Address | None:
    """Return the address a replayed dead letter was first published to, if its headers have it."""
    exchange = _text(header, ORIGIN_EXCHANGE)
    target = _text(header, ORIGIN_TARGET)
    return None if exchange is None or target is None else Address(exchange, target)


def restore_origin(delivery: Delivery) -> None:
    """Give a dead letter that was replayed to its queue the address it was first published to."""
    if delivery.headers and not delivery.exchange and delivery.target == delivery.queue:
        origin = origin_of(delivery.headers.get)
        if origin is not None:
            delivery.exchange, delivery.target = origin


def _dead(header: Header) -> dict[str, Any] | None:
    died_in = _text(header, DEAD_QUEUE)
    if died_in is None:
        return None
    attempts = header(ATTEMPT)
    return {
        "kind": "dead",
        "died_in": died_in,
        "origin": _address(header, DEAD_EXCHANGE, DEAD_TARGET),
        "reason": _text(header, DEAD_REASON),
        "error": _text(header, DEAD_ERROR),
        "at": _text(header, DEAD_AT),
        "attempts": attempts if isinstance(attempts, int) else None,
    }


def _parked(header: Header) -> dict[str, Any] | None:
    origin = _address(header, PARKED_EXCHANGE, PARKED_TARGET)
    if origin is None:
        return None
    return {
        "kind": "parked",
        "origin": origin,
        "reason": _text(header, PARKED_REASON),
        "at": _text(header, PARKED_AT),
    }


def _text(header: Header, name: str) -> str | None:
    value = header(name)
    return value if isinstance(value, str) else None


def _address(header: Header, exchange: str, target: str) -> Address | None:
    name = _text(header, target)
    return None if name is None else Address(_text(header, exchange) or "", name)
