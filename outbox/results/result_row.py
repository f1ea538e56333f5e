"""What is known of a task that has begun, or was cancelled: a row of the table of results."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

__all__ = [
    "CANCELLED",
    "FAILED",
    "LONGEST_VALUE",
    "RETRYING",
    "RUNNING",
    "STATUSES",
    "SUCCEEDED",
    "WORKER_GONE",
    "Ending",
    "ResultRow",
    "args_of",
    "cut",
]

RUNNING = "running"
RETRYING = "retrying"
SUCCEEDED = "succeeded"
FAILED = "failed"
CANCELLED = "cancelled"
STATUSES = (RUNNING, RETRYING, SUCCEEDED, FAILED, CANCELLED)

LONGEST_VALUE = 1024 * 1024
"""Bytes of a value, as JSON."""
_LONGEST_TEXT = 64 * 1024
_LONGEST_ARGS = 64 * 1024  # bytes

WORKER_GONE = (
    "the worker ended after the task had committed its work, and before its value was written"
)


@dataclass(frozen=True, slots=True)
class ResultRow:
    """A task that has begun, or was cancelled.

    Attributes:
        id: the id of the task's event.
        task: the name of the task; empty if it was cancelled by its id alone.
        queue: the queue of its last attempt.
        status: one of ``STATUSES``. A row whose worker has disappeared is ``retrying``, since its
            message is delivered again; or ``succeeded`` if its work had been committed.
        is_final: whether nothing follows any more.
        args: the body of its message, as JSON; None if it is longer than 64 KB.
        value: what it has returned, as JSON; None if there is none, or if it was lost.
        is_typed: whether the annotation of what it returns is needed to read the value.
        attempt: the number of its last attempt.
        error_type: the class of what it raised, as text; empty without an error.
        error: the text of that; of a success, why its value was lost; else empty.
        traceback: the traceback, without the values of variables; empty without one.
        worker: the process that began the last attempt, as ``host:pid``.
        enqueued_at: the time of the call.
        started_at: when the first attempt began.
        attempted_at: when the last attempt began.
        ended_at: when it succeeded, failed or was cancelled.
        kept_until: when the row may be deleted; None, as enqueued_at, after the year 9998.
        is_dropped: of a cancelled task, whether its message is gone, so that only another call can
            run it.
    """

    id: str
    task: str = ""
    queue: str = ""
    status: str = RUNNING
    is_final: bool = False
    args: str | None = None
    value: str | None = None
    is_typed: bool = False
    attempt: int = 0
    error_type: str = ""
    error: str = ""
    traceback: str = ""
    worker: str = ""
    enqueued_at: datetime.datetime | None = None
    started_at: datetime.datetime | None = None
    attempted_at: datetime.datetime | None = None
    ended_at: datetime.datetime | None = None
    kept_until: datetime.datetime | None = None
    is_dropped: bool = False


@dataclass(frozen=True, slots=True)
class Ending:
    """How an attempt has ended.

    Attributes:
        status: ``retrying``, ``succeeded``, ``failed`` or ``cancelled``.
        value, is_typed, error_type, error, traceback: see :class:`ResultRow`.
        delay: the seconds to the next attempt; 0 without one.
    """

    status: str
    value: str | None = None
    is_typed: bool = False
    error_type: str = ""
    error: str = ""
    traceback: str = ""
    delay: float = 0.0


def cut(text: str) -> str:
    """Return ``text`` as every database can hold it: bounded, without NUL and lone surrogates."""
    if len(text) > _LONGEST_TEXT:
        text = f"{text[:_LONGEST_TEXT]}..."
    return text.encode(errors="replace").decode().replace("\0", "\\0")


def args_of(body: bytes) -> str | None:
    """Return the body of a call as it is kept; None if it is longer than 64 KB."""
    return cut(body.decode(errors="replace")) if len(body) <= _LONGEST_ARGS else None
