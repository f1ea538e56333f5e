"""Queues and deliveries, as every transport presents them to a worker."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from outbox.event import Event, headers_on_the_wire
from outbox.ids import new_id
from outbox.messages.cloud_events import attributes_of, time_of
from outbox.messages.headers import (
    ATTEMPT,
    DELAY_EXCHANGE,
    DELAY_HEADERS,
    DELAY_UNTIL,
    FIRST_FAILURE,
    HEADER_OCCURRED_AT,
    RETURNED,
)

__all__ = [
    "Delivery",
    "QueueSpec",
    "QueueType",
    "as_delivered",
    "dead_letter_queue",
    "restore_delayed",
]


_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_END_OF_TIME = 253_402_300_800_000_000  # the year 10000, in microseconds
_LATEST = 253_370_764_800.0
"""Seconds since the epoch until the year 9999: a later time may be after the year 9999 once it is
rounded, or in another time zone, and then drivers can't read what a database has stored."""
_ROUNDED_WELL = 4_000_000_000_000_000
"""Microseconds since the epoch, until the year 2096, up to which a float of seconds has the right
one, rounded."""

_MOST_ATTEMPTS = 2**31 - 1  # an INTEGER, as every database has it

_NOT_ENCODED = frozenset(("utf-8", "utf8", "utf_8", "us-ascii", "ascii", "identity"))
"""The property is for compression, but many clients write the charset there."""
_DEATHS = ("x-death", "x-first-death-", "x-last-death-")
_COUNTED = "x-delivery-count"
_ACQUIRED = "x-acquired-count"  # written by 4.3, also where nothing of it has counted

QueueType = Literal["quorum", "classic"]


def dead_letter_queue(queue: str) -> str:
    """Return the name of the queue for the dead letters of ``queue``."""
    return f"{queue}.dead"


@dataclass(frozen=True, slots=True)
class QueueSpec:
    """A queue to consume from.

    Attributes:
        name: at most 250 bytes in UTF-8; its dead letters go to ``<name>.dead``.
        topics: patterns of targets it is bound to, besides its name (``*`` stands for one word,
            ``#`` for any number of them).
        exchange: the exchange it is bound to.
        max_priority: the highest priority that has an effect, 1 to 255; None to leave priorities
            to the broker.
        queue_type: ``quorum`` or ``classic``, if the broker has both.
        rank: 0 or more; a message starts only while no message of a lower-ranked queue waits.
        ordered: whether at most one message of each key is delivered at a time, in their order.
        places: of a queue of tasks, how many of them the worker processes at a time: what it claims
            ahead is little, and the urgent overtakes it, where the transport can do so. 0 for all
            that fits the prefetch.
    """

    name: str
    topics: tuple[str, ...]
    exchange: str
    max_priority: int | None = None
    queue_type: QueueType = "quorum"
    rank: int = 0
    ordered: bool = False
    places: int = 0


