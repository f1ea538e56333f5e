"""Copies of a message: its dead letter, and the copy for its next attempt."""

from __future__ import annotations

import datetime
from typing import Any

from outbox import Event
from outbox.consumers.outcome import Again, Dead, RemoteError
from outbox.consumers.tracebacks import traceback_of
from outbox.messages import dead_letters
from outbox.messages.dead_letters import origin_headers
from outbox.messages.delivery import Delivery
from outbox.messages.headers import ATTEMPT, FIRST_FAILURE
from outbox.messages.message_copy import NotCarried, copy_of, senders_headers
from outbox.messages.parked_message import Address

__all__ = ["dead_letter", "next_attempt", "retry_copy"]


def dead_letter(delivery: Delivery, outcome: Dead) -> Event:
    """Return the dead letter of ``delivery``, with the reason and the error of ``outcome``."""
    error = outcome.error
    return dead_letters.dead_letter(
        delivery,
        outcome.reason,
        attempts=outcome.attempts,
        first_failure=outcome.first_failure,
        error=None if error is None else _kind(outcome.decisive or error),
        traceback=None if error is None else traceback_of(error),
    )


def retry_copy(delivery: Delivery, outcome: Again) -> Event | None:
    """Return the copy that returns the message to its queue for the next attempt.

    It is delivered as the message was: with its id, body, headers, exchange and target. None if
    the sender's headers leave no room for outbox's, or are nested too deeply.
    """
    try:
        headers = senders_headers(delivery)
    except NotCarried:
        return None
    added = {
        **next_attempt(outcome),
        **origin_headers(Address(delivery.exchange, delivery.target)),
    }
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=outcome.delay)
    return copy_of(
        delivery, delivery.queue, {**headers, **added}, deliver_at=at if outcome.delay else None
    )


def next_attempt(outcome: Again) -> dict[str, Any]:
    """Return the headers that number the next attempt."""
    return {
        ATTEMPT: outcome.attempts + 1,
        FIRST_FAILURE: outcome.first_failure.isoformat(),
    }


def _kind(error: BaseException) -> str:
    return error.kind if type(error) is RemoteError else type(error).__qualname__
