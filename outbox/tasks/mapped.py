"""Instances of mapped classes in calls: their class and key travel, never the object.

In a message an instance is ``{"$instance": [class, key]}``; a third item, true, says that the task
was stored in the instance's own transaction, and so can't arrive before it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from outbox.sql.mapped_instances import InstanceMapping

__all__ = [
    "MARK",
    "Reader",
    "Writing",
    "is_instance",
    "is_mapped",
    "is_mark",
    "mark_of",
    "name_of",
    "of_mark",
    "reading",
    "session_of",
]

MARK = "$instance"


class Reader(Protocol):
    """What finds the instances of a call."""

    def instance(self, name: str, key: Sequence[Any], *, is_committed: bool) -> Any:
        """Return the instance of a class with a key.

        Args:
            name: the class, as ``module:qualified.name``.
            key: the parts of its primary key, in JSON's types.
            is_committed: whether it can't be missing because it is yet to be committed.
        """
        ...


_reader: ContextVar[Reader | None] = ContextVar("outbox_task_reader", default=None)
_writing: ContextVar[Writing | None] = ContextVar("outbox_task_writing", default=None)


def _mapping() -> InstanceMapping | None:
    """Return what knows SQLAlchemy's mapped classes, or None while it isn't imported."""
    if "sqlalchemy.orm" not in sys.modules:
        return None
    from outbox.sql.mapped_instances import MAPPING

    return MAPPING


def is_mapped(kind: Any) -> bool:
    """Return whether ``kind`` is a mapped class."""
    if not isinstance(kind, type) or "__mapper__" not in vars(kind):
        return False
    mapping = _mapping()
    return mapping is not None and mapping.is_mapped(kind)


def is_instance(value: Any) -> bool:
    """Return whether ``value`` is an instance of a mapped class."""
    return is_mapped(type(value))


def session_of(value: Any) -> Any:
    """Return the session that a mapped instance belongs to, or None."""
    mapping = _mapping()
    return None if mapping is None else mapping.session_of(value)


def name_of(kind: type) -> str:
    """Return the name under which a mapped class travels."""
    return f"{kind.__module__}:{kind.__qualname__}"


def mark_of(value: Any) -> dict[str, Any]:
    """Return what travels instead of a mapped instance.

    Raises:
        TypeError: it isn't such an instance.
        InvalidEvent: its row isn't there yet, or was deleted.
    """
    mapping = _mapping()
    if mapping is None or not mapping.is_mapped(type(value)):
        raise TypeError(f"it is a {type(value).__qualname__}, not an instance of a mapped class")
    name, key = name_of(type(value)), mapping.key_of(value)
    mark: list[Any] = [name, key]
    writing = _writing.get()
    if writing is not None:
        writing.written.append((name, key, value))
        if writing.session is not None and mapping.session_of(value) is writing.session:
            mark.append(True)
    return {MARK: mark}


def is_mark(value: Any) -> bool:
    """Return whether ``value`` stands for a mapped instance."""
    return type(value) is dict and MARK in value


def of_mark(value: Any) -> Any:
    """Return the instance that ``value`` stands for.

    Raises:
        ValueError: it isn't what :func:`mark_of` makes, or nothing here could find it.
        Exception: what finds it raised it.
    """
    match value:
        case {"$instance": [str() as name, list() as key]} if len(value) == 1:
            is_committed = False
        case {"$instance": [str() as name, list() as key, True]} if len(value) == 1:
            is_committed = True
        case _:
            raise ValueError("it isn't an instance, {'$instance': [class, key]}")
    reader = _reader.get()
    if reader is None:
        raise ValueError("nothing here could find an instance")
    return reader.instance(name, key, is_committed=is_committed)


@contextmanager
def reading(reader: Reader) -> Iterator[None]:
    """Have ``reader`` find the instances of the block."""
    token = _reader.set(reader)
    try:
        yield
    finally:
        _reader.reset(token)


class Writing:
    """A block in which a call is written, and read again to see whether that changes it.

    Attributes:
        session: the session in whose transaction the task is stored, or None.
        written: the class, the key and the instance of each that was written.
    """

    __slots__ = ("_tokens", "session", "written")

    def __init__(self, session: Any) -> None:
        """Begin with nothing written."""
        self.session = session
        self.written: list[tuple[str, list[Any], Any]] = []

    def __enter__(self) -> None:
        self._tokens = _writing.set(self), _reader.set(self)

    def __exit__(self, *_: object) -> None:
        writing, reader = self._tokens
        _writing.reset(writing)
        _reader.reset(reader)

    def instance(self, name: str, key: Sequence[Any], *, is_committed: bool) -> Any:
        """Return the instance that was written with this class and key."""
        return next(one for known, of, one in self.written if (known, of) == (name, [*key]))
