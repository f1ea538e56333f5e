"""Serializers: payloads to bytes and back.

Payloads are serialised when the event is enqueued: changing the object later doesn't change what
is sent, and a payload that cannot be carried fails in the caller's line.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

__all__ = ["JSONSerializer", "Serializer", "register", "serializer_for"]


class Serializer(Protocol):
    """The interface of a serializer.

    ``content_type`` is the message's MIME type, at most 255 bytes. ``encode`` raises ``TypeError``
    or ``ValueError`` for a payload that it cannot carry; ``decode`` raises ``ValueError`` for a
    body that it cannot read. Both must be safe to call from any thread.
    """

    content_type: str

    def encode(self, payload: Any) -> bytes:
        """Return the body for ``payload``."""
        ...

    def decode(self, body: bytes) -> Any:
        """Return the payload that ``body`` carries."""
        ...


def _check_keys(value: Any) -> None:
    """Reject keys that are not strings: ``{1: ..., "1": ...}`` would give the same key twice."""
    if isinstance(value, dict):
        for key in value:
            if type(key) is not str and not isinstance(key, str):
                raise TypeError(f"the key {key!r} is a {type(key).__name__}, not a string")
        value = value.values()
    for item in value:
        if type(item) not in _SCALARS and isinstance(item, (dict, list, tuple)):
            _check_keys(item)


_SCALARS = frozenset((str, int, float, bool, type(None)))


def _default(value: Any) -> Any:
    """Return what to encode instead of ``value``, whose type JSON does not have."""
    match value:
        case datetime.datetime() | datetime.date() | datetime.time():
            return value.isoformat()
        case decimal.Decimal() | uuid.UUID():
            return str(value)
        case enum.Enum():
            return value.value
    kind = type(value)
    if "__pydantic_serializer__" in vars(kind) and dataclasses.is_dataclass(value):
        # Not for a dataclass that only inherits it: its own fields would be missing.
        options = _by_alias(kind.__pydantic_config__)
        plain = kind.__pydantic_serializer__.to_python(value, mode="json", **options)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        plain = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    elif callable(getattr(kind, "model_dump", None)):  # pydantic 2
        plain = value.model_dump(mode="json", **_by_alias(getattr(kind, "model_config", None)))
    elif isinstance(value, Mapping):
        plain = dict(value)
    else:
        raise TypeError(
            f"a {kind.__qualname__} cannot be carried as JSON; convert it, "
            "or set another serializer with configure(serializer=...)"
        )
    if isinstance(plain, dict | list | tuple):
        _check_keys(plain)
    return plain


def _by_alias(config: Any) -> dict[str, bool]:
    """Return pydantic's option for the names of the fields, from a model's configuration.

    Aliases are the names in pydantic's JSON Schema and in FastAPI's responses; ``model_dump`` uses
    them only on request. A model that says what it wants gets that.
    """
    if not isinstance(config, dict) or "serialize_by_alias" in config:
        return {}
    return {"by_alias": True}


def _quick_encoder() -> Callable[[Any, int], Sequence[str]] | None:
    """Return the C encoder that ``JSONEncoder.encode`` makes for each call, made once; or None.

    It doesn't look for structures that contain themselves, where it exceeds the recursion limit.
    """
    make = getattr(json.encoder, "c_make_encoder", None)
    text = getattr(json.encoder, "encode_basestring", None)
    if make is None or text is None:  # another implementation of Python
        return None
    try:
        encoder: Callable[[Any, int], Sequence[str]] = make(
            None, _default, text, None, ":", ",", False, False, False
        )
        return encoder if "".join(encoder({"a": [1, "é"]}, 0)) == '{"a":[1,"é"]}' else None
    except TypeError:  # it is made in another way
        return None


class JSONSerializer:
    """JSON by RFC 8259, UTF-8, compact.

    Beyond the types of :mod:`json` it writes ``datetime``, ``date`` and ``time`` (ISO 8601),
    ``Decimal`` and ``UUID`` (as strings), enum members (their value), dataclasses and pydantic
    models (as objects). The fields of a pydantic model, or of a pydantic dataclass, have their
    aliases as names, unless the model's configuration sets ``serialize_by_alias`` to False; the
    outermost model's counts. It rejects NaN and infinities, keys that are not strings, and lone
    surrogates, since other readers could not read them. Decoding returns plain JSON types.
    """

    content_type = "application/json"

    def __init__(self) -> None:
        self._encode = json.JSONEncoder(
            ensure_ascii=False, allow_nan=False, separators=(",", ":"), default=_default
        ).encode
        self._encode_quickly = _quick_encoder()
        self._decoder = json.JSONDecoder(parse_constant=_refuse_constant)

    def encode(self, payload: Any) -> bytes:
        """Return ``payload`` as JSON in UTF-8.

        Raises:
            TypeError: a value or a key has a type that JSON does not have.
            ValueError: NaN, an infinity, a lone surrogate, or a structure that contains itself.
        """
        try:
            if type(payload) is dict and self._encode_quickly is not None:
                try:
                    text = "".join(self._encode_quickly(payload, 0))
                except RecursionError:  # nested too deeply, or contains itself: say which
                    text = self._encode(payload)
                _check_keys(payload)
            else:
                text = self._encode(payload)
                if isinstance(payload, (dict, list, tuple)):
                    _check_keys(payload)
            return text.encode()
        except RecursionError:
            raise ValueError("the payload is nested too deeply") from None
        except (TypeError, ValueError) as error:
            path = self._path_to_fault(payload)
            if not path:
                raise
            kind = TypeError if isinstance(error, TypeError) else ValueError
            raise kind(f"{error} (at payload{path})") from error

    def _path_to_fault(self, payload: Any) -> str:
        """Return the subscripts that lead to what cannot be encoded in ``payload``."""
        path = ""
        seen: list[Any] = []  # by identity: a structure may contain itself
        while not any(payload is one for one in seen):
            seen.append(payload)
            items: Iterable[tuple[Any, Any]]
            match payload:
                case dict():
                    items = payload.items()
                case list() | tuple():
                    items = enumerate(payload)
                case _ if isinstance(payload, Mapping) or dataclasses.is_dataclass(payload):
                    try:
                        payload = _default(payload)
                    except (TypeError, ValueError):
                        return path
                    continue
                case _:
                    return path
            for key, item in items:
                if not self._can_encode(item):
                    path += f"[{key!r}]"
                    payload = item
                    break
            else:
                return path  # a key of this one
        return path

    def _can_encode(self, value: Any) -> bool:
        try:
            text = self._encode(value)
            if isinstance(value, (dict, list, tuple)):
                _check_keys(value)
            text.encode()
        except (TypeError, ValueError, RecursionError):
            return False
        return True

    def decode(self, body: bytes) -> Any:
        """Return the value in ``body``.

        Raises:
            ValueError: ``body`` is not JSON in UTF-8, or holds ``NaN`` or an infinity.
        """
        try:
            text = body.decode()
            try:
                value, end = self._decoder.raw_decode(text)
                if end == len(text):
                    return value
            except ValueError:
                pass
            return self._decoder.decode(text)  # there is whitespace around it, or an error
        except RecursionError:
            raise ValueError("the body is nested too deeply") from None
        except ValueError:
            if body.startswith(_BOM):  # a reader may ignore it (RFC 8259, section 8.1)
                return self.decode(body[len(_BOM) :])
            raise


_BOM = b"\xef\xbb\xbf"


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_by_content_type: dict[str, Serializer] = {JSONSerializer.content_type: JSONSerializer()}


def register(serializer: Serializer) -> None:
    """Decode bodies of ``serializer.content_type`` with it from now on, process-wide."""
    _by_content_type[serializer.content_type] = serializer


def serializer_for(content_type: str | None) -> Serializer | None:
    """Return the serializer of ``content_type`` (ignoring parameters like ``charset``), or None.

    A type that ends with ``+json`` is read as JSON unless it has a serializer (RFC 6839).
    """
    if content_type is None:
        return None
    serializer = _by_content_type.get(content_type)
    if serializer is None:
        name = content_type.partition(";")[0].strip().lower()
        serializer = _by_content_type.get(name)
        if serializer is None and name.endswith("+json"):
            serializer = _by_content_type[JSONSerializer.content_type]
    return serializer
