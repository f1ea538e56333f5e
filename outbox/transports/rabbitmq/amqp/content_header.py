"""A message's properties and headers as the bytes in which they were received.

A message to send on unchanged is never decoded, only split into its parts (AMQP 0-9-1, section
2.3.5.2).
"""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from outbox.transports.rabbitmq.amqp import field_table
from outbox.transports.rabbitmq.amqp.field_table import Entry, MalformedTable, short_string

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
"""The properties in the order they are written; the flag of the first is the highest bit."""

_FIXED = {"delivery_mode": 1, "priority": 1, "timestamp": 8}  # bytes; the others are short strings

_START = struct.Struct(">HHQH")  # class, weight, size of the body, flags
_BASIC = 60


class MalformedHeader(ValueError):
    """The bytes aren't a content header."""


@dataclass(frozen=True, slots=True)
class ContentHeader:
    """The properties and headers of a message, encoded. Immutable.

    Attributes:
        properties: the encoded values by name (``message_id`` and so on), without ``headers``.
        headers: the entries of the header table in order: name, encoded value.
    """

    properties: Mapping[str, bytes] = dataclasses.field(default_factory=dict)
    headers: tuple[Entry, ...] = ()

    @classmethod
    def parse(cls, payload: bytes) -> Self:
        """Return the content header in the payload of a header frame.

        Raises:
            MalformedHeader: the payload is malformed, or not of the class Basic.
        """
        try:
            kind, _, _, flags = _START.unpack_from(payload)
            if kind != _BASIC or flags & 3:
                raise MalformedHeader(f"class {kind}, flags {flags:#x}")
            at = _START.size
            properties: dict[str, bytes] = {}
            headers: tuple[Entry, ...] = ()
            for number, name in enumerate(_NAMES):
                if not flags & 1 << 15 - number:
                    continue
                if name == "headers":
                    headers, at = field_table.split(payload, at)
                    continue
                end = at + (_FIXED.get(name) or 1 + payload[at])
                properties[name] = payload[at:end]
                at = end
        except (MalformedTable, struct.error, IndexError) as error:
            raise MalformedHeader(str(error)) from error
        if at > len(payload):
            raise MalformedHeader("the data ends in the middle of a value")
        if at < len(payload):
            raise MalformedHeader(f"{len(payload) - at} byte(s) too many")
        return cls(properties, headers)

    def encode(self, body_size: int) -> bytes:
        """Return the payload of a header frame for a body of ``body_size`` bytes."""
        flags = 0
        parts = []
        for number, name in enumerate(_NAMES):
            if name == "headers":
                part = field_table.join(self.headers) if self.headers else b""
            else:
                part = self.properties.get(name, b"")
            if part:
                flags |= 1 << 15 - number
                parts.append(part)
        return _START.pack(_BASIC, 0, body_size, flags) + b"".join(parts)

    def text(self, name: str) -> str | None:
        """Return the property ``name``, a short string, or None; invalid UTF-8 is replaced."""
        data = self.properties.get(name)
        return None if data is None else data[1:].decode(errors="replace")

    def header(self, name: str) -> Any:
        """Return the header ``name`` decoded, or None if it is missing or malformed."""
        wanted = name.encode()
        for encoded_name, value in self.headers:
            if encoded_name == wanted:
                try:
                    return field_table.decode(value)
                except (ValueError, OverflowError, struct.error, IndexError):
                    return None
        return None

    def without(self, unwanted: Callable[[str], bool]) -> Self:
        """Return a copy without the headers whose name is ``unwanted``."""
        kept = [entry for entry in self.headers if not unwanted(entry[0].decode(errors="replace"))]
        return dataclasses.replace(self, headers=tuple(kept))

    def with_text(self, **properties: str) -> Self:
        """Return a copy with these properties, each a short string of at most 255 bytes."""
        encoded = {name: short_string(value) for name, value in properties.items()}
        return dataclasses.replace(self, properties={**self.properties, **encoded})

    def with_headers(self, added: Iterable[tuple[str, str]]) -> Self:
        """Return a copy with these text headers after the others."""
        encoded = [(name.encode(), field_table.encode_value(value)) for name, value in added]
        return dataclasses.replace(self, headers=(*self.headers, *encoded))

    def persistent(self) -> Self:
        """Return a copy with delivery mode 2."""
        return dataclasses.replace(self, properties={**self.properties, "delivery_mode": b"\x02"})
