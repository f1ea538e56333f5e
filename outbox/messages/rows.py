"""Conversion of events to rows of the table, and back."""

from __future__ import annotations

import base64
import json
from typing import Any

from outbox.event import Event, Headers
from outbox.header_values import check_name, plain_table

__all__ = ["UNROUTED", "event_of", "headers_of", "text_of", "values_of"]

UNROUTED = "outbox.unrouted"
"""The queue of events stored in the database that is the broker, until they are routed to queues.

Not ``""``, from which a relay publishes to another broker: both may be used in one database.
"""


def values_of(event: Event, *, queue: str = "", rank: int = 0) -> dict[str, Any]:
    """Return the columns of ``event``, except those that the database sets from its clock.

    Args:
        event: the event to store.
        queue: the queue that the event waits in; ``""`` for the relay.
        rank: the rank in the queue; higher ranks are claimed first.
    """
    values: dict[str, Any] = {
        "id": event.id,
        # Debezium routes by it: "order.placed" belongs to the aggregate "order".
        "aggregatetype": event.target.partition(".")[0] or event.target,
        "aggregateid": event.id if event.key is None else event.key,
        "type": event.target,
        "payload": event.body,
        "queue": queue,
        "exchange": event.exchange,
        "content_type": event.content_type,
        "headers": text_of(event.headers) if event.headers else None,
        "key": event.key,
        "priority": event.priority,
        "rank": rank,
        "unroutable": event.unroutable,
        "occurred_at": event.occurred_at,
    }
    if event.deliver_at is not None:
        values["available_at"] = event.deliver_at
    return values


def event_of(row: Any) -> Event:
    """Return the event of ``row``, without ``deliver_at``: a claimed row is due.

    Raises:
        ValueError: the row isn't an event that outbox can publish; something else wrote it.
    """
    for what in ("id", "type", "exchange", "content_type", "key"):
        value = getattr(row, what)
        if value is not None:
            check_name(what, value)
    # SQLite stores text as text and a number as a number, whatever the type of the column.
    body = row.payload.encode() if isinstance(row.payload, str) else row.payload
    if not isinstance(body, bytes | memoryview):
        raise ValueError(f"the payload is a {type(body).__name__}, not bytes")
    return Event(
        id=row.id,
        target=row.type,
        exchange=row.exchange,
        body=bytes(body),
        content_type=row.content_type,
        headers=headers_of(row.headers) if row.headers else {},
        priority=row.priority,
        key=row.key,
        occurred_at=row.occurred_at,
        unroutable=row.unroutable,
    )


# JSON has no bytes, so they become {"$bytes": base64}; a table with such a key is wrapped.
_MARKS = ("$bytes", "$table")


def text_of(headers: Headers) -> str:
    """Return headers as a row has them; ``headers_of`` is the inverse."""
    return json.dumps({name: _to_json(value) for name, value in headers.items()})


def _to_json(value: Any) -> Any:
    match value:
        case bytes():
            return {"$bytes": base64.b64encode(value).decode()}
        case list():
            return [_to_json(item) for item in value]
        case dict():
            table = {name: _to_json(item) for name, item in value.items()}
            return {"$table": table} if any(mark in table for mark in _MARKS) else table
    return value


def headers_of(text: str) -> dict[str, Any]:
    """Return the headers of a row.

    Raises:
        ValueError: they aren't a JSON object, or AMQP can't carry one of them.
    """
    try:
        table = json.loads(text)
        if not isinstance(table, dict):
            raise ValueError(f"the headers are not a JSON object: {text:.60}")
        headers = {name: _from_json(value) for name, value in table.items()}
    except RecursionError:
        raise ValueError("the headers are nested too deeply") from None
    return plain_table(headers, "headers")[0]


def _from_json(value: Any) -> Any:
    match value:
        case {"$bytes": str() as encoded} if len(value) == 1:
            return base64.b64decode(encoded)
        case {"$table": dict() as table} if len(value) == 1:
            return {name: _from_json(item) for name, item in table.items()}
        case list():
            return [_from_json(item) for item in value]
        case dict():
            return {name: _from_json(item) for name, item in value.items()}
    return value
