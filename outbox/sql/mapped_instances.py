"""Mapped instances as SQLAlchemy sees them: their identity, their session, the way back.

What counts is the identity, never the attributes: an expired instance that has left its session
can't read those, and a key that was changed and not flushed belongs to no row.
"""

from __future__ import annotations

import datetime
import decimal
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

from sqlalchemy import inspect
from sqlalchemy.engine.default import DefaultDialect
from sqlalchemy.exc import NoInspectionAvailable
from sqlalchemy.orm import InstanceState, Mapper, object_session
from sqlalchemy.types import TypeDecorator, TypeEngine

from outbox.errors import InvalidEvent

__all__ = ["MAPPING", "InstanceMapping", "classes_of", "key_for", "mapped_among"]

_DIALECT = DefaultDialect()
"""What types of the application are given: the same for callers, who may have no engine, and
workers."""


def _mapper_of(kind: Any) -> Mapper[Any] | None:
    if not isinstance(kind, type) or "__mapper__" not in vars(kind):
        return None
    try:
        mapper: Any = inspect(kind)
    except NoInspectionAvailable:
        return None
    return mapper if isinstance(mapper, Mapper) else None


class InstanceMapping:
    """What is known of mapped classes and their instances."""

    def is_mapped(self, kind: Any) -> bool:
        """Return whether ``kind`` is a mapped class."""
        return _mapper_of(kind) is not None

    def key_of(self, instance: Any) -> list[Any]:
        """Return the primary key of the instance's row, in JSON's types.

        Raises:
            InvalidEvent: there is no such row yet, or no more.
        """
        state: InstanceState[Any] = inspect(instance)
        name = type(instance).__qualname__
        session = state.session
        if (
            state.deleted
            or state.was_deleted
            or (session is not None and instance in session.deleted)
        ):
            raise InvalidEvent(f"the {name} was deleted; the task would not find it")
        identity: Sequence[Any] | None = state.identity
        if identity is None and session is not None and session._flushing:
            # In a listener for after_insert the row is there, and gets its identity later.
            identity = state.mapper.primary_key_from_instance(instance)
        if identity is None or None in identity:
            raise InvalidEvent(
                f"the {name} has no row yet, so that the task would not find it; call "
                "session.flush() first"
            )
        return [
            _written(name, part, column.type)
            for part, column in zip(identity, state.mapper.primary_key, strict=True)
        ]

    def transaction_of(self, instance: Any) -> Any:
        """Return the session that ``instance`` belongs to, or None."""
        return object_session(instance)

    def alias_of(self, instance: Any) -> None:
        """Return None: the worker's session decides where an instance is looked for."""


MAPPING = InstanceMapping()


def _written(name: str, part: Any, column_type: TypeEngine[Any]) -> Any:
    """Return a part of a key as JSON has it: what its column's type makes of it for the database.

    Raises:
        InvalidEvent: it can't be carried.
    """
    try:
        written = _plain(_bound(part, column_type))
        if isinstance(column_type, TypeDecorator):  # the application's: it may be one-way
            again = _plain(_bound(_typed(written, column_type), column_type))
            if written != again:
                raise ValueError(f"its type writes {written!r:.60}, and then {again!r:.60}")
    except InvalidEvent:
        raise
    except Exception as error:
        raise InvalidEvent(
            f"the key of the {name}, with {part!r:.60}, can't be carried by its type "
            f"{type(column_type).__qualname__}: {error}; give the task another key of it"
        ) from error
    return written


def _bound(part: Any, column_type: TypeEngine[Any]) -> Any:
    """Return a value in the Python type below the decorators of its column's type."""
    for decorator in _decorators(column_type):
        if type(decorator).process_bind_param is not TypeDecorator.process_bind_param:
            part = decorator.process_bind_param(part, _DIALECT)
    return part


def _decorators(column_type: TypeEngine[Any]) -> Iterator[TypeDecorator[Any]]:
    """Yield the decorators of a type, the outermost first."""
    while isinstance(column_type, TypeDecorator):
        yield column_type
        column_type = column_type.load_dialect_impl(_DIALECT)


def _plain(part: Any) -> Any:
    """Return a part of a key as JSON has it."""
    match part:
        case bool() | int() | str():
            return part
        case datetime.datetime() | datetime.date() | datetime.time():
            return part.isoformat()
        case uuid.UUID() | decimal.Decimal():
            return str(part)
        case bytes():
            return part.hex()
    raise InvalidEvent(f"a key with a {type(part).__qualname__} can't be carried: {part!r:.60}")


def key_for(kind: type, key: Sequence[Any]) -> tuple[Any, ...]:
    """Return a key as the types of its columns give it.

    Raises:
        ValueError: it isn't a key of the class.
    """
    mapper = _mapper_of(kind)
    columns = () if mapper is None else mapper.primary_key
    if len(columns) != len(key):
        raise ValueError(f"the key of {kind.__qualname__} has {len(columns)} part(s): {key!r:.60}")
    return tuple(_typed(part, column.type) for part, column in zip(key, columns, strict=True))


def _typed(part: Any, column_type: TypeEngine[Any]) -> Any:
    """Return a part of a key, which JSON had, as the type of its column gives it.

    Raises:
        ValueError: the column's type doesn't take it.
    """
    decorators = [*_decorators(column_type)]
    if decorators:
        column_type = decorators[-1].load_dialect_impl(_DIALECT)
    value = _in_kind(part, column_type.python_type)
    for decorator in reversed(decorators):
        if type(decorator).process_result_value is TypeDecorator.process_result_value:
            continue
        try:
            value = decorator.process_result_value(value, _DIALECT)
        except Exception as error:  # the application's
            raise ValueError(
                f"{part!r:.60} is not a {type(decorator).__qualname__}: {error}"
            ) from error
    return value


def _in_kind(part: Any, kind: type) -> Any:
    make: Any = _FROM_TEXT.get(kind)
    if make is None:
        if not isinstance(part, (int, str)):
            raise ValueError(f"{part!r:.60} is no part of a key")
        return part
    if not isinstance(part, str):
        raise ValueError(f"{part!r:.60} is no text of a {kind.__name__}")
    try:
        return make(part)
    except (ValueError, ArithmeticError):
        raise ValueError(f"{part!r:.60} is no {kind.__name__}") from None


_FROM_TEXT: dict[type, Any] = {
    datetime.datetime: datetime.datetime.fromisoformat,
    datetime.date: datetime.date.fromisoformat,
    datetime.time: datetime.time.fromisoformat,
    uuid.UUID: uuid.UUID,
    decimal.Decimal: decimal.Decimal,
    bytes: bytes.fromhex,
}


def classes_of(modules: Iterable[ModuleType]) -> Mapping[str, type]:
    """Return all classes that are mapped together with those that the modules name, by name."""
    found: dict[str, type] = {}
    for mapper in _mappers(modules):
        kind = mapper.class_
        found[f"{kind.__module__}:{kind.__qualname__}"] = kind
    return found


def mapped_among(members: Iterable[Any]) -> Iterator[type]:
    """Yield those of ``members`` that are mapped classes."""
    for member in members:
        if _mapper_of(member) is not None:
            yield member


def _mappers(modules: Iterable[ModuleType]) -> Iterator[Mapper[Any]]:
    seen: set[int] = set()
    for module in modules:
        for kind in mapped_among(list(vars(module).values())):
            mapper = _mapper_of(kind)
            if mapper is not None and id(mapper.registry) not in seen:
                seen.add(id(mapper.registry))
                yield from mapper.registry.mappers
