"""Arguments of calls, to JSON and back by the annotations of their parameters.

What JSON has travels as it is, whatever the annotation says: a call gets what it would have got
here and now. Every other value is written and read by its annotation, and read once where it was
written, so that what would arrive changed is refused there.
"""

from __future__ import annotations

import base64
import binascii
import collections.abc
import dataclasses
import datetime
import decimal
import enum
import functools
import inspect
import types
import typing
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from outbox.tasks import mapped

__all__ = ["REFUSALS", "Codec", "codec_of", "is_plain", "is_same"]

REFUSALS = (TypeError, ValueError, LookupError, ArithmeticError)
"""What codecs, and comparing what they have read, raise for values that can't be carried."""

_SCALARS = frozenset((int, str, float, bool, types.NoneType))
_EXACT = frozenset(
    (*_SCALARS, datetime.date, datetime.timedelta, decimal.Decimal, uuid.UUID, bytes)
)
"""Types of which equal values are the same."""
_DEEPEST = 64
_MICROSECOND = datetime.timedelta(microseconds=1)


# Not as attributes of the module: freezegun replaces those while a test runs.
_REAL = (datetime.datetime, datetime.date)


def _real(kind: Any) -> Any:
    """Return ``kind``, or the class that freezegun's stands in for."""
    if kind.__module__ != "freezegun.api":
        return kind
    return _REAL[0] if issubclass(kind, _REAL[0]) else _REAL[1]


def is_plain(value: Any, depth: int = 0) -> bool:
    """Return whether JSON carries ``value`` unchanged, with exactly its types."""
    kind = type(value)
    if kind in _SCALARS:
        return True
    if depth >= _DEEPEST:
        raise ValueError("nested too deeply, or contains itself")
    if kind is list:
        return all(is_plain(item, depth + 1) for item in value)
    if kind is dict:
        return mapped.MARK not in value and all(
            type(key) is str and is_plain(item, depth + 1) for key, item in value.items()
        )
    return False


def is_same(value: Any, other: Any) -> bool:
    """Return whether two values are equal and of the same types, at every depth."""
    kind = type(value)
    if kind in _EXACT and kind is type(other):
        return bool(value == other)
    kind = _real(kind)
    if kind is not _real(type(other)):
        return False
    if mapped.is_mapped(kind):
        return value is other
    names = _compared(kind)
    if names is not None:
        for name in names:  # noqa: SIM110  a generator takes longer
            if not is_same(getattr(value, name), getattr(other, name)):
                return False
        return True
    match value:
        case datetime.datetime():
            if value.utcoffset() is None or other.utcoffset() is None:
                return _is_same_by_the_clock(value, other)
            return bool(value.astimezone(datetime.UTC) == other.astimezone(datetime.UTC))
        case datetime.time():
            return _is_same_by_the_clock(value, other)
        case list() | tuple():
            return len(value) == len(other) and all(map(is_same, value, other))
        case dict():
            return list(value) == list(other) and all(
                map(is_same, (*value, *value.values()), (*other, *other.values()))
            )
        case set() | frozenset():
            items = {item: item for item in other}
            return len(value) == len(other) and all(
                item in items and is_same(item, items[item]) for item in value
            )
    names = _of_model(kind)
    return bool(value == other) and all(
        is_same(getattr(value, name), getattr(other, name)) for name in names
    )


def _is_same_by_the_clock(value: Any, other: Any) -> bool:
    """Return whether two times, or datetimes without an instant, are the same.

    Python calls them equal whatever their ``fold``, and a time in a zone whose offset depends on
    the day equal to one without a zone.
    """
    return bool(
        value == other
        and value.fold == other.fold
        and (value.tzinfo is None) == (other.tzinfo is None)
    )


@functools.lru_cache(maxsize=1024)
def _compared(kind: Any) -> tuple[str, ...] | None:
    """Return the fields that make two objects of a dataclass equal; None of another class."""
    if not dataclasses.is_dataclass(kind):
        return None
    return tuple(field.name for field in dataclasses.fields(kind) if field.compare)


@functools.lru_cache(maxsize=1024)
def _of_model(kind: Any) -> tuple[str, ...]:
    """Return the fields of a model of pydantic; none of another class."""
    return tuple(kind.model_fields) if _is_model(kind) else ()


def _is_model(kind: Any) -> bool:
    return callable(getattr(kind, "model_validate", None)) and hasattr(kind, "model_dump")


class Codec(NamedTuple):
    """How the values of an annotation travel.

    Both functions raise one of :data:`REFUSALS` for what they can't carry.

    Attributes:
        encode: returns what JSON carries instead of a value.
        decode: returns the value again.
        is_exact: returns whether a value that was encoded certainly comes back unchanged; False if
            that isn't known.
    """

    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any]
    is_exact: Callable[[Any], bool] = lambda _: False

    def carry(self, value: Any) -> tuple[Any, Any]:
        """Return what JSON carries instead of ``value``, and the value that comes back."""
        encoded = self.encode(value)
        return encoded, value if self.is_exact(value) else self.decode(encoded)


