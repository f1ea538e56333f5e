"""Reads parked messages, and makes the events that replay them.

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
    replay_headers,
)
from outbox.messages.delivery import Delivery
from outbox.messages.headers import DELAY_EXCHANGE, TRACEPARENT
from outbox.messages.parked_message import Address, ParkedMessage
from outbox.transports.rabbitmq.amqp.content_header import ContentHeader
from outbox.transports.rabbitmq.pika_connection import UNREADABLE

__all__ = ["HeldMessage", "Replayed", "read", "replayed"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class HeldMessage(ParkedMessage):
    """A parked message that a channel holds.

    Attributes:
        header: the content header as received, or None if it is malformed.
        readable: whether pika could read its properties. The broker's returns are identified by
            them, so an unreadable message can't be replayed.
        tag: its delivery tag on the channel that holds it.
        delivery: the same message as a worker would get it; None unless a browser has read it.
    """

    header: ContentHeader | None
    readable: bool
    tag: int
    delivery: Delivery | None = None


@dataclass(frozen=True, slots=True, repr=False, eq=False, kw_only=True)
class Replayed(Event):
    """The event that replays a parked message.

    Attributes:
        message: the parked message.
        header: the properties and headers to write.
    """

    message: ParkedMessage
    header: ContentHeader


def read(
    queue: str,
    header: ContentHeader | None,
    body: bytes,
    tag: int,
    *,
    readable: bool,
    delivery: Delivery | None = None,
) -> HeldMessage:
    """Return a message that was delivered from ``queue``."""
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
        delivery=delivery,
        **(fields or {"kind": "foreign"}),
    )


def replayed(message: ParkedMessage, *, to_origin: bool = False) -> Replayed | str:
    """Return the event to publish for a replay of ``message``, or why it can't be replayed.

    It has the same id, body, properties and headers, byte for byte, except: the headers of parking
    or dead-lettering; headers that the broker wrote or would act on; ``type``, if parking changed
    it; and the delivery mode, which is always persistent. A dead letter that goes back to a single
    queue has its original address in headers, and a message with a trace the time of the replay.
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
    is_traced = header.header(TRACEPARENT) is not None
    header = header.with_headers(replay_headers(is_traced=is_traced).items())
    if message.kind == "dead":
        encoding = encoding_of(message.header.header)
        if encoding not in (None, UNREADABLE) and len(encoding.encode()) <= 255:
            header = header.with_text(content_encoding=encoding)
        if message.origin is not None and message.origin != destination:
            header = header.with_headers(origin_headers(message.origin).items())
    if message.header.text("type") == message.queue and message.origin is not None:
        # outbox sets the type to the routing key, which parking changed to the queue's name.
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
    """Return the fields of a delayed event that the ladder itself has parked."""
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
        "reason": "its queue did not exist when it was due",
        "at": None if at is None else at.isoformat(),
        "attempts": None,
    }


def _dead_by_broker(header: ContentHeader) -> dict[str, Any] | None:
    """Return the fields from the header x-death, whose first entry is the newest (DLX guide)."""
    match header.header("x-death"):
        case [{"queue": str(queue)} as death, *_]:
            pass
        case _:
            return None
    exchange, reason, at = death.get("exchange"), death.get("reason"), death.get("time")
    origin = origin_of(header.header)
    match death.get("routing-keys"):
        case [str(target), *_] if origin is None and isinstance(exchange, str):
            # A delayed event entered its queue from the ladder, not from its exchange.
            delayed_to = header.header(DELAY_EXCHANGE)
            origin = Address(delayed_to if isinstance(delayed_to, str) else exchange, target)
    count = death.get("count")
    return {
        "kind": "dead",
        "died_in": queue,
        "origin": origin,
        "reason": f"dead-lettered by the broker: {reason}",
        "at": at.isoformat() if hasattr(at, "isoformat") else None,
        "attempts": count if isinstance(count, int) else None,
    }
