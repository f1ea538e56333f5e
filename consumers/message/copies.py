"""Copies of a message: its dead letter with the reason, and the one for its next attempt."""

from __future__ import annotations

import datetime
import traceback
from pathlib import Path
from typing import Any

from outbox import Event, InvalidEvent
from outbox.consumers.outcome import Again, Dead, RemoteError
from outbox.consumers.received_event import occurred_at
from outbox.header_values import MAX_HEADER_BYTES, plain_table
from outbox.ids import new_id
from outbox.messages.delivery import Delivery, dead_letter_queue
from outbox.messages.headers import (
    ATTEMPT,
    FIRST_FAILURE,
    ORIGIN_EXCHANGE,
    ORIGIN_TARGET,
    is_brokers_own,
)
from outbox.serializer import JSONSerializer

__all__ = ["dead_letter", "retry_copy", "traceback_of"]

_LONGEST_REASON = 2_000
_LONGEST_TRACEBACK = 4_000
_FRAMES = 20
_HERE = str(Path(__file__).parent)


def dead_letter(delivery: Delivery, outcome: Dead) -> Event:
    """Return the event to publish to the queue's dead letters.

    It has the message's own body, content type, id, and headers, but for those that the broker
    would act on; ``docs/wire-format.md`` lists what is added.
    """
    now = datetime.datetime.now(datetime.UTC)
    headers: dict[str, Any] = {
        "outbox-dead-reason": _text(outcome.reason[:_LONGEST_REASON]),
        "outbox-dead-queue": delivery.queue,
        "outbox-dead-exchange": delivery.exchange,
        "outbox-dead-target": delivery.target,
        "outbox-dead-at": now.isoformat(),
        "outbox-dead-first-at": (outcome.first_failure or now).isoformat(),
        ATTEMPT: outcome.attempts,
    }
    if outcome.error is not None:
        headers["outbox-dead-error"] = _text(_kind(outcome.error))
        headers["outbox-dead-traceback"] = _text(traceback_of(outcome.error))
    if delivery.content_encoding:
        headers["outbox-dead-content-encoding"] = delivery.content_encoding
    try:
        own = _senders_headers(delivery)
        if own is None:
            headers["outbox-dead-headers"] = "dropped: with these there was no room for them"
    except (InvalidEvent, RecursionError):
        own = None
        headers["outbox-dead-headers"] = "dropped: they are nested too deeply"
    headers = {**(own or {}), **headers}
    if plain_table(headers, "headers")[1] > MAX_HEADER_BYTES:
        headers.pop("outbox-dead-traceback", None)
    return _copy(delivery, dead_letter_queue(delivery.queue), headers)


def retry_copy(delivery: Delivery, outcome: Again) -> Event | None:
    """Return the event that brings the message back to its queue for the next attempt.

    It is delivered as the message was: with its id, body, headers, exchange and target. None if
    its sender's headers leave no room for ours, or are nested too deeply.
    """
    try:
        own = _senders_headers(delivery)
    except (InvalidEvent, RecursionError):
        own = None
    if own is None:
        return None
    added = {
        ATTEMPT: outcome.attempts + 1,
        FIRST_FAILURE: outcome.first_failure.isoformat(),
        ORIGIN_EXCHANGE: delivery.exchange,
        ORIGIN_TARGET: delivery.target,
    }
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=outcome.delay)
    return _copy(
        delivery, delivery.queue, {**own, **added}, deliver_at=at if outcome.delay else None
    )


def _kind(error: BaseException) -> str:
    return error.kind if type(error) is RemoteError else type(error).__qualname__


def traceback_of(error: BaseException) -> str:
    """Return the end of the traceback, 4,000 characters at most, without the engine's own frames.

    What the exception was raised from is there, too.
    """
    try:
        return error.traceback if isinstance(error, RemoteError) else _traceback_of(error)
    except Exception as why:  # the application's own exception, which need not be sound
        return f"(its traceback cannot be told: {type(why).__qualname__})"


def _traceback_of(error: BaseException) -> str:
    found = traceback.TracebackException.from_exception(error, max_group_width=5, max_group_depth=3)
    one: traceback.TracebackException | None = found
    while one is not None:
        theirs = [frame for frame in one.stack if not frame.filename.startswith(_HERE)]
        one.stack = traceback.StackSummary.from_list(theirs[-_FRAMES:])
        one = one.__cause__ or one.__context__
    text = "".join(found.format()).rstrip()
    return text if len(text) <= _LONGEST_TRACEBACK else f"...{text[3 - _LONGEST_TRACEBACK :]}"


def _senders_headers(delivery: Delivery) -> dict[str, Any] | None:
    """Return what can be sent on; None if there would be no room beside it."""
    own = {
        name: _carried(value)
        for name, value in (delivery.headers or {}).items()
        if _is_senders(name)
    }
    # InvalidEvent or RecursionError where they are nested too deeply.
    return None if plain_table(own, "headers")[1] > MAX_HEADER_BYTES else own


def _copy(
    delivery: Delivery,
    queue: str,
    headers: dict[str, Any],
    deliver_at: datetime.datetime | None = None,
) -> Event:
    return Event(
        id=_short(delivery.message_id or new_id()),
        target=queue,
        exchange="",
        body=delivery.body,
        content_type=_short(delivery.content_type or JSONSerializer.content_type),  # as decode()
        headers=headers,
        priority=delivery.priority,
        deliver_at=deliver_at,
        occurred_at=occurred_at(delivery.headers or {}, delivery.timestamp),
        unroutable="fail",
    )


def _text(text: str) -> str:
    """Return ``text`` as something that can be written in UTF-8."""
    return text.encode(errors="replace").decode()


def _short(text: str) -> str:
    """Return as much of ``text`` as is a short string: with what replaces bytes it has grown."""
    return text.encode()[:255].decode(errors="ignore")


def _carried(value: Any) -> Any:
    """Return a header's value as one that can be written again, whatever its sender made of it."""
    match value:
        case None | bool() | bytes():
            return value
        case int():
            return int(value) if -(1 << 63) <= value < 1 << 63 else str(value)
        case str():
            return _text(value)
        case list():
            return [_carried(item) for item in value]
        case dict():
            return {
                _text(name): _carried(item) for name, item in value.items() if isinstance(name, str)
            }
        case datetime.datetime():
            return value.isoformat()
    return _text(str(value))


def _is_senders(name: Any) -> bool:
    return (
        isinstance(name, str)
        and not is_brokers_own(name)
        and name not in ("outbox-format", "outbox-occurred-at-us")
    )