@dataclass(slots=True, eq=False)
class Delivery:
    """A message as the transport handed it over, not decoded.

    Attributes:
        queue: the queue it was consumed from.
        tag: the transport's number for it, unique within ``generation``.
        generation: the generation of the channel; a delivery of an earlier one can no longer be
            settled, and is redelivered.
        redelivered: whether it may have been delivered before.
        exchange: the exchange it was published to.
        target: the routing key it was published with.
        body: the encoded payload.
        content_type: the MIME type, if the sender gave one.
        content_encoding: the compression, if the sender gave one.
        headers: all headers; names and values are the sender's, of any type AMQP has.
        message_id: the id, if the sender gave one.
        priority: the priority, if the sender gave one.
        timestamp: seconds since the epoch, if the sender gave one.
        since: when its event occurred, or was due, in seconds since the epoch; None if that isn't
            known, or if it may have begun before. See :meth:`read_times`.
    """

    queue: str
    tag: int
    generation: int
    redelivered: bool
    exchange: str
    target: str
    body: bytes
    content_type: str | None = None
    content_encoding: str | None = None
    headers: Mapping[str, Any] | None = None
    message_id: str | None = None
    priority: int | None = None
    timestamp: int | None = None
    since: float | None = None

    @property
    def is_encoded(self) -> bool:
        """Whether the content encoding says that the body isn't what the content type says."""
        encoding = self.content_encoding or ""
        return encoding != "" and encoding.lower() not in _NOT_ENCODED

    @property
    def attempt(self) -> int:
        """The number of this attempt, from 1; without a valid header it is the first."""
        attempt = (self.headers or {}).get(ATTEMPT)
        return attempt if type(attempt) is int and 0 < attempt <= _MOST_ATTEMPTS else 1

    @property
    def returned(self) -> int:
        """How often it came back to its queue, as far as that was counted: 0 or more.

        A quorum queue counts (:attr:`counted`), and a renewed copy remembers the count before it.
        """
        before = (self.headers or {}).get(RETURNED)
        return self.counted + (before if type(before) is int and before > 0 else 0)

    @property
    def counted(self) -> int:
        """How often it came back by the broker's own count, for which it may be given up.

        RabbitMQ 4.3 and later leave out what was nacked, and count only what was lost with its
        channel, or rejected. Without a count it is 1 for a message that may have been delivered
        before.
        """
        if not self.redelivered:
            return 0
        headers = self.headers or {}
        count = headers.get(_COUNTED)
        if isinstance(count, int) and not isinstance(count, bool) and count >= 0:
            return int(count)
        return 0 if _ACQUIRED in headers else 1

    @property
    def first_failure(self) -> datetime.datetime | None:
        """The time of the first failed attempt (aware), if there was one before this."""
        text = (self.headers or {}).get(FIRST_FAILURE)
        if not isinstance(text, str):
            return None
        try:
            moment = datetime.datetime.fromisoformat(text)
        except ValueError:
            return None
        return moment if moment.tzinfo is not None else None

    @property
    def occurred_at(self) -> datetime.datetime:
        """The time the event was enqueued (aware); now, if the message doesn't say."""
        return self.read_times()

    @property
    def occurred_seconds(self) -> float:
        """The same in seconds since the epoch, from 1970 to 9999, as every database can hold it."""
        microseconds = _microseconds(self.headers)
        if microseconds is None:
            return min(max(self.occurred_at.timestamp(), 0.0), _LATEST)
        return min(microseconds / 1e6, _LATEST)

    def read_times(self) -> datetime.datetime:
        """Return :attr:`occurred_at`, and note :attr:`since`."""
        headers = self.headers
        microseconds = _microseconds(headers)
        if headers and microseconds is not None:
            seconds = microseconds / 1e6
            if self.since is None and not self.redelivered and ATTEMPT not in headers:
                self.since = seconds
            if microseconds < _ROUNDED_WELL:  # in a third of the time
                return datetime.datetime.fromtimestamp(seconds, datetime.UTC)
            return _EPOCH + datetime.timedelta(microseconds=microseconds)
        if isinstance(self.timestamp, int) and self.timestamp >= 0:
            with contextlib.suppress(OverflowError):
                return _EPOCH + datetime.timedelta(seconds=self.timestamp)
        moment = time_of(self.cloudevent or {})
        return datetime.datetime.now(datetime.UTC) if moment is None else moment

    @property
    def cloudevent(self) -> dict[str, Any] | None:
        """The attributes of its CloudEvent, or None; see ``ReceivedEvent.cloudevent``."""
        return attributes_of(self.headers or {}, self.content_type, self.body)

    @property
    def id_or_new(self) -> str:
        """The id: the sender's, else that of its CloudEvent, else a new one each time."""
        if self.message_id:
            return self.message_id
        attributes = self.cloudevent
        return new_id() if attributes is None else str(attributes["id"])


def _microseconds(headers: Mapping[str, Any] | None) -> int | None:
    """Return when an event occurred, in microseconds since the epoch; None if nothing says it."""
    microseconds = headers.get(HEADER_OCCURRED_AT) if headers else None
    # A date after the year 9999, or before the epoch, is ignored.
    if isinstance(microseconds, int) and 0 <= microseconds < _END_OF_TIME:
        return microseconds
    return None


def as_delivered(event: Event, queue: str, tag: int, *, redelivered: bool = False) -> Delivery:
    """Return ``event`` as a delivery from ``queue``, as RabbitMQ would deliver it."""
    return Delivery(
        queue=queue,
        tag=tag,
        generation=0,
        redelivered=redelivered,
        exchange=event.exchange,
        target=event.target,
        body=event.body,
        content_type=event.content_type,
        headers=headers_on_the_wire(event),
        message_id=event.id,
        priority=event.priority,
        timestamp=int(event.occurred_at.timestamp()),
    )


def restore_delayed(delivery: Delivery) -> None:
    """Restore the exchange of a message that was delayed, and remove the headers of the delay.

    These are outbox's, and the broker's record of the ladder's queues as dead-lettering queues. The
    message isn't a dead letter, and a broker that gets the record back may act on it (RabbitMQ 4.0
    release notes, x-death).
    """
    headers: Mapping[str, Any] | None = delivery.headers
    if headers and isinstance(exchange := headers.get(DELAY_EXCHANGE), str):
        delivery.exchange = exchange
        if not delivery.redelivered and ATTEMPT not in headers:
            delivery.since = _due(headers)
        delivery.headers = {
            name: value
            for name, value in headers.items()
            if not name.startswith((DELAY_HEADERS, *_DEATHS))
        }


def _due(headers: Mapping[str, Any]) -> float | None:
    """Return when a delayed message was due, in seconds since the epoch; None if it doesn't say."""
    until = headers.get(DELAY_UNTIL)
    return until * 1e-6 if type(until) is int and 0 <= until < _END_OF_TIME else None
