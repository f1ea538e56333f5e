"""Parking: what no queue would have goes to a queue of its own, with its address."""

from __future__ import annotations

import dataclasses
import datetime

from outbox.event import Event

__all__ = ["PARKING_QUEUE", "parked"]

PARKING_QUEUE = "outbox.unroutable"


def parked(event: Event, reason: str) -> Event:
    """Return what is published to the parking queue in place of ``event``.

    The same id, body and headers, with its address and ``reason`` in headers of their own
    (``docs/wire-format.md``).
    """
    return dataclasses.replace(
        event,
        exchange="",
        target=PARKING_QUEUE,
        headers={
            **event.headers,
            "outbox-parked-reason": reason,
            "outbox-parked-exchange": event.exchange,
            "outbox-parked-target": event.target,
            "outbox-parked-at": datetime.datetime.now(datetime.UTC).isoformat(),
        },
    )
