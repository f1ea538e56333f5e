"""A message's properties and headers as the bytes they came in.

A driver's idea of a property is not the property: pika reads a double as a whole number, and cannot
read a date beyond the year 9999 at all. What is to be sent on as it came is therefore never decoded
here, but taken apart where its parts begin and end (AMQP 0-9-1, sections 2.3.5.2 and 4.2.5, with
the field types of RabbitMQ's errata).
"""

from __future__ import annotations

import dataclasses
import datetime
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

__all__ = ["ContentHeader", "MalformedHeader"]

_NAMES = (
    "content_type",
    "content_encoding",
    "headers",
    "delivery_mode",
    "priority",
    "correlation_id",
    "reply_to",
    "expiration",
    "message_id",
    "timestamp",
    "type",
    "user_id",
    "app_id",
    "cluster_id",
)
"""In the order in which they are written; the first one's flag is the highest bit."""

_FIXED = {"delivery_mode": 1, "priority": 1, "timestamp": 8}  # bytes; the others are short strings

_START = struct.Struct(">HHQH")  # class, weight, size of the body, flags
_BASIC = 60
_SIZE = struct.Struct(">I")
_DEEPEST = 20
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

_NUMBERS: dict[bytes, struct.Struct] = {
    b"b": struct.Struct(">b"),
    b"B": struct.Struct(">B"),
    b"s": struct.Struct(">h"),
    b"U": struct.Struct(">h"),
    b"u": struct.Struct(">H"),
    b"I": struct.Struct(">i"),
    b"i": struct.Struct(">I"),
    b"l": struct.Struct(">q"),
    b"L": struct.Struct(">q"),
    b"f": struct.Struct(">f"),
    b"d": struct.Struct(">d"),
    b"T": struct.Struct(">Q"),
    b"t": struct.Struct(">?"),
    b"V": struct.Struct(""),
    b"D": struct.Struct(">Bi"),
}
_SIZED = b"SxAF"


class MalformedHeader(ValueError):
    """These bytes are no content header."""


