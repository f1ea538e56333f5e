"""Copies of a message: its dead letter with the reason, and the one for its next attempt."""

from __future__ import annotations

import datetime
import traceback
from pathlib import Path

from outbox import Event
from outbox.consumers.outcome import Again, Dead, RemoteError
from outbox.messages import dead_letters
from outbox.messages.dead_letters import origin_headers
from outbox.messages.delivery import Delivery
from outbox.messages.headers import ATTEMPT, FIRST_FAILURE
from outbox.messages.message_copy import NotCarried, copy_of, senders_headers
from outbox.messages.parked_message import Address

__all__ = ["dead_letter", "retry_copy", "traceback_of"]

_LONGEST_TRACEBACK = 4_000
_FRAMES = 20
_HERE = str(Path(__file__).parent)


def dead_letter(delivery: Delivery, outcome: Dead) -> Event:
    """Return the event to publish to the queue's dead letters, with what ``outcome`` says."""
    error = outcome.error
    return dead_letters.dead_letter(
        delivery,
        outcome.reason,
        attempts=outcome.attempts,
        first_failure=outcome.first_failure,
        error=None if error is None else _kind(error),
        traceback=None if error is None else traceback_of(error),
    )


def retry_copy(delivery: Delivery, outcome: Again) -> Event | None:
    """Return the event that brings the message back to its queue for the next attempt.

    It is delivered as the message was: with its id, body, headers, exchange and target. None if
    its sender's headers leave no room for ours, or are nested too deeply.
    """
    try:
        own = senders_headers(delivery)
    except NotCarried:
        return None
    added = {
        ATTEMPT: outcome.attempts + 1,
        FIRST_FAILURE: outcome.first_failure.isoformat(),
        **origin_headers(Address(delivery.exchange, delivery.target)),
    }
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=outcome.delay)
    return copy_of(
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
