"""The delay ladder: the queues through which a delayed event descends in RabbitMQ. No I/O.

The delay, in whole seconds, is written in binary, one header per bit. Level n has an exchange and a
queue whose messages expire after 2ⁿ seconds. The exchange of level n looks at bit n: if it is set,
the message waits in the level's queue, and from there is dead-lettered to the level below; if not,
it goes to that level at once. Below level 0, an exchange routes events that are due::

    5 s, 101   level 2 ──► queue, 4 s ──► level 1 ──► level 0 ──► queue, 1 s ──► due ──► exchange

All messages in a queue wait for the same time, because RabbitMQ expires messages only at the head
of a queue: a short delay would otherwise wait behind a long one. These are NServiceBus's delay
queues with one difference: there the bits are the first words of the routing key, which the broker
can't remove. Here the exchanges match headers, so the event keeps its routing key all the way
(``docs/decisions/0006-delays-over-rabbitmq.md``).

Below: the names, the event on the ladder, the parts that it needs, the steps that declare them.
"""

from __future__ import annotations

import dataclasses
import datetime
import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from outbox.event import Event
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.messages.headers import DELAY_EXCHANGE, DELAY_HEADERS, DELAY_UNTIL
from outbox.settings import Declare
from outbox.transports.rabbitmq import topology
from outbox.transports.rabbitmq.topology import Step

__all__ = [
    "LEVELS",
    "LONGEST_DELAY",
    "Ladder",
    "PREFIX",
    "Part",
    "bit_header",
    "delayed",
    "due_at",
    "level",
    "levels_of",
    "seconds_left",
    "steps_of",
    "way_of",
    "way_to_queue",
]

LEVELS = 28
LONGEST_DELAY = datetime.timedelta(seconds=(1 << LEVELS) - 1)
"""Eight and a half years."""

PREFIX = "outbox.delay."
"""The prefix of all names."""

DUE = f"{PREFIX}due"
"""Below level 0: a headers exchange that routes by the header with the event's exchange."""

QUEUES = f"{PREFIX}queues"
"""A substitute for the default exchange, to which no exchange can be bound."""

LOST = f"{PREFIX}lost"
"""Where the two above send messages that match no binding: to the parking queue."""

SINK = f"{PREFIX}sink"
"""Gets a copy of each event due for an exchange, and drops it. See decision 6."""

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_END_OF_TIME = 253_402_300_800_000_000  # the year 10000, in microseconds
_SECOND = datetime.timedelta(seconds=1)

_FRESH = 60.0  # seconds
_DESTINATIONS = 10_000


def level(number: int) -> str:
    """Return the name of a level's exchange and of its queue."""
    return f"{PREFIX}{number:02}"


def bit_header(number: int) -> str:
    """Return the name of the header that says whether a message waits at level ``number``."""
    return f"{DELAY_HEADERS}{number:02}"


def seconds_left(deliver_at: datetime.datetime, now: datetime.datetime) -> int:
    """Return the whole seconds until ``deliver_at``, rounded up; 0 if the event is due."""
    return max(0, math.ceil((deliver_at - now) / _SECOND))


def delayed(event: Event, seconds: int) -> Event:
    """Return the event to publish instead of ``event``, to deliver it in ``seconds``.

    Args:
        event: the event to deliver.
        seconds: the delay, 1 to 2²⁸-1.
    """
    bits = range(seconds.bit_length())
    headers = {
        **event.headers,
        **{bit_header(number): bool(seconds >> number & 1) for number in bits},
        DELAY_EXCHANGE: event.exchange,
    }
    if event.deliver_at is not None:
        headers[DELAY_UNTIL] = round(event.deliver_at.timestamp() * 1e6)
    return dataclasses.replace(event, exchange=level(bits[-1]), deliver_at=None, headers=headers)


def due_at(headers: Mapping[str, Any], number: int, now: datetime.datetime) -> datetime.datetime:
    """Return when a message in the queue of level ``number`` is due.

    Earlier versions of outbox didn't write the time. Then it is the latest at which the message may
    be due: as if it had entered the level at ``now``.
    """
    until = headers.get(DELAY_UNTIL)
    if type(until) is int and 0 <= until < _END_OF_TIME:
        return _EPOCH + datetime.timedelta(microseconds=until)
    bits = [below for below in range(number + 1) if headers.get(bit_header(below)) is True]
    return now + datetime.timedelta(seconds=sum(1 << bit for bit in bits))


class Part(NamedTuple):
    """A part of the ladder.

    Attributes:
        kind: ``base``, ``level``, ``queue`` (of a level), or a destination: ``to exchange``,
            ``to queue``.
        name: the name of the destination.
        number: the number of the level.
    """

    kind: str
    name: str = ""
    number: int = 0

    @property
    def is_destination(self) -> bool:
        """Whether the part is a binding to a queue or exchange of the application."""
        return self.kind in ("to exchange", "to queue")


