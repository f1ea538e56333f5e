"""Encodes events as AMQP 0-9-1 frames, once, in the caller's thread.

``docs/wire-format.md`` defines the content, AMQP 0-9-1 sections 2.3.5 and 4.2 the encoding. A
message is three frames: Basic.Publish, content header, body; a large body takes several. All bytes
before the body are the same for one address, except a few numbers and the id, so they are one
``struct.pack`` with a template.
"""

from __future__ import annotations

import struct
from collections.abc import Callable

from outbox.event import Event, Headers
from outbox.messages.headers import (
    FORMAT_VERSION,
    HEADER_FORMAT,
    HEADER_KEY,
    HEADER_OCCURRED_AT,
    TASK,
)
from outbox.transports.rabbitmq.amqp.field_table import encode_entry, short_string

__all__ = ["PUBLISH_CHANNEL", "Encoder", "on_channel"]

PUBLISH_CHANNEL = 1
"""Frames carry their channel's number; events are always published on this one."""

_FRAME_END = b"\xce"
_FRAME_OVERHEAD = 8  # type, channel and size before the payload, the end mark after it
_METHOD, _HEADER, _BODY = 1, 2, 3

_CONTENT_TYPE, _HEADERS, _DELIVERY_MODE, _PRIORITY = 1 << 15, 1 << 13, 1 << 12, 1 << 11
_MESSAGE_ID, _TIMESTAMP, _TYPE, _APP_ID = 1 << 7, 1 << 6, 1 << 5, 1 << 3

_BASIC_PUBLISH = struct.pack(">HHH", 60, 40, 0)  # class, method, a reserved number
_MANDATORY = b"\x01"  # and not immediate
_PERSISTENT = b"\x02"
_TEMPLATES = 1024
_ONLY_TEXT = frozenset((str,))  # other equal values may have several encodings: 1 and True

_FRAME_START = struct.Struct(">BHI")
_frame_start = _FRAME_START.pack
_unsigned = struct.Struct(">I").pack

_Template = Callable[[int, int, bytes, int, int], bytes]
_Layout = tuple[str, str, str, int | None, int]


def on_channel(number: int, frames: bytes) -> bytes:
    """Return encoded ``frames`` for the channel ``number`` in place of the publishing channel."""
    moved = bytearray(frames)
    offset = 0
    while offset < len(moved):
        kind, _channel, size = _FRAME_START.unpack_from(moved, offset)
        _FRAME_START.pack_into(moved, offset, kind, number, size)
        offset += size + _FRAME_OVERHEAD
    return bytes(moved)


