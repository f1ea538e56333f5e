"""The event that a consumer gets, decoded from a delivery."""

from __future__ import annotations

import datetime
from dataclasses import dataclass, field
from typing import Any

from outbox import Event
from outbox.ids import new_id
from outbox.messages.delivery import Delivery
from outbox.messages.headers import HEADER_KEY, is_brokers_own
from outbox.serializer import JSONSerializer, serializer_for

__all__ = ["ReceivedEvent", "Undecodable", "decode"]

_RESERVED = "outbox-"


class Undecodable(Exception):
    """A message that no consumer can be given; the text says why."""


@dataclass(frozen=True, slots=True, repr=False, eq=False)
class ReceivedEvent(Event):
    """An event as a consumer gets it.

    What the sender left out: ``id`` is then a new one each time the message is delivered, and
    ``occurred_at`` the time of receipt. ``headers`` are the sender's, without outbox's own; they
    come from outside and may hold anything. What a broker has written about the message's way is
    not among them.

    Attributes:
        queue: where it was consumed from.
        attempt: 1 for the first attempt to process it.
        redelivered: whether it may have been delivered before; a hint, no more.
        first_failure: when the first attempt failed, if there was one before this.
    """

    queue: str = ""
    attempt: int = 1
    redelivered: bool = False
    first_failure: datetime.datetime | None = None
    _payload: Any = field(default=None, kw_only=True)

    @property
    def payload(self) -> Any:
        """The payload, decoded once: consumers of the event share it."""
        return self._payload


def decode(delivery: Delivery) -> ReceivedEvent:
    """Return ``delivery`` as an event. Nothing is imported, and nothing of it is executed.

    A message without a content type is taken for JSON.

    Raises:
        Undecodable: the message is compressed, nothing decodes its content type, the body is
            not what the content type says, or its headers are nested too deeply.
    """
    content_type = delivery.content_type or JSONSerializer.content_type
    if delivery.content_encoding not in (None, "", "utf-8", "UTF-8", "identity"):
        raise Undecodable(f"its content encoding {delivery.content_encoding!r} is not known")
    serializer = serializer_for(content_type)
    if serializer is None:
        raise Undecodable(f"nothing decodes its content type {content_type!r}")
    try:
        payload = serializer.decode(delivery.body)
    except Exception as error:
        raise Undecodable(f"its body is not {content_type}: {error}") from error
    headers = delivery.headers or {}
    try:
        senders = {name: _plain(value) for name, value in headers.items() if _is_senders(name)}
    except RecursionError:
        raise Undecodable("its headers are nested too deeply") from None
    key = headers.get(HEADER_KEY)
    return ReceivedEvent(
        id=delivery.message_id or new_id(),
        target=delivery.target,
        exchange=delivery.exchange,
        body=delivery.body,
        content_type=content_type,
        headers=senders,
        priority=delivery.priority,
        key=key if isinstance(key, str) else None,
        occurred_at=delivery.occurred_at,
        queue=delivery.queue,
        attempt=delivery.attempt,
        redelivered=delivery.redelivered,
        first_failure=delivery.first_failure,
        _payload=payload,
    )


def _plain(value: Any) -> Any:
    """Return ``value`` without the driver's own number types."""
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


def _is_senders(name: Any) -> bool:
    return not isinstance(name, str) or not (name.startswith(_RESERVED) or is_brokers_own(name))
