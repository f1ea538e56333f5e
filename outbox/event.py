"""The event: what happened, serialised, with its address."""

from __future__ import annotations

import datetime
import inspect
import uuid
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, get_args

from outbox.errors import InvalidEvent, UsageError
from outbox.header_values import CheckedHeaders, _checked_headers, check_address
from outbox.ids import new_id
from outbox.messages.headers import (
    FORMAT_VERSION,
    HEADER_FORMAT,
    HEADER_KEY,
    HEADER_OCCURRED_AT,
    TASK,
)
from outbox.serializer import Serializer, serializer_for

if TYPE_CHECKING:
    import aio_pika

__all__ = [
    "Event",
    "Headers",
    "HeadersSource",
    "MakeId",
    "Unroutable",
    "add_headers",
    "headers_on_the_wire",
    "make_event",
    "set_headers",
]

Headers = Mapping[str, Any]
HeadersSource = Callable[[], Headers | None]
"""A function that returns headers for the event that is being enqueued."""

Unroutable = Literal["park", "fail", "ignore"]

MakeId = Callable[[str, str, str | None, bytes], str]
"""A function that makes an event's id from its exchange, target, key and body."""


_UTC = datetime.UTC
_datetime = datetime.datetime  # a module's attribute: freezegun replaces it, but no bound now()
_UNROUTABLE = get_args(Unroutable)
_LONGEST_NAME = 128  # bytes of a header's name, for pamqp


@dataclass(frozen=True, slots=True, repr=False)
class Event:
    """One event, ready to be published. Immutable; equal if all fields are equal.

    Attributes:
        id: a UUIDv7 string unless the caller chose another; the AMQP ``message_id``; the same in
            every attempt to publish.
        target: the routing key, 1 to 255 bytes in UTF-8.
        exchange: the exchange it is published to; ``""`` is the broker's default exchange.
        body: the serialised payload.
        content_type: the MIME type of ``body``.
        headers: the caller's headers: names to str, bytes, bool, int (64 bits), None, and lists
            and dicts of these; floats have become strings.
        priority: 0 to 255, or None for the queue's default.
        deliver_at: the instant before which it is not delivered (aware), or None.
        key: events with the same key belong together, in order; or None.
        occurred_at: the instant at which it was enqueued (aware, UTC, microseconds).
        unroutable: what to do when no queue is bound for it: ``"park"``, ``"fail"``, ``"ignore"``,
            or None for the publisher's setting.
    """

    id: str
    target: str
    exchange: str
    body: bytes
    content_type: str = "application/json"
    headers: Headers = field(default_factory=dict)
    priority: int | None = None
    deliver_at: datetime.datetime | None = None
    key: str | None = None
    occurred_at: datetime.datetime = field(default_factory=lambda: _datetime.now(_UTC))
    unroutable: Unroutable | None = None

    @property
    def payload(self) -> Any:
        """The payload, decoded from ``body`` at every access.

        Raises:
            UsageError: no serializer is registered for ``content_type``.
            ValueError: ``body`` is not valid for ``content_type``.
        """
        serializer = serializer_for(self.content_type)
        if serializer is None:
            raise UsageError(
                f"no serializer is registered for {self.content_type!r}; "
                "pass one to configure(serializer=...)"
            )
        return serializer.decode(self.body)

    def to_aio_pika(self, *, app_id: str | None = None) -> aio_pika.Message:
        """Return the event as a message for aio-pika, with what outbox writes to RabbitMQ.

        For programs that publish over aio-pika themselves: to the exchange ``event.exchange``, with
        ``event.target`` as the routing key. Wait for the confirm, and use ``mandatory``, as outbox
        does; nothing is published here. aio-pika writes the priority 0 if there is none.

        Args:
            app_id: AMQP's ``app-id``; outbox writes its setting ``app_id`` there.

        Raises:
            UsageError: the event is due later: only outbox can delay it. Or a header's name has
                more than 128 bytes: aio-pika would cut it.
        """
        if self.deliver_at is not None and self.deliver_at > _datetime.now(_UTC):
            raise UsageError(
                f"the event {self.id!r} is due at {self.deliver_at}, and a message that is "
                "published over aio-pika isn't delayed; publish it with outbox"
            )
        import aio_pika

        return aio_pika.Message(
            self.body,
            headers=_headers_for_pamqp(headers_on_the_wire(self)),
            content_type=self.content_type,
            delivery_mode=aio_pika.DeliveryMode.PERSISTENT,
            priority=self.priority,
            message_id=self.id,
            timestamp=int(self.occurred_at.timestamp()),
            type=self.headers.get(TASK) or self.target,
            app_id=app_id or None,
        )

    def __hash__(self) -> int:
        return hash((self.id, self.exchange, self.target))

    def __repr__(self) -> str:
        # Never the payload: events are logged. Escaped, since the caller may have chosen the id.
        return (
            f"<{type(self).__name__} {self.id!r} to {self.exchange!r}/{self.target!r}, "
            f"{len(self.body)} bytes>"
        )


