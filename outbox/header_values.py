"""Header tables: which names and values an event may carry, and how they are normalized."""

from __future__ import annotations

import datetime
import decimal
import enum
import uuid
from collections.abc import Mapping
from typing import Any

from outbox.errors import InvalidEvent
from outbox.messages.headers import KEEP_RESULT, TASK

__all__ = [
    "MAX_HEADER_BYTES",
    "MAX_HEADER_DEPTH",
    "CheckedHeaders",
    "check_address",
    "check_name",
    "plain_table",
]

MAX_HEADER_BYTES = 120_000
"""The maximum encoded size of an event's headers: a content header is one frame (AMQP 0-9-1,
section 4.2.6.1), and RabbitMQ's frames have 131,072 bytes by default."""
MAX_HEADER_DEPTH = 32
"""The maximum nesting of lists and dicts in headers; AMQP decoders recurse, and give up."""
# RabbitMQ acts on these when a publisher sends them: sender-selected distribution routes a copy of
# the message, the others control dead-lettering, delays and stream filters.
_INTERPRETED = frozenset(
    (
        "CC",
        "BCC",
        "x-death",
        "x-delay",
        "x-match",
        "x-delivery-count",
        "x-acquired-count",
        "x-received-from",
        "x-deduplication-header",
    )
)
_INTERPRETED_PREFIXES = ("outbox-", "x-first-death-", "x-last-death-", "x-opt-", "x-stream-")


class CheckedHeaders(dict[str, Any]):
    """Headers that were checked once, for many events. Never changed.

    Attributes:
        size: the bytes that they take in AMQP.
    """

    __slots__ = ("size",)

    def __init__(self, headers: Mapping[str, Any]) -> None:
        """Check ``headers``.

        Raises:
            InvalidEvent: one can't be carried.
        """
        super().__init__(_checked_headers(headers))
        self.size = plain_table(self, "headers")[1]


def check_name(what: str, value: Any) -> None:
    """Check that ``value`` is an AMQP short string: text of at most 255 bytes in UTF-8.

    Raises:
        InvalidEvent: it is not; the message names ``what``.
    """
    if isinstance(value, str) and value.isascii() and len(value) <= 255:
        return  # nearly every name: it needs no encoding
    if not isinstance(value, str):
        raise InvalidEvent(f"the {what} is a {type(value).__name__}, not a string: {value!r}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise InvalidEvent(f"the {what} {value!r} cannot be encoded in UTF-8") from error
    if size > 255:
        raise InvalidEvent(f"the {what} has {size} bytes in UTF-8, more than 255: {value!r:.60}")


def check_address(what: str, value: Any) -> None:
    """Check that ``value`` is a short string that every database can store: without NUL.

    Raises:
        InvalidEvent: it is not; the message names ``what``.
    """
    check_name(what, value)
    if "\0" in value:  # forbidden in AMQP 0-9-1, too: section 4.2.5.3
        raise InvalidEvent(f"the {what} {value!r:.60} contains a NUL character; remove it")


def _checked_headers(headers: Any) -> dict[str, Any]:
    if not isinstance(headers, Mapping):
        raise InvalidEvent(f"headers must be a mapping, not a {type(headers).__name__}")
    for name in headers:
        check_name("header name", name)
        if name in (TASK, KEEP_RESULT):
            continue  # outbox itself adds them, and they are harmless: any program may send tasks
        if name in _INTERPRETED or name.lower().startswith(_INTERPRETED_PREFIXES):
            raise InvalidEvent(
                f"the header {name!r} is reserved: "
                "the broker or outbox acts on it; choose another name"
            )
    plain, size = plain_table(headers, "headers")
    if size > MAX_HEADER_BYTES:
        raise InvalidEvent(
            f"the headers take {size} bytes, more than {MAX_HEADER_BYTES}; use the payload instead"
        )
    return plain


def plain_table(table: Mapping[Any, Any], where: str, depth: int = 0) -> tuple[dict[str, Any], int]:
    """Return ``table`` in types that every transport encodes alike, and its size in AMQP.

    Raises:
        InvalidEvent: something in it cannot be carried; ``where`` begins the path to it.
    """
    plain: dict[str, Any] = {}
    size = 4
    for name, value in table.items():
        check_name(f"name in {where}", name)
        plain[name], value_size = _plain(value, f"{where}[{name!r}]", depth)
        size += 1 + len(name.encode()) + value_size
    return plain, size


def _plain(value: Any, where: str, depth: int) -> tuple[Any, int]:
    if depth > MAX_HEADER_DEPTH:
        raise InvalidEvent(f"{where:.60}... is nested too deeply, or contains itself")
    match value:
        case None | bool():
            return value, 2
        case enum.Enum():  # before int and str, which an enum may extend
            return _plain(value.value, where, depth)
        case int():
            if not -(1 << 63) <= value < 1 << 63:
                raise InvalidEvent(f"{where} does not fit into 64 bits: {value!r}")
            return int(value), 9
        case float():
            # As text: pika, for one, decodes an AMQP double as an integer (pika.data, 1.4.4).
            return _plain(repr(float(value)), where, depth)
        case str():
            try:
                return str(value), 5 + len(value.encode())
            except UnicodeEncodeError as error:
                raise InvalidEvent(f"{where} cannot be encoded in UTF-8") from error
        case bytes() | bytearray() | memoryview():
            return bytes(value), 5 + len(bytes(value))
        case uuid.UUID() | decimal.Decimal():
            return _plain(str(value), where, depth)
        case datetime.datetime() | datetime.date() | datetime.time():
            return _plain(value.isoformat(), where, depth)
        case list() | tuple():
            items = [_plain(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
            return [item for item, _ in items], 5 + sum(size for _, size in items)
        case Mapping():
            table, size = plain_table(value, where, depth + 1)
            return table, 1 + size
    raise InvalidEvent(
        f"{where} is a {type(value).__qualname__}; headers carry str, bytes, bool, int, float, "
        "None, and lists and dicts of these"
    )
