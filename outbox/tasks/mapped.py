"""Instances of mapped classes in calls: their class and key travel, never the object.

Classes are mapped by SQLAlchemy, or are models of Django. In a message an instance is
``{"$instance": [class, key]}``; a third item, true, says that the task was stored in the instance's
own transaction, and so can't arrive before it. A fourth is the alias of Django's database, where
that isn't ``default``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol

from outbox import sinks

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

    def instance(
        self, name: str, key: Sequence[Any], *, is_committed: bool, using: str | None
    ) -> Any:
        """Return the instance of a class with a key.

        Args:
            name: the class, as ``module:qualified.name``.
            key: the parts of its primary key, in JSON's types.
            is_committed: whether it can't be missing because it is yet to be committed.
            using: the alias of Django's database; None for the default one.
        """
        ...


class Mapping(Protocol):
    """What knows mapped classes and their instances."""

    def is_mapped(self, kind: Any) -> bool:
        """Return whether ``kind`` is a mapped class."""
        ...

    def key_of(self, instance: Any) -> list[Any]:
        """Return the primary key of the instance's row, in JSON's types.

        Raises:
            InvalidEvent: there is no such row yet, or no more.
        """
        ...

    def transaction_of(self, instance: Any) -> Any:
        """Return what the instance's transaction is known by, or None."""
        ...

    def alias_of(self, instance: Any) -> str | None:
        """Return the alias of the instance's database; None if it needn't be said."""
        ...


_reader: ContextVar[Reader | None] = ContextVar("outbox_task_reader", default=None)
_writing: ContextVar[Writing | None] = ContextVar("outbox_task_writing", default=None)


def _sqlalchemy() -> InstanceMapping | None:
    """Return what knows SQLAlchemy's mapped classes, or None while it isn't imported."""
    if "sqlalchemy.orm" not in sys.modules:
        return None
    from outbox.sql.mapped_instances import MAPPING

    return MAPPING


def _mapping_of(kind: Any) -> Mapping | None:
    """Return what knows the mapped class ``kind``; None for all else."""
    if not isinstance(kind, type):
        return None
    names = vars(kind)
    mapping: Mapping | None = None
    if "__mapper__" in names:
        mapping = _sqlalchemy()
    elif "_meta" in names and sinks.framework is not None:
        mapping = sinks.framework
    return mapping if mapping is not None and mapping.is_mapped(kind) else None


def may_be_mapped() -> bool:
    """Return whether there can be mapped classes in this process."""
    return sinks.framework is not None or "sqlalchemy.orm" in sys.modules


def is_mapped(kind: Any) -> bool:
    """Return whether ``kind`` is a mapped class."""
    return _mapping_of(kind) is not None


def is_instance(value: Any) -> bool:
    """Return whether ``value`` is an instance of a mapped class."""
    return is_mapped(type(value))


def session_of(value: Any) -> Any:
    """Return SQLAlchemy's session that ``value`` belongs to, or None."""
    mapping = _sqlalchemy()
    if mapping is None or not mapping.is_mapped(type(value)):
        return None
    return mapping.transaction_of(value)


def name_of(kind: type) -> str:
    """Return the name under which a mapped class travels."""
    return f"{kind.__module__}:{kind.__qualname__}"


def mark_of(value: Any) -> dict[str, Any]:
    """Return what travels instead of a mapped instance.

    Raises:
        TypeError: it isn't such an instance.
        InvalidEvent: its row isn't there yet, or was deleted.
    """
    mapping = _mapping_of(type(value))
    if mapping is None:
        raise TypeError(f"it is a {type(value).__qualname__}, not an instance of a mapped class")
    name, key = name_of(type(value)), mapping.key_of(value)
    using, is_committed = mapping.alias_of(value), False
    writing = _writing.get()
    if writing is not None:
        writing.written.append((name, key, using, value))
        transaction = writing.transaction
        is_committed = transaction is not None and mapping.transaction_of(value) == transaction
    mark: list[Any] = [name, key]
    if is_committed or using is not None:
        mark.append(is_committed)
    if using is not None:
        mark.append(using)
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
    is_committed = False
    using: str | None = None
    match value:
        case {"$instance": [str() as name, list() as key]} if len(value) == 1:
            pass
        case {"$instance": [str() as name, list() as key, True]} if len(value) == 1:
            is_committed = True
        case {
            "$instance": [str() as name, list() as key, bool() as is_committed, str() as using]
        } if len(value) == 1:
            pass
        case _:
            raise ValueError("it isn't an instance, {'$instance': [class, key]}")
    reader = _reader.get()
    if reader is None:
        raise ValueError("nothing here could find an instance")
    return reader.instance(name, key, is_committed=is_committed, using=using)


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
        transaction: what the transaction that stores the task is known by, a session of SQLAlchemy
            or the alias of Django's database; or None.
        written: the class, the key, the alias and the instance of each that was written.
    """

    __slots__ = ("_tokens", "transaction", "written")

    def __init__(self, transaction: Any) -> None:
        """Begin with nothing written."""
        self.transaction = transaction
        self.written: list[tuple[str, list[Any], str | None, Any]] = []

    def __enter__(self) -> None:
        self._tokens = _writing.set(self), _reader.set(self)

    def __exit__(self, *_: object) -> None:
        writing, reader = self._tokens
        _writing.reset(writing)
        _reader.reset(reader)

    def instance(
        self, name: str, key: Sequence[Any], *, is_committed: bool, using: str | None
    ) -> Any:
        """Return the instance that was written with this class, key and alias."""
        sought = name, [*key], using
        return next(instance for *known, instance in self.written if tuple(known) == sought)