class Encoder:
    """Encodes events for one publisher. Thread-safe.

    Attributes:
        frame_max: the size of the largest frame in bytes, with its overhead; the smallest one
            negotiated so far (Connection.Tune) once that is known.
        limited: whether ``frame_max`` has become smaller, so that what was encoded before, or is
            being encoded in another thread meanwhile, may hold larger frames.
    """

    def __init__(self, app_id: str = "", frame_max: int = 131_072) -> None:
        self.frame_max = frame_max
        self.limited = False
        self._app_id = short_string(app_id) if app_id else b""
        self._templates: dict[_Layout, _Template] = {}
        self._latest: tuple[_Layout, Headers, _Template, int] | None = None

    def limit_frames(self, frame_max: int) -> None:
        """Encode no larger frames than a connection with ``frame_max`` takes, from now on."""
        if frame_max < self.frame_max:
            self.frame_max = frame_max
            self.limited = True

    def encode(self, event: Event) -> bytes:
        """Return the frames of ``event``, joined; empty if its properties don't fit into a frame.

        The broker would close the connection because of a larger one.
        """
        event_id = event.id.encode()
        layout = event.exchange, event.target, event.content_type, event.priority, len(event_id)
        if event.headers or event.key is not None:
            template, size_of_header = self._template_with_headers(layout, event)
            if size_of_header > self.frame_max:
                return b""
        else:
            cached = self._templates.get(layout)
            if cached is None:
                if len(self._templates) >= _TEMPLATES:  # targets may contain user data
                    self._templates.clear()
                cached = self._templates[layout] = self._template(event, len(event_id))[0]
            template = cached
        seconds = event.occurred_at.timestamp()
        body = event.body
        size = len(body)
        head = template(size, round(seconds * 1e6), event_id, int(seconds), size)
        if 0 < size <= self.frame_max - _FRAME_OVERHEAD:
            return head + body + _FRAME_END
        return head[: -_FRAME_OVERHEAD + 1] + self._body_frames(body)

    def frames(self, exchange: str, target: str, header: bytes, body: bytes) -> bytes:
        """Return the frames of a message, joined; ``header`` is the payload of its header frame."""
        method = _BASIC_PUBLISH + short_string(exchange) + short_string(target) + _MANDATORY
        return b"".join(
            (
                _frame_start(_METHOD, PUBLISH_CHANNEL, len(method)),
                method,
                _FRAME_END,
                _frame_start(_HEADER, PUBLISH_CHANNEL, len(header)),
                header,
                _FRAME_END,
                self._body_frames(body),
            )
        )

    def _body_frames(self, body: bytes) -> bytes:
        limit = self.frame_max - _FRAME_OVERHEAD
        pieces: list[bytes] = []
        for start in range(0, len(body), limit):
            piece = body[start : start + limit]
            pieces += (_frame_start(_BODY, PUBLISH_CHANNEL, len(piece)), piece, _FRAME_END)
        return b"".join(pieces)

    def _template_with_headers(self, layout: _Layout, event: Event) -> tuple[_Template, int]:
        """Return what :meth:`_template` does; of a request, many events have the same headers."""
        headers, latest = event.headers, self._latest
        if (
            latest is not None
            and event.key is None
            and layout == latest[0]
            and headers == latest[1]
            and _ONLY_TEXT.issuperset(map(type, headers.values()))
        ):
            return latest[2], latest[3]
        template, size = self._template(event, layout[-1])
        if event.key is None:
            self._latest = layout, {**headers}, template, size
        return template, size

    def _template(self, event: Event, id_size: int) -> tuple[_Template, int]:
        """Return a template, and the size of its content header frame in bytes.

        The template packs (body size, occurred at in µs, id, timestamp in s, body size).
        """
        target = short_string(event.target)
        method = _BASIC_PUBLISH + short_string(event.exchange) + target + _MANDATORY
        table = encode_entry(HEADER_FORMAT, FORMAT_VERSION)
        if event.headers:
            table += b"".join(encode_entry(*item) for item in event.headers.items())
        if event.key is not None:
            table += encode_entry(HEADER_KEY, event.key)
        table += short_string(HEADER_OCCURRED_AT) + b"l"

        flags = _CONTENT_TYPE | _HEADERS | _DELIVERY_MODE | _MESSAGE_ID | _TIMESTAMP | _TYPE
        flags |= _PRIORITY if event.priority is not None else 0
        flags |= _APP_ID if self._app_id else 0
        before_table = struct.pack(">H", flags) + short_string(event.content_type)
        before_table += _unsigned(len(table) + 8) + table
        before_id = _PERSISTENT
        if event.priority is not None:
            before_id += bytes([event.priority])
        before_id += bytes([id_size])
        # A task's type is what it calls. Copies of others' messages may have anything there.
        task = event.headers.get(TASK)
        is_name = isinstance(task, str) and 0 < len(task.encode()) <= 255
        after = (short_string(str(task)) if is_name else target) + self._app_id

        header_size = 12 + len(before_table) + 8 + len(before_id) + id_size + 8 + len(after)
        start = (
            _frame_start(_METHOD, PUBLISH_CHANNEL, len(method))
            + method
            + _FRAME_END
            + _frame_start(_HEADER, PUBLISH_CHANNEL, header_size)
            + struct.pack(">HH", 60, 0)
        )
        end = after + _FRAME_END + struct.pack(">BH", _BODY, PUBLISH_CHANNEL)
        pack = struct.Struct(
            f">{len(start)}sQ{len(before_table)}sq{len(before_id)}s{id_size}sQ{len(end)}sI"
        ).pack

        def template(
            size: int, occurred_at: int, event_id: bytes, timestamp: int, body_size: int
        ) -> bytes:
            return pack(
                start,
                size,
                before_table,
                occurred_at,
                before_id,
                event_id,
                timestamp,
                end,
                body_size,
            )

        return template, header_size + _FRAME_OVERHEAD