def add_headers(sources: Iterable[HeadersSource], headers: Any) -> Any:
    """Return ``headers`` with those of ``sources`` that have other names.

    Args:
        sources: the functions that are asked, in this order; a later one wins.
        headers: the caller's, not checked.

    Raises:
        InvalidEvent: what a source has returned can't be carried; the message names the source.
        Exception: a source raised it.
    """
    added: dict[str, Any] = {}
    for source in sources:
        returned: Any = source()
        if returned is None:
            continue
        if inspect.iscoroutine(returned):
            returned.close()  # else Python warns that it was never awaited
        try:
            added.update(_checked_headers(returned))
        except InvalidEvent as error:
            raise InvalidEvent(f"what {source!r:.80} has returned: {error}") from error
    if headers is None or isinstance(headers, Mapping):  # else make_event() refuses it
        return {**added, **(headers or {})}
    return headers


def headers_on_the_wire(event: Event) -> dict[str, Any]:
    """Return all headers of ``event``, outbox's own included (``docs/wire-format.md``)."""
    headers = {**event.headers, HEADER_FORMAT: FORMAT_VERSION}
    if event.key is not None:
        headers[HEADER_KEY] = event.key
    headers[HEADER_OCCURRED_AT] = round(event.occurred_at.timestamp() * 1e6)
    return headers


def make_event(
    serializer: Serializer,
    max_body_bytes: int,
    make_id: MakeId | None,
    payload: Any,
    target: str,
    exchange: str,
    headers: Headers | None = None,
    key: str | None = None,
    priority: int | None = None,
    delay: float | datetime.timedelta | None = None,
    deliver_at: datetime.datetime | None = None,
    id: str | uuid.UUID | None = None,
    unroutable: Unroutable | None = None,
) -> Event:
    """Return the event; reject at once, in the caller's line, what no transport could carry.

    Raises:
        InvalidEvent: see :meth:`outbox.EventCollector.enqueue_event`.
    """
    if not (
        isinstance(target, str) and target.isascii() and len(target) <= 255 and "\0" not in target
    ):
        check_address("target", target)  # nearly every target is ASCII, and needs no encoding
    if not target:
        raise InvalidEvent("the target is empty; it is the routing key, such as 'order.placed'")
    try:
        body = serializer.encode(payload)
    except (TypeError, ValueError) as error:
        raise InvalidEvent(f"the payload for {target!r} cannot be carried: {error}") from error
    if type(body) is not bytes:
        body = _as_bytes(body, serializer)
    if len(body) > max_body_bytes:
        raise InvalidEvent(
            f"the payload for {target!r} has {len(body)} bytes, "
            f"more than max_body_bytes ({max_body_bytes}); store it elsewhere and send a reference"
        )
    if key is not None:
        check_address("key", key)
    if id is None:
        id = new_id() if make_id is None else make_id(exchange, target, key, body)
    else:
        id = str(id) if isinstance(id, uuid.UUID) else id
        check_address("id", id)
        if not id:
            raise InvalidEvent("the id is empty; leave it out to get a new one")
    if priority is not None and (
        not isinstance(priority, int) or isinstance(priority, bool) or not 0 <= priority <= 255
    ):
        raise InvalidEvent(f"the priority {priority!r} is not an int from 0 to 255")
    if unroutable is not None and unroutable not in _UNROUTABLE:
        raise InvalidEvent(f"unroutable={unroutable!r} is not one of {', '.join(_UNROUTABLE)}")
    now = _datetime.now(_UTC)
    if delay is not None or deliver_at is not None:
        deliver_at = _delivery_time(now, delay, deliver_at)
    event = _new(Event)
    # The __init__ of a frozen dataclass takes twice as long.
    _set_id(event, id)
    _set_target(event, target)
    _set_exchange(event, exchange)
    _set_body(event, body)
    _set_content_type(event, serializer.content_type)
    if type(headers) is not CheckedHeaders:
        headers = _checked_headers(headers) if headers else {}
    _set_headers(event, headers)
    _set_priority(event, priority)
    _set_deliver_at(event, deliver_at)
    _set_key(event, key)
    _set_occurred_at(event, now)
    _set_unroutable(event, unroutable)
    return event