def levels_of(seconds: int) -> list[int]:
    """Return the levels, highest first, at which an event delayed by ``seconds`` waits."""
    return [number for number in reversed(range(seconds.bit_length())) if seconds >> number & 1]


def way_of(exchange: str, target: str, seconds: int) -> list[Part]:
    """Return the parts that an event needs, in the order they must be declared."""
    return [
        Part("base"),
        *(Part("level", number=number) for number in range(seconds.bit_length())),
        *(Part("queue", number=number) for number in levels_of(seconds)),
        Part("to exchange", exchange) if exchange else Part("to queue", target),
    ]


class Ladder:
    """The parts that exist, as far as one connection knows. For one thread."""

    def __init__(self) -> None:
        self._there: dict[Part, None] = {}  # in the order they were declared
        self._looked_at = 0.0

    def lacks(self, way: Iterable[Part]) -> list[Part]:
        """Return the parts that aren't known to exist, in the order given."""
        return [part for part in way if part not in self._there]

    def made(self, parts: Iterable[Part], now: float) -> None:
        """Note that ``parts`` exist; ``now`` is the time of any monotonic clock."""
        if not self._there:
            self._looked_at = now
        if len(self._there) > _DESTINATIONS:  # targets may contain user data
            self.forget()
        self._there.update(dict.fromkeys(parts))

    def forget(self) -> None:
        """Forget all parts, for a new connection or because a part is missing."""
        self._there.clear()

    def parts_to_recheck(self, now: float) -> list[Part]:
        """Return all parts except destination queues once a minute, otherwise an empty list.

        A publisher notices that a part is missing only if an event enters the ladder there.
        Messages above the part wait until it exists again.
        """
        if not self._there or now - self._looked_at < _FRESH:
            return []
        self._looked_at = now
        return [part for part in self._there if part.kind != "to queue"]


def steps_of(part: Part) -> list[Step]:
    """Return the steps that declare a part."""
    match part.kind:
        case "base":
            return _base()
        case "level":
            return _level(part.number)
        case "queue":
            return _queue(part.number)
        case "to exchange":
            matching = {"x-match": "all", DELAY_EXCHANGE: part.name}
            return [_exchange_bound(DUE, part.name, matching), _bound(DUE, SINK, matching)]
    return [_bound(QUEUES, part.name, routing_key=part.name)]


def way_to_queue(queue: str, mode: Declare) -> list[Step]:
    """Return the steps that bind a consumer's queue, so that it gets its delayed messages.

    A deleted queue loses its bindings. Its consumer restores this one with the others, for the
    messages on the ladder at that time.
    """
    return [*_queues(), *steps_of(Part("to queue", queue))] if mode == "create" else []


def _base() -> list[Step]:
    return [
        *topology.parking_queue(PARKING_QUEUE, "create"),
        _exchange(LOST, "fanout"),
        _bound(LOST, PARKING_QUEUE),
        *_queues(),
        _exchange(DUE, "headers", {"alternate-exchange": LOST}),
        _exchange_bound(DUE, QUEUES, {"x-match": "all", DELAY_EXCHANGE: ""}),
        topology.durable_queue(
            SINK, {"x-queue-type": "quorum", "x-max-length": 0, "x-overflow": "drop-head"}
        ),
    ]


def _queues() -> list[Step]:
    return [_exchange(QUEUES, "direct", {"alternate-exchange": LOST})]


def _below(number: int) -> str:
    return level(number - 1) if number else DUE


def _level(number: int) -> list[Step]:
    bit_is_not_set = {"x-match": "all", bit_header(number): False}
    return [
        _exchange(level(number), "headers"),
        _exchange_bound(level(number), _below(number), bit_is_not_set),
    ]


def _queue(number: int) -> list[Step]:
    arguments = {
        "x-queue-type": "quorum",
        "x-message-ttl": 1000 << number,
        "x-dead-letter-exchange": _below(number),
        # An expired message is confirmed below before it is deleted here. Without this overflow the
        # broker would silently fall back to at-most-once (quorum queues guide).
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }
    bit_is_set = {"x-match": "all", bit_header(number): True}
    return [
        topology.durable_queue(level(number), arguments),
        _bound(level(number), level(number), bit_is_set),
    ]


def _exchange(name: str, kind: str, arguments: dict[str, Any] | None = None) -> Step:
    return lambda channel, done: channel.exchange_declare(
        name,
        kind,
        durable=True,
        arguments=arguments,
        callback=done,
    )


def _exchange_bound(source: str, name: str, matching: dict[str, Any]) -> Step:
    return lambda channel, done: channel.exchange_bind(
        name, source, arguments=matching, callback=done
    )


def _bound(
    source: str, queue: str, matching: dict[str, Any] | None = None, *, routing_key: str = ""
) -> Step:
    return lambda channel, done: channel.queue_bind(
        queue, source, routing_key, arguments=matching, callback=done
    )
