"""Delays over RabbitMQ: how an event is written that is to be delivered later. No I/O.

The delay, in whole seconds, is written in binary, a header a bit. Level n has an exchange and a
queue whose messages die after 2ⁿ seconds. The exchange of level n looks at bit n: where it is set
the message waits in the level's queue and dies into the level below, otherwise it goes there at
once. Below level 0 is the exchange that hands out what is due::

    5 s, 101   level 2 ──► queue, 4 s ──► level 1 ──► level 0 ──► queue, 1 s ──► due ──► exchange

All messages of a queue wait equally long: none ever waits behind one of a longer delay. These are
NServiceBus' delay queues, but for one thing: there the bits are the first words of the routing key,
which the broker cannot take off again. Here the exchanges match headers, and the routing key is the
event's own from the first exchange to the last (``docs/decisions/0006-delays-over-rabbitmq.md``).
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Mapping
from typing import Any

from outbox.event import Event
from outbox.headers import DELAY_EXCHANGE, DELAY_HEADERS
from outbox.subscription import Delivery

__all__ = [
    "LEVELS",
    "LONGEST_DELAY",
    "bit_header",
    "delayed",
    "level",
    "levels_of",
    "restore_delayed",
    "seconds_left",
]

LEVELS = 28
LONGEST_DELAY = datetime.timedelta(seconds=(1 << LEVELS) - 1)
"""Eight and a half years."""

_SECOND = datetime.timedelta(seconds=1)
_RECORD = ("x-death", "x-first-death-", "x-last-death-")


def level(number: int) -> str:
    """Return the name of a level's exchange, and of its queue."""
    return f"outbox.delay.{number:02}"


def bit_header(number: int) -> str:
    """Return the name of the header that says whether a message waits at level ``number``."""
    return f"{DELAY_HEADERS}{number:02}"


def seconds_left(deliver_at: datetime.datetime, now: datetime.datetime) -> int:
    """Return the whole seconds until ``deliver_at``, rounded up; 0 when the time has come."""
    return max(0, math.ceil((deliver_at - now) / _SECOND))


def levels_of(seconds: int) -> list[int]:
    """Return the levels at which an event waits that is delayed for so long, from the top."""
    return [number for number in reversed(range(seconds.bit_length())) if seconds >> number & 1]


def delayed(event: Event, seconds: int) -> Event:
    """Return what is published in the place of ``event``, for it to come in so many seconds.

    Args:
        event: as it is to be delivered.
        seconds: 1 to 2²⁸-1.
    """
    bits = range(seconds.bit_length())
    return dataclasses.replace(
        event,
        exchange=level(bits[-1]),
        deliver_at=None,
        headers={
            **event.headers,
            **{bit_header(number): bool(seconds >> number & 1) for number in bits},
            DELAY_EXCHANGE: event.exchange,
        },
    )


def restore_delayed(delivery: Delivery) -> None:
    """Give a message that was delayed its exchange, and take off what the delay has added.

    That is our headers and the broker's record of the queues it has died in on its way: nobody
    has given it up, and sent back some brokers believe it (RabbitMQ 4.0 release notes, x-death).
    """
    headers: Mapping[str, Any] | None = delivery.headers
    if headers and isinstance(exchange := headers.get(DELAY_EXCHANGE), str):
        delivery.exchange = exchange
        delivery.headers = {
            name: value
            for name, value in headers.items()
            if not name.startswith((DELAY_HEADERS, *_RECORD))
        }
