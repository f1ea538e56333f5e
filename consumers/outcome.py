"""Outcomes of messages and attempts; ``Message.settle`` acts on them."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TypeAlias

from outbox import Nacked, PublishFailed
from outbox.backlog.chunk import Chunk

__all__ = [
    "ACK",
    "CANCELLED",
    "DUPLICATE",
    "EXPIRED",
    "REJECT",
    "REQUEUE",
    "Ack",
    "Again",
    "Dead",
    "Failed",
    "FollowOnsRefused",
    "HandlerExit",
    "Hold",
    "InboxUnavailable",
    "NotYet",
    "Outcome",
    "ProcessDied",
    "ProcessTimeout",
    "Reject",
    "RemoteError",
    "Requeue",
    "ResultsUnavailable",
    "Return",
    "Unconfirmed",
    "of_handler",
]

REQUEUE_DELAY = 1.0
"""Seconds before a message returns to its queue: requeueing at once would be a busy loop."""


@dataclass(frozen=True, slots=True)
class Ack:
    """Done: the broker may forget the message.

    Attributes:
        duplicate: whether it had been done before, and was not processed.
        expired: whether its time to live was over, and it was not processed.
        cancelled: whether it is a task that was cancelled, and it was not processed.
    """

    duplicate: bool = False
    expired: bool = False
    cancelled: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """A failed attempt; the consumer's retry policy decides what follows.

    Attributes:
        error: the exception.
        is_done: whether the handler's transaction was committed all the same: another attempt
            would be skipped as a duplicate.
        failures: the members of ``error`` that are failures, if it is a group; else empty.
    """

    error: BaseException
    is_done: bool = False
    failures: tuple[BaseException, ...] = ()


@dataclass(frozen=True, slots=True)
class Unconfirmed:
    """An attempt that succeeds if the broker confirms its follow-on events.

    No application code is left to call, so another message may start meanwhile.

    Attributes:
        chunk: the follow-on events, submitted.
    """

    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Again:
    """Retry: a copy of the message reaches the queue in ``delay`` seconds.

    Attributes:
        delay: the delay in seconds.
        error: the exception of the failed attempt.
        attempts: the number of attempts so far, this one included.
        first_failure: the time at which the first of them failed.
    """

    delay: float
    error: BaseException
    attempts: int
    first_failure: datetime.datetime


@dataclass(frozen=True, slots=True)
class Dead:
    """Dead letter: the message goes to its queue's dead letters, with a reason.

    Attributes:
        reason: the reason, for the people who read the dead letters.
        error: the exception, if there is one.
        attempts: the number of attempts, this one included.
        first_failure: the time at which the first of them failed; None for now.
        is_done: as in ``Failed``.
        decisive: the member of ``error`` that has decided, if it is a group.
    """

    reason: str
    error: BaseException | None = None
    attempts: int = 1
    first_failure: datetime.datetime | None = None
    is_done: bool = False
    decisive: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Return:
    """Requeue: the message returns to its queue after ``delay`` seconds."""

    delay: float = REQUEUE_DELAY


@dataclass(frozen=True, slots=True)
class Hold:
    """Not the message's fault: it is held, and processed again once broker and database are back.

    Attributes:
        error: the error of the broker, or of a database.
        is_doubtful: whether it may be the message's fault all the same: then it is held for some
            minutes at most.
    """

    error: Exception
    is_doubtful: bool = False

    @property
    def is_refusal(self) -> bool:
        """Whether the broker works, but refuses follow-on events for now: a queue is full."""
        error = self.error
        return isinstance(error.report.error if isinstance(error, PublishFailed) else error, Nacked)


Outcome: TypeAlias = Ack | Again | Dead | Return | Hold

ACK = Ack()
"""Returned by ``process()``: done. None means the same."""

DUPLICATE = Ack(duplicate=True)
EXPIRED = Ack(expired=True)
CANCELLED = Ack(cancelled=True)

REJECT = Dead("rejected by the consumer")
"""Returned by ``process()``: dead-letter the message."""

REQUEUE = Return()
"""Returned by ``process()``: return the message to its queue, to be tried again in a second."""


class Reject(Exception):
    """Raised by ``process()``: the message cannot be handled, now or later.

    It goes to the queue's dead letters, with the reason; its follow-on events are dropped.
    """

    def __init__(self, reason: str = REJECT.reason) -> None:
        super().__init__(reason)
        self.reason = str(reason)


class Requeue(Exception):
    """Raised by ``process()``: return the message to its queue, to be tried again in a second.

    For temporary problems that are not the message's fault. It doesn't count as a failed attempt,
    and may happen any number of times.
    """


class ProcessTimeout(TimeoutError):
    """A failed attempt: it took longer than the consumer's ``timeout``."""

    @classmethod
    def after(cls, seconds: float, doing: str = "") -> ProcessTimeout:
        """Return an error that names the time limit and, if given, what exceeded it."""
        return cls(f"it took more than {seconds:g} s{doing and f' to {doing}'}")


class NotYet(Exception):
    """A failed attempt for want of something that is yet to come, such as a row or a deployment.

    It doesn't count: the message is put back with a delay, whatever its consumer's policy, until
    the time is up. That begins with the first failure, so that a message which failed long ago for
    another reason is not put back.

    Attributes:
        delays: seconds to the next attempt, one after the other; the last one is repeated.
        lasts: seconds after which the time is up.
    """

    delays: tuple[float, ...] = (1.0,)
    lasts: float = 0.0

    def delay_after(self, elapsed: float) -> float | None:
        """Return the seconds to the next attempt; None if the time is up.

        Args:
            elapsed: the seconds since the first failure.
        """
        if elapsed >= self.lasts:
            return None
        begin = 0.0
        for delay in self.delays:
            if elapsed < begin + delay / 2:  # an attempt is somewhat late
                return delay
            begin += delay
        return self.delays[-1]


class ProcessDied(Exception):
    """A failed attempt: the subprocess in which it ran has ended."""


class RemoteError(Exception):
    """The exception of an attempt in another process.

    Attributes:
        kind: the name of the exception's class.
        traceback: the traceback, as text.
    """

    def __init__(self, kind: str, traceback: str) -> None:
        super().__init__(kind, traceback)
        self.kind = kind
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.kind}, in another process:\n{self.traceback}"


class ResultsUnavailable(Exception):
    """The results of tasks can't be written now, so that a task can't begin."""


class InboxUnavailable(Exception):
    """The inbox can't be written now: its server is read-only, or others hold its locks."""


class FollowOnsRefused(Exception):
    """A failed attempt: the broker has refused its follow-on events for minutes."""


class HandlerExit(Exception):
    """A failed attempt: the handler raised a bare BaseException, such as KeyboardInterrupt."""


def of_handler(error: BaseException) -> BaseException:
    """Return a handler's exception in a form that ends its attempt, and nothing else.

    Raised as it is, a bare BaseException would end the engine, or the generator of steps.
    """
    if isinstance(error, Exception | SystemExit):
        return error
    handler_exit = HandlerExit(f"the handler raised {type(error).__qualname__}")
    handler_exit.__cause__ = error
    return handler_exit
