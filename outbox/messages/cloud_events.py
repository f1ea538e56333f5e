"""CloudEvents 1.0: the attributes that an event is published with, and those of a message.

The binding for AMQP is for AMQP 1.0, with names that begin with ``cloudEvents_`` or
``cloudEvents:``. For AMQP 0-9-1 the list of proprietary bindings names that of RabbitMQ, with
``ce-``, where all values are strings. Both are read.
"""

from __future__ import annotations

import base64
import binascii
import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from outbox.errors import InvalidEvent
from outbox.event import Event
from outbox.messages.expiry import expires_at
from outbox.serializer import JSONSerializer, serializer_for
from outbox.settings import Envelope

__all__ = [
    "NotACloudEvent",
    "Structured",
    "attributes_in",
    "attributes_of",
    "headers_with_attributes",
    "is_structured",
    "structured",
    "time_of",
]

_PREFIXES = ("ce-", "cloudevents_", "cloudevents:")  # compared in lower case
_WRITTEN: dict[str, str] = {"cloudevents": "ce-", "cloudevents-amqp": "cloudEvents_"}
_REQUIRED = ("specversion", "id", "source", "type")
_STRUCTURED = "application/cloudevents"
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class NotACloudEvent(ValueError):
    """A message that says it is a CloudEvent, and can't be read as one; the text is the reason."""


# --------------------------------------------------------------------------------- publishing


def headers_with_attributes(event: Event, envelope: Envelope, source: str) -> dict[str, Any]:
    """Return the headers of ``event`` with the attributes of its CloudEvent.

    Headers of the caller that are attributes, such as ``ce-subject``, win over ours.

    Args:
        event: the event; its headers are checked.
        envelope: ``"cloudevents"`` or ``"cloudevents-amqp"``.
        source: the attribute ``source``.

    Raises:
        InvalidEvent: the caller's headers have an attribute with another prefix, or one whose name
            or value a CloudEvent can't have.
    """
    prefix = _WRITTEN[envelope]
    attributes: dict[str, Any] = {
        "specversion": "1.0",
        "id": event.id,
        "source": source,
        "type": event.target,
        "time": _rfc3339(event.occurred_at),
    }
    if event.key:
        attributes["partitionkey"] = event.key
    expiry = expires_at(event.headers)
    if expiry is not None:
        attributes["expirytime"] = _rfc3339(expiry)
    headers: dict[str, Any] = {}
    for name, value in event.headers.items():
        lower = name.lower()
        if lower.startswith(_PREFIXES):
            attributes[_checked_name(name, prefix)] = _checked_value(name, value, prefix)
        else:
            headers[name] = value
            if lower in ("traceparent", "tracestate") and isinstance(value, str):
                attributes.setdefault(lower, value)
    headers.update({prefix + name: value for name, value in attributes.items()})
    return headers


def _checked_name(name: str, prefix: str) -> str:
    attribute = name[len(prefix) :]
    if not name.startswith(prefix) or not _is_name(attribute):
        raise InvalidEvent(
            f"the header {name!r} is not an attribute that this envelope can have: that is "
            f"{prefix!r} and lower-case letters and digits, such as {prefix + 'subject'!r}"
        )
    if attribute in ("data", "datacontenttype"):
        raise InvalidEvent(f"the header {name!r} is not an attribute: the event's body has it")
    return attribute


def _checked_value(name: str, value: Any, prefix: str) -> Any:
    if isinstance(value, str) and value:
        return value
    if isinstance(value, bool | int):
        if prefix != "ce-":
            return value
        return str(value).lower()  # the binding of RabbitMQ has only strings
    raise InvalidEvent(f"the header {name!r} is {value!r:.80}, which no attribute can be")


def _is_name(attribute: str) -> bool:
    return attribute.isascii() and attribute.isalnum() and attribute == attribute.lower()


def _rfc3339(moment: datetime.datetime) -> str:
    return moment.astimezone(datetime.UTC).isoformat().replace("+00:00", "Z")


# ------------------------------------------------------------------------------------ reading


def is_structured(content_type: str) -> bool:
    """Return whether a message of this type holds a CloudEvent as a whole, or a batch of them."""
    return content_type[: len(_STRUCTURED)].lower() == _STRUCTURED


@dataclass(frozen=True, slots=True)
class Structured:
    """A CloudEvent that is the body of a message.

    Attributes:
        attributes: its attributes, see :func:`attributes_of`; empty if it is none, but other JSON.
        payload: its data, decoded; the body if it isn't a CloudEvent.
    """

    attributes: Mapping[str, Any]
    payload: Any


