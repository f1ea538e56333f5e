"""Dead letters: what a consumer could not handle, with the reason."""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

from outbox import Event, InvalidEvent
from outbox.consumers.outcome import Dead
from outbox.consumers.received import occurred_at
from outbox.event import MAX_HEADER_BYTES, plain_table
from outbox.headers import is_brokers_own
from outbox.ids import new_id
from outbox.subscription import Delivery, dead_letter_queue

__all__ = ["dead_letter"]

_LONGEST_REASON = 2_000


def dead_letter(delivery: Delivery, outcome: Dead) -> Event:
    """Return the event to publish to the queue's dead letters.

    It has the message's own body, content type, id, and headers, but for those that the broker
    would act on; ``docs/wire-format.md`` lists what is added.
    """
    headers: dict[str, Any] = {
        "outbox-dead-reason": _text(outcome.reason[:_LONGEST_REASON]),
        "outbox-dead-queue": delivery.queue,
        "outbox-dead-exchange": delivery.exchange,
        "outbox-dead-target": delivery.target,
        "outbox-dead-at": datetime.datetime.now(datetime.UTC).isoformat(),
    }
    if outcome.error is not None:
        headers["outbox-dead-error"] = _text(type(outcome.error).__qualname__)
    if delivery.content_encoding:
        headers["outbox-dead-content-encoding"] = delivery.content_encoding
    try:
        own = _senders(delivery.headers or {})
        if plain_table(own, "headers")[1] <= MAX_HEADER_BYTES:
            headers = {**own, **headers}
        else:
            headers["outbox-dead-headers"] = "dropped: with these there was no room for them"
    except (InvalidEvent, RecursionError):
        headers["outbox-dead-headers"] = "dropped: they are nested too deeply"
    return Event(
        id=_short(delivery.message_id or new_id()),
        target=dead_letter_queue(delivery.queue),
        exchange="",
        body=delivery.body,
        content_type=_short(delivery.content_type or "application/octet-stream"),
        headers=headers,
        priority=delivery.priority,
        occurred_at=occurred_at(delivery.headers or {}, delivery.timestamp),
        unroutable="fail",
    )


def _text(text: str) -> str:
    """Return ``text`` as something that can be written in UTF-8."""
    return text.encode(errors="replace").decode()


def _short(text: str) -> str:
    """Return as much of ``text`` as is a short string: with what replaces bytes it has grown."""
    return text.encode()[:255].decode(errors="ignore")


def _senders(headers: Mapping[Any, Any]) -> dict[str, Any]:
    return {name: _carried(value) for name, value in headers.items() if _is_senders(name)}


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
