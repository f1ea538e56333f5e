"""The event that a consumer gets, decoded from a delivery or from a message of aio-pika."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from outbox.event import Event
from outbox.messages.cloud_events import (
    NotACloudEvent,
    attributes_of,
    is_structured,
    structured,
)
from outbox.messages.dead_letters import restore_origin
from outbox.messages.delivery import Delivery, restore_delayed
from outbox.messages.headers import (
    ATTEMPT,
    DELAY_EXCHANGE,
    FIRST_FAILURE,
    HEADER_KEY,
    SCHEDULED_FOR,
    TASK,
    is_brokers_own,
)
from outbox.serializer import JSONSerializer, serializer_for

__all__ = ["ReceivedEvent", "Undecodable", "decode"]

_RESERVED = "outbox-"
_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)


class Undecodable(ValueError):
    """A message that cannot be decoded for a consumer; the text says why."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ReceivedEvent(Event):
    """An event as a consumer gets it.

    If the sender left them out, ``id`` is new at each delivery, and ``occurred_at`` is the time of
    receipt. ``headers`` are the sender's, without those of outbox and the broker; they come from
    outside and may hold anything.

    Attributes:
        queue: the queue it was consumed from.
        attempt: the number of this attempt, 1 for the first.
        redelivered: whether it may have been delivered before; only a hint.
        first_failure: the time at which the first attempt failed; None if this is the first.
        task: the name of the task that it calls; empty for other events. It comes from outside.
        scheduled_for: the time (aware) at which a recurring task was to run; None for all else. It
            comes from outside, too.
    """

    queue: str = ""
    attempt: int = 1
    redelivered: bool = False
    first_failure: datetime.datetime | None = None
    task: str = ""
    scheduled_for: datetime.datetime | None = None
    _payload: Any = field(default=None, kw_only=True)

    @property
    def payload(self) -> Any:
        """The payload, decoded only once: every access returns the same object.

        Of a CloudEvent that is the body as a whole, it is the data: bytes if that is in base64 and
        no serializer is registered for its content type.

        Raises:
            ValueError: it can't be decoded. Only an event that is made from a message of another
                client raises it; a consumer gets none whose payload can't be decoded.
        """
        payload = self._payload
        if type(payload) is _Encoded:
            payload = decode(payload.delivery).payload
            object.__setattr__(self, "_payload", payload)
        return payload

    @property
    def cloudevent(self) -> Mapping[str, Any] | None:
        """The attributes of the CloudEvent that the message is, or None; read at every access.

        Names in lower case, such as ``id``, ``source``, ``type`` and ``datacontenttype``, to str,
        bool or int; ``time`` is RFC 3339.
        """
        return attributes_of(self.headers, self.content_type, self.body)

    @staticmethod
    def from_aio_pika(message: Any, *, queue: str = "") -> ReceivedEvent:
        """Return a message of aio-pika as a consumer would get it. Nothing is settled.

        For programs that keep their own loops over aio-pika. The payload is decoded at the first
        access to it, so that this raises nothing for a message with other content.

        Args:
            message: an ``aio_pika.abc.AbstractIncomingMessage``, from a consumer, an iterator or
                ``get()``. aio-pika doesn't distinguish a priority of 0 from none: both are None
                here.
            queue: the queue it was consumed from, which the message doesn't name.
        """
        timestamp = message.timestamp
        try:
            headers = _with_bytes(message.headers)
        except RecursionError:  # a consumer would dead-letter it
            headers = None
        delivery = Delivery(
            queue=queue,
            tag=message.delivery_tag or 0,
            generation=0,
            redelivered=bool(message.redelivered),
            exchange=message.exchange or "",
            target=message.routing_key or "",
            body=message.body,
            content_type=message.content_type,
            content_encoding=message.content_encoding,
            headers=headers or None,
            message_id=message.message_id,
            priority=message.priority or None,
            timestamp=None if timestamp is None else int(timestamp.timestamp()),
        )
        if delivery.headers and DELAY_EXCHANGE in delivery.headers:
            restore_delayed(delivery)
        if not delivery.exchange:
            restore_origin(delivery)
        try:
            return decode(delivery, lazily=True)
        except Undecodable:  # as above
            delivery.headers = None
            return decode(delivery, lazily=True)


