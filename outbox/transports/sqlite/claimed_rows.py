"""A leased row as a worker gets it, and as a dead letter."""

from __future__ import annotations

from outbox.event import Event
from outbox.messages.dead_letters import dead_letter, restore_origin
from outbox.messages.delivery import Delivery, as_delivered
from outbox.storage.store import Claimed

__all__ = ["DELIVERY_LIMIT", "delivery_of", "is_deadly", "letter_of_deadly"]

DELIVERY_LIMIT = 20
"""How often a message may be lost with its worker; RabbitMQ 4 has the same for quorum queues."""


def delivery_of(row: Claimed, tag: int) -> Delivery:
    """Return the message of ``row``."""
    delivery = as_delivered(row.event, row.queue, tag, redelivered=row.deliveries > 1)
    restore_origin(delivery)
    return delivery


def is_deadly(row: Claimed) -> bool:
    """Return whether ``row`` was delivered too often without anybody settling it.

    What a worker gave back counts as an attempt: it is not the message that ended the worker.
    """
    return row.deliveries - 1 - row.attempts >= DELIVERY_LIMIT


def letter_of_deadly(row: Claimed) -> Event:
    """Return the dead letter in place of a deadly row."""
    delivery = delivery_of(row, 0)
    return dead_letter(
        delivery,
        f"delivered {DELIVERY_LIMIT} times, and each time its worker ended, "
        "or lost it, before it was settled",
        attempts=delivery.attempt,
        first_failure=delivery.first_failure,
    )
