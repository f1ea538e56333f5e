"""Copies of a message: its dead letter, and the copy for its next attempt."""

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
    """Return the dead letter of ``delivery``, with the reason and the error of ``outcome``."""
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
    """Return the copy that returns the message to its queue for the next attempt.

    It is delivered as the message was: with its id, body, headers, exchange and target. None if
    the sender's headers leave no room for outbox's, or are nested too deeply.
    """
    try:
        headers = senders_headers(delivery)
    except NotCarried:
        return None
    added = {
        ATTEMPT: outcome.attempts + 1,
        FIRST_FAILURE: outcome.first_failure.isoformat(),
        **origin_headers(Address(delivery.exchange, delivery.target)),
    }
    at = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=outcome.delay)
    return copy_of(
        delivery, delivery.queue, {**headers, **added}, deliver_at=at if outcome.delay else None
    )


def _kind(error: BaseException) -> str:
    return error.kind if type(error) is RemoteError else type(error).__qualname__


def traceback_of(error: BaseException) -> str:
    """Return the end of the traceback, at most 4,000 characters, without the engine's frames.

    It includes the exceptions that ``error`` was raised from.
    """
    try:
        return error.traceback if isinstance(error, RemoteError) else _traceback_of(error)
    except Exception as why:  # an application's exception may fail at anything
        return f"(traceback unavailable: {type(why).__qualname__})"


def _traceback_of(error: BaseException) -> str:
    last = traceback.TracebackException.from_exception(error, max_group_width=5, max_group_depth=3)
    part: traceback.TracebackException | None = last
    while part is not None:
        theirs = [frame for frame in part.stack if not frame.filename.startswith(_HERE)]
        part.stack = traceback.StackSummary.from_list(theirs[-_FRAMES:])
        part = part.__cause__ or part.__context__
    text = "".join(last.format()).rstrip()
    return text if len(text) <= _LONGEST_TRACEBACK else f"...{text[3 - _LONGEST_TRACEBACK :]}"
