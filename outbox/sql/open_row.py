"""What becomes of single rows whose transaction is open, for the handles of their tasks."""

from __future__ import annotations

import weakref
from collections.abc import Iterator

from sqlalchemy import Connection
from sqlalchemy.orm import Session

__all__ = ["OpenRow", "end_rows_of", "follow", "roll_back_to"]


class OpenRow:
    """A row that was written, or is yet to be, in a transaction that was open then.

    It doesn't keep the session or connection alive. What is collected as garbage with an open
    transaction is rolled back.
    """

    __slots__ = ("_is_dropped", "_is_open", "_owner")

    def __init__(self, owner: Session | Connection) -> None:
        """Follow a row in the present transaction of ``owner``."""
        self._owner: weakref.ref[Session | Connection] = weakref.ref(owner)
        self._is_open = True
        self._is_dropped = False

    @property
    def is_open(self) -> bool:
        """Whether the transaction is open, so that the row may be committed or dropped."""
        return self._is_open and self._owner() is not None

    @property
    def is_dropped(self) -> bool:
        """Whether the row was rolled back; False if that isn't known for certain."""
        return self._is_dropped or (self._is_open and self._owner() is None)

    def move_to(self, connection: Connection) -> None:
        """Follow the transaction of ``connection``, which the session has got from its caller."""
        self._owner = weakref.ref(connection)

    def end(self, *, is_dropped: bool) -> None:
        """Note that the transaction is over, or the row's savepoint rolled back."""
        self._is_dropped = is_dropped
        self._is_open = False


_rows: weakref.WeakKeyDictionary[Connection, list[tuple[OpenRow, frozenset[str]]]] = (
    weakref.WeakKeyDictionary()
)
"""The rows in the open transactions of connections, with the names of their savepoints."""


def follow(connection: Connection, row: OpenRow) -> None:
    """Note that ``row`` was written in the open transaction of ``connection``."""
    _rows.setdefault(connection, []).append((row, frozenset(_savepoints(connection))))


def _savepoints(connection: Connection) -> Iterator[str]:
    savepoint = connection.get_nested_transaction()
    while savepoint is not None:
        yield savepoint._savepoint
        savepoint = savepoint._previous_nested


def end_rows_of(connection: Connection, *, is_dropped: bool) -> None:
    """Note that the transaction of ``connection`` is over."""
    for row, _ in _rows.pop(connection, ()):
        row.end(is_dropped=is_dropped)


def roll_back_to(connection: Connection, savepoint: str) -> None:
    """Note that what ``connection`` has written in a savepoint was rolled back."""
    rows = _rows.get(connection)
    if not rows:
        return
    for row, savepoints in rows:
        if savepoint in savepoints:
            row.end(is_dropped=True)
    rows[:] = [each for each in rows if savepoint not in each[1]]
