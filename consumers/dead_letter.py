"""Dead letters: what a consumer could not handle, with the reason."""

from __future__ import annotations

import datetime
from typing import Any

from outbox import Event
from outbox.consumers.outcome import Dead
from outbox.ids import new_id
from outbox.subscription import Delivery, dead_letter_queue

__all__ = ["dead_letter"]

_LONGEST_REASON = 2_000

# What the broker wrote about earlier stations of the message; sent back to it, some of it is
# believed (RabbitMQ 4.0 release notes, x-death).
_BROKERS_OWN = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-")
_INTERPRETED = ("CC", "BCC")


def dead_letter(delivery: Delivery, outcome: Dead) -> Event:
    """Return the event to publish to the queue's dead letters.

    It has the message's own body, content type, id, and headers, but for those that the broker
    would act on; ``docs/wire-format.md`` lists what is added.
    """
    headers = {
        name: value for name, value in (delivery.headers or {}).items() if not _is_brokers(name)
    }
    headers["outbox-dead-reason"] = outcome.reason[:_LONGEST_REASON]
    headers["outbox-dead-queue"] = delivery.queue
    headers["outbox-dead-exchange"] = delivery.exchange
    headers["outbox-dead-target"] = delivery.target
    headers["outbox-dead-at"] = datetime.datetime.now(datetime.UTC).isoformat()
    if outcome.error is not None:
        headers["outbox-dead-error"] = type(outcome.error).__qualname__
    if delivery.content_encoding:
        headers["outbox-dead-content-encoding"] = delivery.content_encoding
    return Event(
        id=delivery.message_id or new_id(),
        target=dead_letter_queue(delivery.queue),
        exchange="",
        body=delivery.body,
        content_type=delivery.content_type or "application/octet-stream",
        headers=headers,
        priority=delivery.priority,
        unroutable="fail",
    )


def _is_brokers(name: Any) -> bool:
    return (
        not isinstance(name, str)
        or name in _INTERPRETED
        or name.startswith(_BROKERS_OWN)
        or name in ("outbox-format", "outbox-occurred-at-us")
    )