@dataclass(frozen=True, slots=True)
class ContentHeader:
    """What stands between a message's address and its body. Immutable.

    Attributes:
        properties: the encoded values by name (``message_id`` and so on), without ``headers``.
        headers: the entries of the header table in their order: name, encoded value.
    """

    properties: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    headers: tuple[tuple[bytes, bytes], ...] = ()

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Return the payload of a header frame taken apart.

        Raises:
            MalformedHeader: it is not one, or not of the class Basic.
        """
        try:
            kind, _, _, flags = _START.unpack_from(payload)
            if kind != _BASIC or flags & 3:
                raise MalformedHeader(f"class {kind}, flags {flags:#x}")
            at = _START.size
            properties: dict[str, bytes] = {}
            headers: tuple[tuple[bytes, bytes], ...] = ()
            for number, name in enumerate(_NAMES):
                if not flags & 1 << 15 - number:
                    continue
                if name == "headers":
                    headers, at = _entries(payload, at)
                    continue
                end = at + (_FIXED.get(name) or 1 + payload[at])
                properties[name] = _part(payload, at, end)
                at = end
        except (struct.error, IndexError) as error:
            raise MalformedHeader(str(error)) from error
        if at != len(payload):
            raise MalformedHeader(f"{len(payload) - at} byte(s) too many")
        return cls(properties, headers)

    def encode(self, body_size: int) -> bytes:
        """Return the payload of a header frame, for a body of so many bytes."""
        flags = 0
        parts = []
        for number, name in enumerate(_NAMES):
            if name == "headers":
                table = b"".join(bytes([len(one)]) + one + value for one, value in self.headers)
                part = _SIZE.pack(len(table)) + table if self.headers else b""
            else:
                part = self.properties.get(name, b"")
            if part:
                flags |= 1 << 15 - number
                parts.append(part)
        return _START.pack(_BASIC, 0, body_size, flags) + b"".join(parts)

    def text(self, name: str) -> str | None:
        """Return a property that is a short string, or None; what is not UTF-8 is replaced."""
        data = self.properties.get(name)
        return None if data is None else data[1:].decode(errors="replace")

    def header(self, name: str) -> Any:
        """Return a header decoded, or None where it is missing or makes no sense."""
        wanted = name.encode()
        for found, value in self.headers:
            if found == wanted:
                try:
                    return _decoded(value, 0, 0)[0]
                except (ValueError, OverflowError, struct.error, IndexError):
                    return None
        return None

    def without(self, unwanted: Callable[[str], bool]) -> Self:
        """Return it without the headers whose name is ``unwanted``."""
        kept = [one for one in self.headers if not unwanted(one[0].decode(errors="replace"))]
        return dataclasses.replace(self, headers=tuple(kept))

    def with_text(self, **properties: str) -> Self:
        """Return it with these properties, each a short string of at most 255 bytes."""
        encoded = {name: _short(value) for name, value in properties.items()}
        return dataclasses.replace(self, properties={**self.properties, **encoded})

    def with_headers(self, added: Iterable[tuple[str, str]]) -> Self:
        """Return it with these headers, text, behind the others."""
        encoded = [
            (name.encode(), b"S" + _SIZE.pack(len(data)) + data)
            for name, data in ((name, value.encode()) for name, value in added)
        ]
        return dataclasses.replace(self, headers=(*self.headers, *encoded))

    def persistent(self) -> Self:
        """Return it with the delivery mode 2."""
        return dataclasses.replace(self, properties={**self.properties, "delivery_mode": b"\x02"})


def _short(text: str) -> bytes:
    data = text.encode()
    return bytes([len(data)]) + data


def _part(data: bytes, start: int, end: int) -> bytes:
    if end > len(data):
        raise MalformedHeader("it ends in the middle of a value")
    return data[start:end]


def _entries(data: bytes, at: int) -> tuple[tuple[tuple[bytes, bytes], ...], int]:
    """Return the entries of the table that begins at ``at``, and where it ends."""
    start = at + _SIZE.size
    end = start + _SIZE.unpack_from(data, at)[0]
    at = start
    _part(data, at, end)
    entries = []
    while at < end:
        value = at + 1 + data[at]
        behind = _end(data, value)
        entries.append((_part(data, at + 1, value), _part(data, value, behind)))
        at = behind
    if at != end:
        raise MalformedHeader("a table's last value is longer than the table")
    return tuple(entries), end


def _end(data: bytes, at: int) -> int:
    """Return where the value ends whose type stands at ``at``."""
    kind = data[at : at + 1]
    if kind and kind in _SIZED:
        return int(at + 1 + _SIZE.size + _SIZE.unpack_from(data, at + 1)[0])
    if kind not in _NUMBERS:
        raise MalformedHeader(f"the field type {kind!r}")
    return at + 1 + _NUMBERS[kind].size


def _decoded(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    """Return the value whose type stands at ``at``, and where it ends."""
    if depth > _DEEPEST:
        raise MalformedHeader("tables in tables in tables")
    kind, end = data[at : at + 1], _end(data, at)
    if kind in _NUMBERS:
        numbers = _NUMBERS[kind].unpack_from(data, at + 1)
        if kind == b"T":
            return _EPOCH + datetime.timedelta(seconds=numbers[0]), end
        return (numbers[-1] if numbers else None), end
    inside = _part(data, at + 1 + _SIZE.size, end)
    if kind == b"S":
        return inside.decode(errors="replace"), end
    if kind == b"x":
        return inside, end
    if kind == b"F":
        entries, _ = _entries(_SIZE.pack(len(inside)) + inside, 0)
        return {
            name.decode(errors="replace"): _decoded(value, 0, depth + 1)[0]
            for name, value in entries
        }, end
    items = []
    position = 0
    while position < len(inside):
        item, position = _decoded(inside, position, depth + 1)
        items.append(item)
    return items, end
