"""Parking and dying: what the headers of parked events and dead letters say.

What no queue would have goes to a queue of its own, with its address; what a consumer could not
handle goes to its queue's dead letters. ``docs/wire-format.md`` lists the headers.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Callable
from typing import Any

from outbox.event import Event
from outbox.messages.delivery import Delivery
from outbox.messages.headers import (
    ATTEMPT,
    DELAY_HEADERS,
    FIRST_FAILURE,
    ORIGIN_EXCHANGE,
    ORIGIN_TARGET,
    is_brokers_own,
)
from outbox.messages.parked_message import Address, Kind

__all__ = ["PARKING_QUEUE", "is_kept_on_replay", "origin_of", "parked", "restore_origin", "told_of"]

PARKING_QUEUE = "outbox.unroutable"

_ADDED: dict[Kind, str] = {"parked": "outbox-parked-", "dead": "outbox-dead-"}

# A replayed dead letter begins anew.
_OF_AN_ATTEMPT = (ORIGIN_EXCHANGE, ORIGIN_TARGET, ATTEMPT, FIRST_FAILURE)

Header = Callable[[str], Any]
"""Returns the value of a header, or None."""


def parked(event: Event, reason: str) -> Event:
    """Return what is published to the parking queue in place of ``event``.

    The same id, body and headers, with its address and ``reason`` in headers of their own.
    """
    return dataclasses.replace(
        event,
        exchange="",
        target=PARKING_QUEUE,
        headers={
            **event.headers,
            "outbox-parked-reason": reason,
            "outbox-parked-exchange": event.exchange,
            "outbox-parked-target": event.target,
            "outbox-parked-at": datetime.datetime.now(datetime.UTC).isoformat(),
        },
    )


def told_of(queue: str, header: Header) -> dict[str, Any] | None:
    """Return what outbox's headers tell of a message in ``queue``: fields of ``ParkedMessage``.

    None if they tell nothing.
    """
    # What was parked may die in the hands of a consumer of the parking queue, and has both.
    if queue == PARKING_QUEUE:
        return _parked(header) or _dead(header)
    return _dead(header) or _parked(header)


def is_kept_on_replay(kind: Kind, name: str) -> bool:
    """Return whether a message of ``kind`` still has the header ``name`` when it is replayed."""
    added = _ADDED.get(kind)
    return not (
        is_brokers_own(name)
        or name.startswith(DELAY_HEADERS)
        or (added is not None and name.startswith(added))
        or (kind == "dead" and name in _OF_AN_ATTEMPT)
    )


def origin_of(header: Header) -> Address | None:
    """Return where a replayed dead letter was published to first, if its headers tell it."""
    exchange = _text(header, ORIGIN_EXCHANGE)
    target = _text(header, ORIGIN_TARGET)
    return None if exchange is None or target is None else Address(exchange, target)


def restore_origin(delivery: Delivery) -> None:
    """Give a dead letter that was replayed to its one queue the address that it had at first."""
    if delivery.headers and not delivery.exchange and delivery.target == delivery.queue:
        origin = origin_of(delivery.headers.get)
        if origin is not None:
            delivery.exchange, delivery.target = origin


def _dead(header: Header) -> dict[str, Any] | None:
    died_in = _text(header, "outbox-dead-queue")
    if died_in is None:
        return None
    attempts = header(ATTEMPT)
    return {
        "kind": "dead",
        "died_in": died_in,
        "origin": _address(header, "outbox-dead-exchange", "outbox-dead-target"),
        "reason": _text(header, "outbox-dead-reason"),
        "error": _text(header, "outbox-dead-error"),
        "at": _text(header, "outbox-dead-at"),
        "attempts": attempts if isinstance(attempts, int) else None,
    }


def _parked(header: Header) -> dict[str, Any] | None:
    origin = _address(header, "outbox-parked-exchange", "outbox-parked-target")
    if origin is None:
        return None
    return {
        "kind": "parked",
        "origin": origin,
        "reason": _text(header, "outbox-parked-reason"),
        "at": _text(header, "outbox-parked-at"),
    }


def _text(header: Header, name: str) -> str | None:
    found = header(name)
    return found if isinstance(found, str) else None


def _address(header: Header, exchange: str, target: str) -> Address | None:
    found = _text(header, target)
    return None if found is None else Address(_text(header, exchange) or "", found)