def codec_of(annotation: Any) -> Codec:
    """Return the codec of an annotation that is resolved: of a type, not a text.

    Raises:
        TypeError: no codec is known for it.
    """
    while True:
        if isinstance(annotation, typing.NewType):
            annotation = annotation.__supertype__
        elif typing.get_origin(annotation) is typing.Annotated:
            annotation = typing.get_args(annotation)[0]
        elif type(annotation).__name__ == "TypeAliasType":
            annotation = annotation.__value__
        else:
            break
    if annotation in (Any, object, Ellipsis) or isinstance(annotation, typing.TypeVar):
        return _UNKNOWN
    origin = typing.get_origin(annotation)
    arguments = typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return _union([codec_of(one) for one in arguments])
    if origin is typing.Literal:
        return _PLAIN
    kind = origin or annotation
    if kind is None:
        kind = types.NoneType
    if not isinstance(kind, type):
        raise TypeError(f"the annotation {annotation!r} isn't supported")
    kind = _real(kind)
    if kind in _SCALARS:
        return _exactly(kind)
    if kind in _SIMPLE:
        return _SIMPLE[kind]
    return _of_class(kind, arguments)


def _of_class(kind: type, arguments: tuple[Any, ...]) -> Codec:
    if mapped.is_mapped(kind):
        return Codec(lambda value: _instance(kind, value), mapped.of_mark)
    if issubclass(kind, enum.Flag):
        return Codec(lambda value: _checked(kind, value).value, kind)
    if issubclass(kind, enum.Enum):
        return Codec(lambda value: _checked(kind, value).name, lambda name: kind[name])
    if issubclass(kind, tuple):
        return _tuple(kind, arguments)
    if kind in _COLLECTIONS:
        [item] = map(codec_of, arguments or (Any,))
        make = _COLLECTIONS[kind]
        return Codec(
            lambda value: [item.encode(each) for each in _checked(make, value)],
            lambda items: make(item.decode(each) for each in _checked(list, items)),
        )
    if kind in (dict, collections.abc.Mapping, collections.abc.MutableMapping):
        return _dict(*map(codec_of, arguments or (Any, Any)))
    if _is_model(kind):
        validate: Any = kind
        return Codec(
            lambda value: _checked(kind, value).model_dump(mode="json", by_alias=True),
            lambda value: validate.model_validate(value),
        )
    if dataclasses.is_dataclass(kind):
        return _dataclass(kind)
    raise TypeError(f"a {kind.__qualname__} can't be carried")


def _checked(kind: type, value: Any) -> Any:
    if not isinstance(value, kind):
        raise TypeError(f"it is a {type(value).__qualname__}, not a {kind.__qualname__}")
    return value


def _instance(kind: type, value: Any) -> Any:
    return mapped.mark_of(_checked(kind, value))


def _always(_: Any) -> bool:
    return True


def _exactly(kind: type) -> Codec:
    def same(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"it is a {type(value).__qualname__}, not a {kind.__qualname__}")
        return value

    return Codec(same, same, _always)


def _only_plain(value: Any) -> Any:
    if not is_plain(value):
        raise TypeError(
            f"a {type(value).__qualname__} needs a parameter whose annotation says what it is"
        )
    return value


def _encode_unknown(value: Any) -> Any:
    return mapped.mark_of(value) if mapped.is_instance(value) else _only_plain(value)


def _decode_unknown(value: Any) -> Any:
    return mapped.of_mark(value) if mapped.is_mark(value) else value


_PLAIN = Codec(_only_plain, _only_plain)
_UNKNOWN = Codec(_encode_unknown, _decode_unknown)


def _union(members: list[Codec]) -> Codec:
    def first(name: str, value: Any) -> Any:
        why: Exception | None = None
        for member in members:
            try:
                return getattr(member, name)(value)
            except REFUSALS as error:
                why = why or error
        raise TypeError(f"it fits none of the annotation's types: {why}")

    return Codec(lambda value: first("encode", value), lambda value: first("decode", value))


def _tuple(kind: type, arguments: tuple[Any, ...]) -> Codec:
    make: Callable[[Any], Any] = kind
    fields = getattr(kind, "_fields", None)
    if fields is not None:
        hints = typing.get_type_hints(kind)
        arguments = tuple(hints.get(name, Any) for name in fields)
        make = kind._make  # type: ignore[attr-defined]  # of a named tuple
    if fields is None and (not arguments or arguments[1:] == (Ellipsis,)):
        item = codec_of(arguments[0] if arguments else Any)
        return Codec(
            lambda value: [item.encode(each) for each in _checked(kind, value)],
            lambda items: make([item.decode(each) for each in _checked(list, items)]),
        )
    items = [codec_of(one) for one in arguments]
    return Codec(
        lambda value: [
            codec.encode(each) for codec, each in zip(items, _checked(kind, value), strict=True)
        ],
        lambda values: make(
            [codec.decode(each) for codec, each in zip(items, _checked(list, values), strict=True)]
        ),
    )


