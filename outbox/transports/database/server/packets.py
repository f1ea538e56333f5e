"""MariaDB's limit for one statement: how many rows fit, and which row never will."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

__all__ = ["in_packets"]

_OF_A_ROW = 8 * 1024
"""Bytes, at most, of the columns that are short."""

_OF_A_STATEMENT = 8 * 1024

_ESCAPED = [bytes([each]) for each in b"\0'\"\\\n\r\x1a"]
"""Bytes that drivers write as two (https://mariadb.com/kb/en/string-literals/)."""


def in_packets(rows: Sequence[dict[str, Any]], limit: int) -> Iterator[list[dict[str, Any]]]:
    """Yield ``rows`` in groups that fit into one statement each.

    Args:
        rows: the rows, in order.
        limit: ``max_allowed_packet`` of the server, in bytes.

    Raises:
        ValueError: a row doesn't fit.
    """
    group: list[dict[str, Any]] = []
    room = limit - _OF_A_STATEMENT
    for row in rows:
        size = _written(row["payload"]) + _written((row["headers"] or "").encode()) + _OF_A_ROW
        if size > limit - _OF_A_STATEMENT:
            raise ValueError(
                f"{size:,} bytes, as they are written in a statement, are more than the server's "
                f"max_allowed_packet ({limit:,})"
            )
        if size > room:
            yield group
            group, room = [], limit - _OF_A_STATEMENT
        group.append(row)
        room -= size
    if group:
        yield group


def _written(value: bytes) -> int:
    return len(value) + sum(map(value.count, _ESCAPED))
