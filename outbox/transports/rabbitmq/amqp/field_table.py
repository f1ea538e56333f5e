"""Field tables, the encoding of headers: names and values, each value with a type letter.

All encoding and decoding of tables is here (AMQP 0-9-1, section 4.2.5, with the field types of
RabbitMQ's errata). There are three ways to read a table, for three purposes:

- ``read`` decodes a delivery's headers to a dict in one pass. It decodes common types itself, and
  those that pika gets wrong: it reads a double as an integer. The others are left to pika.
- ``split`` only finds the boundaries of the entries, so that they can be sent on unchanged. pika's
  decoding loses information: it can't read a date beyond the year 9999 at all.
- ``decode`` decodes one value from ``split``.
"""

from __future__ import annotations

import datetime
import math
import struct
from collections.abc import Iterable, Mapping
from typing import Any

import pika.data

__all__ = [
    "Entry",
    "MalformedTable",
    "decode",
    "encode_entry",
    "encode_value",
    "join",
    "read",
    "short_string",
    "split",
]

Entry = tuple[bytes, bytes]
"""A name, and the encoded value with its type letter."""

_FIXED: dict[bytes, struct.Struct] = {
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
    b"T": struct.Struct(">Q"),  # seconds since the epoch
    b"t": struct.Struct(">?"),
    b"V": struct.Struct(""),  # nothing
    b"D": struct.Struct(">Bi"),  # a decimal: the scale, the number
}
_SIZED = b"SxAF"  # text, bytes, a list, a table: the size, then the content

_DEEPEST = 20
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)

_size = struct.Struct(">I")
_pack_size = _size.pack
_unpack_size = _size.unpack_from
_unpack_int = _FIXED[b"I"].unpack_from
_unpack_long = _FIXED[b"l"].unpack_from


class MalformedTable(ValueError):
    """The bytes aren't a field table, or not a value of one."""


def short_string(text: str) -> bytes:
    """Return ``text``, at most 255 bytes in UTF-8, preceded by its size."""
    data = text.encode()
    return bytes([len(data)]) + data


def encode_entry(name: str, value: Any) -> bytes:
    """Return an encoded entry of a table."""
    return short_string(name) + encode_value(value)


def encode_value(value: Any) -> bytes:
    """Return ``value`` encoded, preceded by its type letter."""
    match value:
        case None:
            return b"V"
        case bool():
            return b"t\x01" if value else b"t\x00"
        case int():
            fits = -(1 << 31) <= value < 1 << 31
            return struct.pack(">ci" if fits else ">cq", b"I" if fits else b"l", value)
        case float():
            return struct.pack(">cd", b"d", value)
        case str():
            data = value.encode()
            return b"S" + _pack_size(len(data)) + data
        case bytes():
            return b"x" + _pack_size(len(value)) + value
        case list():
            data = b"".join(map(encode_value, value))
            return b"A" + _pack_size(len(data)) + data
        case Mapping():
            data = b"".join(encode_entry(*item) for item in value.items())
            return b"F" + _pack_size(len(data)) + data
    raise TypeError(f"{value!r} cannot be written into an AMQP table")


def read(buffer: bytes, at: int) -> tuple[dict[str, Any], int]:
    """Return the table that begins at ``at``, and where it ends."""
    [size] = _unpack_size(buffer, at)
    at += 4
    limit = at + size
    table: dict[str, Any] = {}
    while at < limit:
        end = at + 1 + buffer[at]
        name = buffer[at + 1 : end].decode()
        kind = buffer[end]
        at = end + 1
        if kind == 0x49:  # I
            [table[name]] = _unpack_int(buffer, at)
            at += 4
        elif kind == 0x6C:  # l
            [table[name]] = _unpack_long(buffer, at)
            at += 8
        elif kind == 0x53:  # S
            [size] = _unpack_size(buffer, at)
            at += 4 + size
            table[name] = buffer[at - size : at].decode()
        else:
            table[name], at = _read_value(buffer, end)
    if at != limit:
        raise ValueError("the table does not end where its size says")
    return table, at


def _read_value(buffer: bytes, at: int) -> tuple[Any, int]:
    """Return the value whose type letter is at ``at``, and where it ends."""
    kind = buffer[at : at + 1]
    if kind in (b"d", b"f"):
        [number] = _FIXED[kind].unpack_from(buffer, at + 1)
        if not math.isfinite(number):  # which pika can't read
            raise MalformedTable(f"{number} isn't a number that a reader could use")
        return number, at + 1 + _FIXED[kind].size
    if kind == b"F":
        return read(buffer, at + 1)
    if kind == b"A":
        items = []
        [size] = _unpack_size(buffer, at + 1)
        at += 5
        limit = at + size
        while at < limit:
            item, at = _read_value(buffer, at)
            items.append(item)
        return items, at
    value, at = pika.data.decode_value(buffer, at)
    return value, at


def split(data: bytes, at: int) -> tuple[tuple[Entry, ...], int]:
    """Return the entries of the table that begins at ``at``, and where it ends.

    Raises:
        MalformedTable, struct.error, IndexError: the bytes aren't a table.
    """
    start = at + _size.size
    end = start + _unpack_size(data, at)[0]
    at = start
    _part(data, at, end)
    entries = []
    while at < end:
        value = at + 1 + data[at]
        behind = _end(data, value)
        entries.append((_part(data, at + 1, value), _part(data, value, behind)))
        at = behind
    if at != end:
        raise MalformedTable("the last value is longer than its table")
    return tuple(entries), end


def join(entries: Iterable[Entry]) -> bytes:
    """Return the encoded table of ``entries``."""
    table = b"".join(bytes([len(name)]) + name + value for name, value in entries)
    return _pack_size(len(table)) + table


def decode(value: bytes) -> Any:
    """Return ``value`` decoded; invalid UTF-8 is replaced, a timestamp is aware.

    Raises:
        ValueError, OverflowError, struct.error, IndexError: the value is malformed.
    """
    return _decoded(value, 0, 0)[0]


def _part(data: bytes, start: int, end: int) -> bytes:
    if end > len(data):
        raise MalformedTable("the data ends in the middle of a value")
    return data[start:end]


def _end(data: bytes, at: int) -> int:
    """Return the end of the value whose type letter is at ``at``."""
    kind = data[at : at + 1]
    if kind and kind in _SIZED:
        return int(at + 1 + _size.size + _unpack_size(data, at + 1)[0])
    if kind not in _FIXED:
        raise MalformedTable(f"unknown field type {kind!r}")
    return at + 1 + _FIXED[kind].size


def _decoded(data: bytes, at: int, depth: int) -> tuple[Any, int]:
    """Return the value whose type letter is at ``at``, and where it ends."""
    if depth > _DEEPEST:
        raise MalformedTable(f"values nested more than {_DEEPEST} deep")
    kind, end = data[at : at + 1], _end(data, at)
    if kind in _FIXED:
        numbers = _FIXED[kind].unpack_from(data, at + 1)
        if kind == b"T":
            return _EPOCH + datetime.timedelta(seconds=numbers[0]), end
        return (numbers[-1] if numbers else None), end
    inside = _part(data, at + 1 + _size.size, end)
    if kind == b"S":
        return inside.decode(errors="replace"), end
    if kind == b"x":
        return inside, end
    if kind == b"F":
        entries, _ = split(_pack_size(len(inside)) + inside, 0)
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
