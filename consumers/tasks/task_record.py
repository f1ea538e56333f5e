"""What is kept of an attempt at a task: that it has begun, and how it has ended."""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import socket
import time
from collections.abc import Mapping, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

from outbox.consumers.definition import Consumer
from outbox.consumers.outcome import Ack, Again, Dead, Outcome, RemoteError, Return
from outbox.consumers.raised import text_of
from outbox.consumers.tracebacks import traceback_of
from outbox.messages.delivery import Delivery
from outbox.messages.headers import KEEP_RESULT, TASK
from outbox.results.pending_write import PendingWrite
from outbox.results.result_row import (
    FAILED,
    LONGEST_VALUE,
    RETRYING,
    SUCCEEDED,
    args_of,
    cut,
)
from outbox.system import process
from outbox.tasks.call_arguments import Parameters
from outbox.tasks.call_options import LONGEST_KEEP
from outbox.tasks.codec import REFUSALS

__all__ = ["Results", "TaskRecord", "record_here", "record_of", "set_record_here"]

logger = logging.getLogger("outbox.consumer")

_encoder = json.JSONEncoder(allow_nan=False, separators=(",", ":"))
_LONGEST_NAME = 255


class Results(Protocol):
    """Where a worker keeps what becomes of its tasks."""

    @property
    def is_quick(self) -> bool:
        """Whether tasks take so little time that it is worth beginning several at once."""
        ...

    def begin(self, values: Mapping[str, Any]) -> PendingWrite:
        """Write that an attempt begins; it may not if the write has a refusal."""
        ...

    def end(self, values: Mapping[str, Any]) -> PendingWrite:
        """Write how an attempt has ended; it has no effect once another one has begun."""
        ...

    def complete(self, id_: str) -> None:
        """Note that a task had been done before; waits for the database."""
        ...

    def over(self, token: str) -> None:
        """Note that the attempt with this token runs no longer, however it ends."""
        ...

    def took(self, seconds: float) -> None:
        """Note how long a task has taken."""
        ...

    def shares(self, connection: Any) -> bool:
        """Return whether a connection leads to the database of the results."""
        ...

    def write_on(self, connection: Any, values: Mapping[str, Any]) -> None:
        """Do the same as :meth:`end` in a transaction of the application."""
        ...

    def note_on(self, connection: Any, id_: str, token: str) -> None:
        """Note in a transaction of the application that an attempt succeeds."""
        ...


_record: ContextVar[TaskRecord | None] = ContextVar("outbox_task_record", default=None)

record_here = _record.get
"""Returns the record of the attempt that runs here, or None if nothing is kept of it."""
set_record_here = _record.set


