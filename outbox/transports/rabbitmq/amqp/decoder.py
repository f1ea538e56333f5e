"""Decodes deliveries directly from bytes, at tens of thousands a second.

pika creates three frame objects and a properties object for each delivery, and looks up callbacks
for each of them; here a delivery is decoded in one pass (AMQP 0-9-1, sections 2.3.5, 4.2 and 1.8).
Unusual cases are left to pika: a body of several frames, frames of other channels in between, and
anything malformed.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

from outbox.messages.delivery import Delivery
from outbox.transports.rabbitmq.amqp.field_table import read as read_table

__all__ = ["BASIC_ACK", "BASIC_DELIVER", "LEAVE", "WAIT", "delivery_at", "headers_in"]

BASIC_ACK = 60 << 16 | 80
BASIC_DELIVER = 60 << 16 | 60
"""Class and method as one number, the start of a method frame's payload."""

WAIT = 0
"""The delivery is incomplete so far."""
LEAVE = -1
"""The delivery is left to pika."""

_WORTH_WAITING = 64 * 1024  # bytes; pika assembles a larger body frame by frame

_HEADER, _BODY, _END = 2, 3, 0xCE
_tag_and_size = struct.Struct(">QBB").unpack_from  # tag, redelivered, size of the exchange's name
_header = struct.Struct(">BHIHHQH").unpack_from
_HEADER_SIZE = 21
_start = struct.Struct(">BHI").unpack_from
_PROPERTIES = 14  # class, weight, size of the body, flags: the properties follow
_flags = struct.Struct(">H").unpack_from
_timestamp = struct.Struct(">Q").unpack_from


def delivery_at(
    buffer: bytes, offset: int, generation: int, queues: Mapping[bytes, str]
) -> tuple[int, Delivery | None]:
    """Return the delivery whose Basic.Deliver frame begins at ``offset``, and where it ends.

    Args:
        buffer: received bytes, with the complete Basic.Deliver frame.
        offset: the offset of that frame.
        generation: the generation of the channel.
        queues: the queues by consumer tag.

    Returns:
        The offset after the delivery, and the delivery; or WAIT or LEAVE, and None.
    """
    try:
        return _delivery_at(buffer, offset, generation, queues)
    except Exception:  # malformed in some way, which pika will report
        return LEAVE, None


def _delivery_at(
    buffer: bytes, offset: int, generation: int, queues: Mapping[bytes, str]
) -> tuple[int, Delivery | None]:
    at = offset + 11
    end = at + 1 + buffer[at]
    queue = queues.get(buffer[at + 1 : end])
    if queue is None:
        return LEAVE, None
    tag, redelivered, size = _tag_and_size(buffer, end)
    at = end + 10
    end = at + size
    exchange = buffer[at:end].decode()
    at = end + 1
    end = at + buffer[end]
    target = buffer[at:end].decode()
    if buffer[end] != _END:
        return LEAVE, None

    at = end + 1
    available = len(buffer) - at
    if available < _HEADER_SIZE:
        return WAIT, None
    kind, channel, size, _class, _weight, body_size, flags = _header(buffer, at)
    if kind != _HEADER or buffer[offset + 1 : offset + 3] != buffer[at + 1 : at + 3]:
        return LEAVE, None
    header_end = at + size + 8
    body_end = header_end + (body_size + 8 if body_size else 0)
    if body_end > len(buffer):
        return (WAIT if body_size <= _WORTH_WAITING else LEAVE), None
    if buffer[header_end - 1] != _END:
        return LEAVE, None
    body = b""
    if body_size:
        if _start(buffer, header_end) != (_BODY, channel, body_size):
            return LEAVE, None
        body = buffer[header_end + 7 : body_end - 1]
        if buffer[body_end - 1] != _END:
            return LEAVE, None

    at += _HEADER_SIZE
    content_type = content_encoding = message_id = headers = priority = timestamp = None
    if flags & 1:  # more flags follow; the class Basic has none
        return LEAVE, None
    if flags & 0x8000:
        end = at + 1 + buffer[at]
        content_type = buffer[at + 1 : end].decode()
        at = end
    if flags & 0x4000:
        end = at + 1 + buffer[at]
        content_encoding = buffer[at + 1 : end].decode()
        at = end
    if flags & 0x2000:
        headers, at = read_table(buffer, at)
    if flags & 0x1000:  # delivery mode
        at += 1
    if flags & 0x0800:
        priority = buffer[at]
        at += 1
    if flags & 0x0700:  # correlation id, reply to, expiration
        for flag in (0x0400, 0x0200, 0x0100):
            if flags & flag:
                at += 1 + buffer[at]
    if flags & 0x0080:
        end = at + 1 + buffer[at]
        message_id = buffer[at + 1 : end].decode()
        at = end
    if flags & 0x0040:
        [timestamp] = _timestamp(buffer, at)
        at += 8
    for flag in (0x0020, 0x0010, 0x0008, 0x0004):  # type, user, application, cluster
        if flags & flag:
            at += 1 + buffer[at]
    if at != header_end - 1:
        return LEAVE, None
    return body_end, Delivery(
        queue,
        tag,
        generation,
        bool(redelivered & 1),
        exchange,
        target,
        body,
        content_type,
        content_encoding,
        headers,
        message_id,
        priority,
        timestamp,
    )


def headers_in(payload: bytes) -> dict[str, Any]:
    """Return the headers in the payload of a header frame, which has some.

    Raises:
        Exception: it is malformed, or nested too deeply.
    """
    at = _PROPERTIES
    [flags] = _flags(payload, at - 2)
    for flag in (0x8000, 0x4000):  # content type, content encoding
        if flags & flag:
            at += 1 + payload[at]
    return read_table(payload, at)[0]