_new = object.__new__
(
    _set_id,
    _set_target,
    _set_exchange,
    _set_body,
    _set_content_type,
    _set_headers,
    _set_priority,
    _set_deliver_at,
    _set_key,
    _set_occurred_at,
    _set_unroutable,
) = (getattr(Event, slot.name).__set__ for slot in fields(Event))


def set_headers(event: Event, headers: Headers) -> None:
    """Set the headers of an event that was only just made, and that no one else has seen."""
    _set_headers(event, headers)


def _headers_for_pamqp(value: Any) -> Any:
    """Return headers as pamqp, aio-pika's encoder, takes them."""
    match value:
        case bytes():
            return bytearray(value)  # it knows no bytes
        case list():
            return [_headers_for_pamqp(item) for item in value]
        case dict():
            for name in value:
                if len(name.encode()) > _LONGEST_NAME:
                    raise UsageError(
                        f"the header {name!r:.60} has a name of more than {_LONGEST_NAME} bytes, "
                        "which aio-pika cuts; rename it, or publish the event with outbox"
                    )
            return {name: _headers_for_pamqp(item) for name, item in value.items()}
    return value


def _as_bytes(body: Any, serializer: Serializer) -> bytes:
    """Return what a serializer has made; copied, as it may use a bytearray again."""
    if isinstance(body, bytes | bytearray | memoryview):
        return bytes(body)
    raise UsageError(
        f"{type(serializer).__name__}.encode() has returned a {type(body).__name__}, not bytes"
    )


def _delivery_time(
    now: datetime.datetime,
    delay: float | datetime.timedelta | None,
    deliver_at: datetime.datetime | None,
) -> datetime.datetime | None:
    if deliver_at is not None:
        if delay is not None:
            raise InvalidEvent("give delay or deliver_at, not both")
        if not isinstance(deliver_at, datetime.datetime) or deliver_at.utcoffset() is None:
            raise InvalidEvent(
                f"deliver_at is {deliver_at!r}, not a datetime with a time zone; "
                "use datetime.now(UTC) + timedelta(...)"
            )
        try:
            return deliver_at.astimezone(_UTC)
        except OverflowError as error:
            raise InvalidEvent(f"deliver_at is {deliver_at!r}, out of range in UTC") from error
    try:
        span = delay if isinstance(delay, datetime.timedelta) else _seconds(delay)
        if span < datetime.timedelta():
            raise ValueError("negative")
        return now + span if span else None
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidEvent(
            f"delay={delay!r} is invalid; pass seconds (0 or more) or a timedelta"
        ) from error


def _seconds(delay: Any) -> datetime.timedelta:
    if isinstance(delay, bool):
        raise TypeError("bool")
    return datetime.timedelta(seconds=delay)
