"""One log line per message: its outcome, and how long that took."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from outbox.consumers.outcome import Ack, Again, Dead, Outcome, Return
from outbox.messages.delivery import Delivery
from outbox.messages.headers import TASK

__all__ = ["ended", "started"]

logger = logging.getLogger("outbox.consumer.messages")
"""Separate from ``outbox.consumer``, so that its many lines can be switched off alone."""


def started(delivery: Delivery) -> float:
    """Log that ``delivery`` is about to be processed; return the time, for :func:`ended`."""
    if logger.isEnabledFor(logging.DEBUG):
        extra = _extra(delivery, 0.0)
        logger.debug(
            "message %r of %r%s started",
            delivery.message_id,
            delivery.queue,
            _task(extra),
            extra=extra,
        )
    return time.perf_counter()


def ended(delivery: Delivery, outcome: Outcome, began: float) -> None:
    """Log the outcome of ``delivery``: INFO, WARNING if it failed, ERROR if dead-lettered."""
    level = _LEVELS.get(type(outcome), logging.INFO)
    if isinstance(outcome, Ack) and outcome.expired:
        level = logging.WARNING
    if not logger.isEnabledFor(level):
        return
    duration = time.perf_counter() - began
    extra = _extra(delivery, duration)
    logger.log(
        level,
        "message %r of %r%s %s after %.3f s, attempt %d%s",
        delivery.message_id,
        delivery.queue,
        _task(extra),
        _fate(outcome),
        duration,
        extra["outbox_message"]["attempt"],
        _why(outcome),
        exc_info=outcome.error if isinstance(outcome, Again | Dead) else None,
        extra=extra,
    )


_LONGEST_NAME = 255
_LEVELS: dict[type, int] = {Again: logging.WARNING, Dead: logging.ERROR}


def _task(extra: Mapping[str, Mapping[str, Any]]) -> str:
    name = extra["outbox_message"].get("task")
    return f" (task {name!r})" if name else ""


def _name_of_task(delivery: Delivery) -> str:
    """Return the name of the task that a message calls, cut: it comes from outside."""
    name = (delivery.headers or {}).get(TASK)
    return name[:_LONGEST_NAME] if isinstance(name, str) else ""


def _fate(outcome: Outcome) -> str:
    match outcome:
        case Ack(duplicate=True):
            return "skipped as a duplicate"
        case Ack(expired=True):
            return "dropped: its ttl was over"
        case Ack(cancelled=True):
            return "dropped: it was cancelled"
        case Ack():
            return "finished"
        case Again():
            return "failed"
        case Dead():
            return "dead-lettered"
        case Return():
            return "requeued"
    return type(outcome).__name__.lower()


def _why(outcome: Outcome) -> str:
    match outcome:
        case Again():
            return f"; retry in {outcome.delay:.1f} s"
        case Dead():
            return f": {outcome.reason!r}"
    return ""


def _extra(delivery: Delivery, duration: float) -> dict[str, dict[str, Any]]:
    """Return the attributes that ``MessageFilter`` adds; these lines may be logged anywhere.

    They are under one key, since logging refuses keys that a record already has.
    """
    message = {
        "message_id": delivery.message_id or "",
        "queue": delivery.queue,
        "attempt": delivery.attempt,
        "duration": duration,
    }
    if name := _name_of_task(delivery):
        message["task"] = name
    return {"outbox_message": message}
