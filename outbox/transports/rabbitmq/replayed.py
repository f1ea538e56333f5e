"""What a parked message tells of itself, and what it becomes when it is replayed.

No I/O: bytes in, bytes out. ``docs/wire-format.md`` lists the headers.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from outbox.event import Event
from outbox.messages.dead_letters import (
    PARKING_QUEUE,
    encoding_of,
    fields_of,
    is_kept_on_replay,
    origin_headers,
    origin_of,
)
from outbox.messages.headers import DELAY_EXCHANGE
from outbox.messages.parked_message import Address, ParkedMessage
from outbox.transports.rabbitmq.amqp.content_header import ContentHeader
from outbox.transports.rabbitmq.pika_connection import UNREADABLE

__all__ = ["HeldMessage", "Replayed", "read", "replayed"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class HeldMessage(ParkedMessage):
    """A parked message that a channel holds.

    Attributes:
        header: as it came, or None where that makes no sense.
        readable: whether the driver could read its properties: what comes back from the broker
            is told apart by them.
        tag: its number on the channel that holds it.
    """

    header: ContentHeader | None
    readable: bool
    tag: int


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class Replayed(Event):
    """What is published in place of a parked message.

    Attributes:
        message: the parked one.
        header: its properties and headers as they are to be written.
    """

    message: ParkedMessage
    header: ContentHeader


def read(
    queue: str, header: ContentHeader | None, body: bytes, tag: int, *, readable: bool
) -> HeldMessage:
    """Return the message that was found in ``queue``."""
    header_or_empty = header or ContentHeader()
    fields = (
        fields_of(queue, header_or_empty.header)
        or _lost_on_the_ladder(queue, header_or_empty)
        or _dead_by_broker(header_or_empty)
    )
    returns = header_or_empty.header("x-delivery-count")
    return HeldMessage(
        queue=queue,
        id=header_or_empty.text("message_id") or "",
        body=body,
        content_type=header_or_empty.text("content_type"),
        returns=returns if isinstance(returns, int) else 0,
        header=header,
        readable=readable,
        tag=tag,
        **(fields or {"kind": "foreign"}),
    )


def replayed(message: ParkedMessage, *, to_origin: bool = False) -> Replayed | str:
    """Return what is published when ``message`` is replayed, or why it cannot be.

    The same id, body, properties and headers, byte for byte, but for: what parking or dying has
    added; what the broker has written, or would act on; ``type``, where parking has changed it;
    and the delivery mode, which is always persistent. A dead letter that goes back to one queue
    says in headers where it was published to first.
    """
    destination = message.destination(to_origin=to_origin)
    if isinstance(destination, str):
        return destination
    if not isinstance(message, HeldMessage) or message.header is None or not message.readable:
        return "its properties cannot be read"
    event_id = message.header.properties.get("message_id", b"\0")[1:]
    if event_id != message.id.encode():
        return "its id is not UTF-8"
    if any(len(part.encode()) > 255 for part in (*destination, *(message.origin or ()))):
        return "its address is longer than 255 bytes"
    header = message.header.without(lambda name: not is_kept_on_replay(message.kind, name))
    if message.kind == "dead":
        encoding = encoding_of(message.header.header)
        if encoding not in (None, UNREADABLE) and len(encoding.encode()) <= 255:
            header = header.with_text(content_encoding=encoding)
        if message.origin is not None and message.origin != destination:
            header = header.with_headers(origin_headers(message.origin).items())
    if message.header.text("type") == message.queue and message.origin is not None:
        # What outbox publishes has its routing key for a type: here it became the queue's name.
        header = header.with_text(type=message.origin.target)
    return Replayed(
        id=message.id,
        exchange=destination.exchange,
        target=destination.target,
        body=message.body,
        unroutable="fail",
        message=message,
        header=header.persistent(),
    )


def _lost_on_the_ladder(queue: str, header: ContentHeader) -> dict[str, Any] | None:
    """Return what is known of a delayed event that the broker has parked by itself."""
    exchange, target = header.header(DELAY_EXCHANGE), header.text("type")
    if queue != PARKING_QUEUE or not isinstance(exchange, str) or target is None:
        return None
    at: datetime.datetime | None = None
    match header.header("x-death"):
        case [{"time": datetime.datetime() as died_at}, *_]:
            at = died_at
    return {
        "kind": "parked",
        "origin": Address(exchange, target),
        "reason": "when its time came there was no such queue",
        "at": None if at is None else at.isoformat(),
        "attempts": None,
    }


def _dead_by_broker(header: ContentHeader) -> dict[str, Any] | None:
    """Return what RabbitMQ's own header tells; its newest entry is the first (DLX guide)."""
    match header.header("x-death"):
        case [{"queue": str(queue)} as death, *_]:
            pass
        case _:
            return None
    exchange, reason, at = death.get("exchange"), death.get("reason"), death.get("time")
    origin = origin_of(header.header)
    match death.get("routing-keys"):
        case [str(target), *_] if origin is None and isinstance(exchange, str):
            # What was delayed came to its queue by way of the ladder.
            delayed_to = header.header(DELAY_EXCHANGE)
            origin = Address(delayed_to if isinstance(delayed_to, str) else exchange, target)
    count = death.get("count")
    return {
        "kind": "dead",
        "died_in": queue,
        "origin": origin,
        "reason": f"the broker gave it up: {reason}",
        "at": at.isoformat() if hasattr(at, "isoformat") else None,
        "attempts": count if isinstance(count, int) else None,
    }