class TaskRecord:
    """The record of one attempt.

    Attributes:
        has_begun: whether it was written that the attempt begins.
        is_refused: whether it may not begin, so that nothing must be written about it.
        is_unique: whether no other attempt can succeed if this one does. Then its success counts
            also if another has begun after it, with a copy of the message.
    """

    def __init__(
        self, results: Results, delivery: Delivery, keep: float, *, hides_errors: bool
    ) -> None:
        """Make the record of an attempt at ``delivery``; ``keep`` is in seconds."""
        headers = delivery.headers or {}
        self.has_begun = False
        self.is_refused = False
        self.is_unique = False
        self._results = results
        self._delivery = delivery
        self._id = delivery.message_id or delivery.id_or_new
        self._task = str(headers.get(TASK))
        self._token = f"{_start_of_tokens()}{next(_attempts):x}"
        self._keep = keep
        self._hides_errors = hides_errors
        self._value: str | None = "null"
        self._is_typed = False
        self._lost = ""
        self._is_written = False
        self._began_at = 0.0

    @property
    def is_quick(self) -> bool:
        """Whether tasks take so little time that it is worth beginning several at once."""
        return self._results.is_quick

    def begin(self) -> PendingWrite:
        """Write that the attempt begins."""
        delivery = self._delivery
        return self._results.begin(
            {
                "id": self._id,
                "task": self._task,
                "queue": delivery.queue,
                "args": args_of(delivery.body),
                "attempt": delivery.attempt,
                "token": self._token,
                "worker": _worker_here(process.pid),
                "enqueued": delivery.occurred_seconds,
                "keep": self._keep,
            }
        )

    def began(self) -> None:
        """Note that the attempt may begin, and does so now."""
        self.has_begun = True
        self._began_at = time.perf_counter()
        set_record_here(self)

    def returned(self, value: Any, parameters: Parameters, connections: Sequence[Any] = ()) -> None:
        """Note what the task has returned.

        Args:
            value: the value.
            parameters: what knows the annotation of the value.
            connections: those whose transactions are committed next. If one leads to the database
                of the results, the end is written in its transaction.

        Raises:
            TypeError: the value can't be carried, and the transaction can still be rolled back.
        """
        self._results.took(time.perf_counter() - self._began_at)
        connection = next(filter(self._results.shares, connections), None)
        try:
            encoded, self._is_typed = parameters.result_written(value)
            text = "null" if encoded is None else _encoder.encode(encoded)
            if len(text) > LONGEST_VALUE:
                raise ValueError(f"it has {len(text):,} bytes as JSON, more than 1 MiB")
        except (*REFUSALS, RecursionError) as error:
            reason = f"what {self._task} returned can't be kept: {error}"
            if connection is not None:
                raise TypeError(reason) from None
            logger.error("the result of message %r is lost: %s", self._id, reason)
            self._value, self._lost = None, reason
        else:
            self._value = text
        if connection is not None:
            self._results.write_on(connection, self._ending(SUCCEEDED))
            self._is_written = True

    def note_on(self, connection: Any) -> None:
        """Note in the transaction that notes the message in an inbox that the attempt succeeds."""
        if self.has_begun and not self._is_written and self._results.shares(connection):
            self._results.note_on(connection, self._id, self._token)

    def complete(self) -> None:
        """Note that the task had been done before."""
        self._results.complete(self._id)

    def over(self) -> None:
        """Note that nothing runs any more, without saying how it has ended."""
        self._results.over(self._token)

    def end(self, outcome: Outcome) -> PendingWrite | None:
        """Write how the attempt has ended; None if there is nothing to write."""
        if self.is_refused:
            return None
        match outcome:
            case Ack(duplicate=True) | Ack(cancelled=True):
                return None
            case Ack(expired=True):
                return self._failed("Expired", "its time to live was over before it began")
            case Ack():
                if self._is_written:
                    self.over()
                    return None
                return self._results.end(self._ending(SUCCEEDED))
            case Again(error=error):
                kind, text, trace = self._described(error, error)
                return self._failed(kind, text, trace, delay=outcome.delay)
            case Dead(error=None):
                return self._failed("", outcome.reason)
            case Dead(error=BaseException() as error):
                kind, text, trace = self._described(error, outcome.decisive or error)
                return self._failed(kind, text if kind else outcome.reason, trace)
            case Return():
                return self._failed("", "", delay=outcome.delay)
        return None

    def _described(self, error: BaseException, decisive: BaseException) -> tuple[str, str, str]:
        """Return the class, the text and the traceback of an exception, as they are kept."""
        if type(error) is RemoteError:
            return error.kind, "", error.traceback
        kind = type(decisive).__qualname__
        if self._hides_errors:
            return kind, "(hidden)", ""
        return kind, text_of(error), traceback_of(error)

    def _failed(
        self, kind: str, text: str, trace: str = "", delay: float | None = None
    ) -> PendingWrite:
        status = FAILED if delay is None else RETRYING
        values = self._ending(status, delay or 0.0)
        values |= {
            "value": None,
            "is_typed": 0,
            "error_type": cut(kind)[:255],
            "error": cut(text),
            "traceback": cut(trace),
        }
        if delay is not None:
            values["is_over"] = 0
        return self._results.end(values)

    def _ending(self, status: str, delay: float = 0.0) -> dict[str, Any]:
        is_whichever = not self.has_begun or (self.is_unique and status == SUCCEEDED)
        values = {
            "id": self._id,
            "task": self._task,
            "queue": self._delivery.queue,
            "status": status,
            "attempt": self._delivery.attempt,
            "token": "" if is_whichever else self._token,
            "value": self._value,
            "keep": self._keep + delay,
        }
        if self._is_typed:
            values["is_typed"] = 1
        if self._lost:
            values["error"] = self._lost
        return values


def record_of(consumer: Consumer, delivery: Delivery, results: Results) -> TaskRecord | None:
    """Return the record of an attempt at ``delivery``; None if nothing is kept of it."""
    keep = consumer._keeps
    headers = delivery.headers or {}
    name = headers.get(TASK)
    if keep is None or type(name) is not str or not 0 < len(name) <= _LONGEST_NAME:
        return None
    id_ = delivery.id_or_new
    if len(id_) > _LONGEST_NAME or not (name.isprintable() and id_.isprintable()):
        return None  # it comes from outside, and not every database could hold it
    own = headers.get(KEEP_RESULT)
    if type(own) is int and own <= LONGEST_KEEP:  # else it isn't from outbox
        keep = own
    if keep <= 0:
        return None
    return TaskRecord(results, delivery, keep, hides_errors=consumer._hides_errors)


_attempts = itertools.count()


@functools.cache
def _start_of_tokens() -> str:
    """Return what all tokens of this process begin with, and of no other."""
    return f"{os.urandom(11).hex()}."


process.after_fork(_start_of_tokens.cache_clear)


@functools.lru_cache(maxsize=4)
def _worker_here(pid: int) -> str:
    return f"{socket.gethostname()}:{pid}"[:255]