def structured(content_type: str, body: bytes) -> Structured:
    """Return the CloudEvent in a body, in JSON.

    Data in base64 is bytes, unless a serializer is registered for its content type.

    Raises:
        NotACloudEvent: it is in another format, invalid, or a batch.
    """
    name = content_type.partition(";")[0].strip().lower()
    if name.startswith(f"{_STRUCTURED}-batch"):
        raise NotACloudEvent("it is a batch of CloudEvents; send each as a message")
    if name != f"{_STRUCTURED}+json":
        raise NotACloudEvent(f"the format {content_type!r} is not supported; send JSON")
    try:
        whole = JSONSerializer().decode(body)
    except ValueError as error:
        raise NotACloudEvent(f"its body is not valid JSON: {error}") from error
    if not isinstance(whole, dict):
        return Structured({}, whole)
    members = {name: value for name, value in whole.items() if value is not None}
    data = _Data(
        members.get("datacontenttype"),
        members.pop("data", None),
        members.pop("data_base64", None),
    )
    attributes = _valid(members.items())
    return Structured({}, whole) if attributes is None else Structured(attributes, data.decoded())


@dataclass(frozen=True, slots=True)
class _Data:
    """The data of a structured CloudEvent, and its type."""

    content_type: Any
    data: Any
    base64: Any

    def decoded(self) -> Any:
        if self.base64 is not None:
            return self._from_base64()
        if isinstance(self.data, str) and not self._is_json:
            try:
                return self._decode(self.data.encode(), self.data)
            except UnicodeEncodeError as error:  # JSON may hold half a pair of surrogates
                raise NotACloudEvent(f"its data is not valid Unicode: {error}") from error
        return self.data

    @property
    def _is_json(self) -> bool:
        if not isinstance(self.content_type, str):
            return True  # the default
        name = self.content_type.partition(";")[0].strip().lower()
        return name.endswith(("/json", "+json"))

    def _from_base64(self) -> Any:
        if self.data is not None:
            raise NotACloudEvent("it has both data and data_base64")
        try:
            data = base64.b64decode(self.base64, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise NotACloudEvent(f"its data_base64 is invalid: {error}") from error
        return self._decode(data, data)

    def _decode(self, data: bytes, otherwise: Any) -> Any:
        named = isinstance(self.content_type, str)
        serializer = serializer_for(self.content_type) if named else None
        if serializer is None:
            return otherwise
        try:
            return serializer.decode(data)
        except Exception as error:
            raise NotACloudEvent(f"its data is not valid {self.content_type}: {error}") from error


def attributes_in(headers: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the attributes in a message's headers, or None if it isn't a CloudEvent.

    That is also a message in which prefixes are mixed, or without a required attribute.
    """
    entries: list[tuple[str, Any]] = []
    prefixes = set()
    for name, value in headers.items():
        lower = name.lower() if isinstance(name, str) else ""
        if lower.startswith(_PREFIXES):
            [prefix] = [prefix for prefix in _PREFIXES if lower.startswith(prefix)]
            prefixes.add(prefix)
            entries.append((lower[len(prefix) :], value))
    if len(prefixes) != 1 or len({name for name, _ in entries}) != len(entries):
        return None
    return _valid(entries)


def attributes_of(
    headers: Mapping[str, Any], content_type: str | None, body: bytes
) -> dict[str, Any] | None:
    """Return the attributes of a message's CloudEvent, in headers or the body, or None.

    ``time`` is a string (RFC 3339), other values are str, bool or int, and names are in lower case.
    """
    if content_type is not None and is_structured(content_type):
        try:
            return dict(structured(content_type, body).attributes) or None
        except NotACloudEvent:
            return None
    attributes = attributes_in(headers)
    if attributes is not None and content_type is not None:
        attributes["datacontenttype"] = content_type
    return attributes


def time_of(attributes: Mapping[str, Any]) -> datetime.datetime | None:
    """Return the time of a CloudEvent (aware), if it has one that can be read."""
    try:
        moment = datetime.datetime.fromisoformat(attributes["time"])
        return moment.astimezone(datetime.UTC) if moment.tzinfo is not None else None
    except (KeyError, TypeError, ValueError, OverflowError):
        return None


def _valid(entries: Iterable[tuple[Any, Any]]) -> dict[str, Any] | None:
    """Return attributes, or None if they aren't those of a CloudEvent 1.x."""
    attributes: dict[str, Any] = {}
    for name, value in entries:
        if name == "time":
            value = _time(value)
        if isinstance(value, int) and not isinstance(value, bool):
            value = int(value)  # a driver may have a class for each of AMQP's integers
        if not isinstance(name, str) or not isinstance(value, str | bool | int):
            return None
        attributes[name.lower()] = value
    if not all(isinstance(attributes.get(name), str) and attributes[name] for name in _REQUIRED):
        return None
    return attributes if attributes["specversion"].startswith("1.") else None


def _time(value: Any) -> Any:
    """Return a time as text; in AMQP 1.0 it may be a timestamp, which is in milliseconds."""
    try:
        if isinstance(value, int):
            return _rfc3339(_EPOCH + datetime.timedelta(milliseconds=value))
        if isinstance(value, datetime.datetime):
            aware = value if value.tzinfo is not None else value.replace(tzinfo=datetime.UTC)
            return _rfc3339(aware)
    except OverflowError:
        return None
    return value