@dataclass(frozen=True, slots=True)
class _Encoded:
    """A payload that is decoded when it is needed."""

    delivery: Delivery


def decode(delivery: Delivery, *, lazily: bool = False) -> ReceivedEvent:
    """Return ``delivery`` as an event. Nothing in it is imported or executed.

    A message without a content type is decoded as JSON.

    Args:
        delivery: the message.
        lazily: whether to leave its payload until the first access, which raises what this would.

    Raises:
        Undecodable: the message is compressed, no serializer is registered for its content type,
            the body is not valid for it, or the headers are nested too deeply.
    """
    content_type = delivery.content_type or JSONSerializer.content_type
    payload: Any
    if lazily:
        payload = _Encoded(delivery)
    elif delivery.content_encoding and delivery.is_encoded:
        raise Undecodable(f"its content encoding {delivery.content_encoding!r} is not supported")
    elif content_type != JSONSerializer.content_type and is_structured(content_type):
        payload = _data_of(delivery, content_type)
    else:
        serializer = serializer_for(content_type)
        if serializer is None:
            raise Undecodable(
                f"no serializer is registered for {content_type!r}; "
                "pass one to configure(serializer=...)"
            )
        try:
            payload = serializer.decode(delivery.body)
        except Exception as error:
            raise Undecodable(f"its body is not valid {content_type}: {error}") from error
    headers = delivery.headers
    senders: dict[str, Any] = {}
    key: Any = None
    task: Any = ""
    if headers:
        try:
            senders = {name: _plain(value) for name, value in headers.items() if _is_senders(name)}
        except RecursionError:
            raise Undecodable("its headers are nested too deeply") from None
        key = headers.get(HEADER_KEY)
        task = headers.get(TASK)
    return ReceivedEvent(
        id=delivery.message_id or delivery.id_or_new,
        target=delivery.target,
        exchange=delivery.exchange,
        body=delivery.body,
        content_type=content_type,
        headers=senders,
        priority=delivery.priority,
        key=key if isinstance(key, str) else None,
        occurred_at=delivery.read_times(),
        queue=delivery.queue,
        attempt=delivery.attempt if headers and ATTEMPT in headers else 1,
        redelivered=delivery.redelivered,
        first_failure=delivery.first_failure if headers and FIRST_FAILURE in headers else None,
        task=task if isinstance(task, str) else "",
        scheduled_for=(
            _scheduled_for(headers[SCHEDULED_FOR]) if headers and SCHEDULED_FOR in headers else None
        ),
        _payload=payload,
    )


def _scheduled_for(microseconds: Any) -> datetime.datetime | None:
    if type(microseconds) is not int:
        return None
    try:
        return _EPOCH + datetime.timedelta(microseconds=microseconds)
    except OverflowError:
        return None


def _data_of(delivery: Delivery, content_type: str) -> Any:
    try:
        return structured(content_type, delivery.body).payload
    except NotACloudEvent as error:
        raise Undecodable(str(error)) from error


def _plain(value: Any) -> Any:
    """Return ``value`` with plain ints instead of the driver's subclasses."""
    match value:
        case bool():
            return value
        case int():
            return int(value)
        case list():
            return [_plain(item) for item in value]
        case dict():
            return {name: _plain(item) for name, item in value.items()}
    return value


def _with_bytes(value: Any) -> Any:
    """Return headers that pamqp has decoded with bytes instead of bytearrays, as pika has them."""
    match value:
        case bytearray():
            return bytes(value)
        case list():
            return [_with_bytes(item) for item in value]
        case dict():
            return {name: _with_bytes(item) for name, item in value.items()}
    return value


def _is_senders(name: Any) -> bool:
    return not isinstance(name, str) or not (name.startswith(_RESERVED) or is_brokers_own(name))