def _dict(key: Codec, item: Codec) -> Codec:
    """Return the codec of a dict: as pairs, since JSON's keys are strings."""
    return Codec(
        lambda value: [
            [key.encode(name), item.encode(each)] for name, each in _checked(dict, value).items()
        ],
        lambda pairs: {key.decode(name): item.decode(each) for name, each in _checked(list, pairs)},
    )


def _dataclass(kind: Any) -> Codec:
    hints = typing.get_type_hints(kind)
    codecs: dict[str, Codec] = {}  # filled when first needed: a class may name itself

    def fields() -> dict[str, Codec]:
        if not codecs:
            codecs.update(
                {
                    field.name: codec_of(hints[field.name])
                    for field in dataclasses.fields(kind)
                    if field.init
                }
            )
        return codecs

    def encode(value: Any) -> Any:
        if type(value) is not kind:
            raise TypeError(f"it is a {type(value).__qualname__}, not a {kind.__qualname__}")
        return {
            name: codec.encode(getattr(value, name)) for name, codec in (codecs or fields()).items()
        }

    def decode(value: Any) -> Any:
        known, values = codecs or fields(), {}
        for name, each in _checked(dict, value).items():
            codec = known.get(name)
            if codec is None:
                raise ValueError(f"{kind.__qualname__} has no field {name!r:.60}")
            values[name] = codec.decode(each)
        return kind(**values)

    def is_exact(value: Any) -> bool:
        for name, codec in (codecs or fields()).items():
            if codec.is_exact is not _always and not codec.is_exact(getattr(value, name)):
                return False
        return True

    return Codec(encode, decode, is_exact) if _is_made_of_fields(kind) else Codec(encode, decode)


def _is_made_of_fields(kind: Any) -> bool:
    """Return whether objects of a dataclass are what their fields are, by code of dataclasses.

    Any code of its own may change a field, or need more than the fields.
    """
    fields = dataclasses.fields(kind)
    code = getattr(vars(kind).get("__init__"), "__code__", None)
    return (
        code is not None
        and code.co_qualname.startswith("__create_fn__.")  # dataclasses has made it
        and not hasattr(kind, "__post_init__")
        and kind.__new__ is object.__new__
        and type(kind).__call__ is type.__call__
        and (kind.__setattr__ is object.__setattr__ or kind.__dataclass_params__.frozen)
        and len(kind.__dataclass_fields__) == len(fields)  # else there is an InitVar, or a ClassVar
        and all(field.init and not _is_computed(kind, field.name) for field in fields)
    )


def _is_computed(kind: type, name: str) -> bool:
    found = inspect.getattr_static(kind, name, None)
    return inspect.isdatadescriptor(found) and not inspect.ismemberdescriptor(found)


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(_checked(str, text), validate=True)
    except binascii.Error as error:
        raise ValueError(f"it isn't base64: {error}") from None


def _decimal(text: str) -> decimal.Decimal:
    try:
        return decimal.Decimal(_checked(str, text))
    except decimal.InvalidOperation:
        raise ValueError(f"{text!r:.60} isn't a decimal number") from None


def _text_of(kind: type) -> Callable[[Any], str]:
    def text(value: Any) -> str:
        if type(value) is not kind and _real(type(value)) is not kind:
            raise TypeError(f"it is a {type(value).__qualname__}, not a {kind.__qualname__}")
        return write(value)

    write: Callable[[Any], str] = getattr(kind, "isoformat", str)
    return text


def _text_of_decimal(value: Any) -> str:
    if type(value) is not decimal.Decimal:
        raise TypeError(f"it is a {type(value).__qualname__}, not a Decimal")
    # A NaN is not equal to itself, and comparing a signaling one raises an error.
    if value.is_nan():
        raise ValueError("it is not a number")
    return str(value)


def _is_of(kind: type) -> Callable[[Any], bool]:
    return lambda value: type(value) is kind


def _iso(kind: Any) -> Codec:
    read = kind.fromisoformat
    return Codec(_text_of(kind), lambda text: read(_checked(str, text)))


_SIMPLE: dict[type, Codec] = {
    datetime.datetime: _iso(datetime.datetime),
    datetime.date: _iso(datetime.date)._replace(is_exact=_is_of(datetime.date)),
    datetime.time: _iso(datetime.time),
    datetime.timedelta: Codec(
        lambda value: _checked(datetime.timedelta, value) // _MICROSECOND,
        lambda count: datetime.timedelta(microseconds=_checked(int, count)),
    ),
    decimal.Decimal: Codec(_text_of_decimal, _decimal, _is_of(decimal.Decimal)),
    uuid.UUID: Codec(
        _text_of(uuid.UUID), lambda text: uuid.UUID(_checked(str, text)), _is_of(uuid.UUID)
    ),
    bytes: Codec(
        lambda value: base64.b64encode(_checked(bytes, value)).decode(),
        _from_base64,
        _is_of(bytes),
    ),
}

_COLLECTIONS: dict[Any, Any] = {
    list: list,
    set: set,
    frozenset: frozenset,
    collections.abc.Sequence: list,
    collections.abc.MutableSequence: list,
    collections.abc.Iterable: list,
    collections.abc.Collection: list,
    collections.abc.Set: set,
    collections.abc.MutableSet: set,
}
