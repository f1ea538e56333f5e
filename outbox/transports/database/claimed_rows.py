"""Claimed rows as deliveries and as dead letters."""

from __future__ import annotations

from outbox.event import Event
from outbox.messages.dead_letters import dead_letter, restore_origin
from outbox.messages.delivery import Delivery, as_delivered
from outbox.storage.store import Claimed

__all__ = ["DELIVERY_LIMIT", "delivery_of", "is_deadly", "is_suspect", "letter_of_deadly"]

DELIVERY_LIMIT = 20
"""The number of times a message may be lost with its worker, as in RabbitMQ 4's quorum queues."""

_MANY_LOSSES = 5
"""Losses from which on a message is claimed alone, so that further ones are its own."""


def delivery_of(row: Claimed, tag: int) -> Delivery:
    """Return ``row`` as a delivery with this tag."""
    delivery = as_delivered(row.event, row.queue, tag, redelivered=row.deliveries > 1)
    restore_origin(delivery)
    return delivery


def is_deadly(row: Claimed) -> bool:
    """Return whether ``row`` was delivered too often without being settled.

    A requeued delivery doesn't count: its message did not bring the worker down.
    """
    return _losses(row) >= DELIVERY_LIMIT


def is_suspect(row: Claimed) -> bool:
    """Return whether ``row`` may be what killed its worker several times."""
    return _losses(row) >= _MANY_LOSSES


def _losses(row: Claimed) -> int:
    return row.deliveries - 1 - row.attempts


def letter_of_deadly(row: Claimed) -> Event:
    """Return the dead letter that replaces a deadly row."""
    delivery = delivery_of(row, 0)
    return dead_letter(
        delivery,
        f"delivered {DELIVERY_LIMIT} times, and each time the worker died or lost its lease "
        "before settling it",
        attempts=delivery.attempt,
        first_failure=delivery.first_failure,
    )
