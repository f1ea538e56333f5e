"""Outcomes: what is to become of a message; ``Message.settle`` acts on them."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import TypeAlias

from outbox import BrokerError
from outbox.backlog.chunk import Chunk

__all__ = [
    "ACK",
    "DUPLICATE",
    "REJECT",
    "REQUEUE",
    "Ack",
    "Again",
    "Dead",
    "Failed",
    "HandlerExit",
    "Hold",
    "Outcome",
    "ProcessDied",
    "ProcessTimeout",
    "Reject",
    "RemoteError",
    "Requeue",
    "Return",
    "Unconfirmed",
    "of_handler",
]

REQUEUE_DELAY = 1.0
"""Seconds that a message is held before it goes back to its queue: requeueing at once is a loop."""


@dataclass(frozen=True, slots=True)
class Ack:
    """Done: the broker may forget the message.

    Attributes:
        duplicate: it had been done before, and was not processed.
    """

    duplicate: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """An attempt has failed; the consumer's retry policy decides what follows.

    Attributes:
        error: what was raised.
        is_done: the handler's transaction has been committed all the same: another attempt would
            be passed over.
    """

    error: BaseException
    is_done: bool = False


@dataclass(frozen=True, slots=True)
class Unconfirmed:
    """An attempt has succeeded if the broker confirms its follow-on events.

    Nothing of the application is left to call then: another message may begin meanwhile.

    Attributes:
        chunk: the follow-on events, on their way.
    """

    chunk: Chunk


@dataclass(frozen=True, slots=True)
class Again:
    """To be tried again: a copy comes to the queue in ``delay`` seconds.

    Attributes:
        delay: seconds.
        error: the exception behind it.
        attempts: that there were, this one included.
        first_failure: when the first of them failed.
    """

    delay: float
    error: BaseException
    attempts: int
    first_failure: datetime.datetime


@dataclass(frozen=True, slots=True)
class Dead:
    """To the dead letters, with a reason.

    Attributes:
        reason: what is wrong, for whoever reads the dead letters.
        error: the exception behind it, if there is one.
        attempts: that there were, this one included.
        first_failure: when the first of them failed; None for the present.
        is_done: as of ``Failed``.
    """

    reason: str
    error: BaseException | None = None
    attempts: int = 1
    first_failure: datetime.datetime | None = None
    is_done: bool = False


@dataclass(frozen=True, slots=True)
class Return:
    """Back to its queue, after ``delay`` seconds."""

    delay: float = REQUEUE_DELAY


@dataclass(frozen=True, slots=True)
class Hold:
    """Not the message's fault: held, and processed again when what it needs is back.

    Attributes:
        error: of the broker, or of a database.
    """

    error: Exception

    @property
    def is_brokers(self) -> bool:
        """Whether the broker takes no events; a database otherwise."""
        return isinstance(self.error, BrokerError)


Outcome: TypeAlias = Ack | Again | Dead | Return | Hold

ACK = Ack()
"""Returned by ``process()``: done. None says the same."""

DUPLICATE = Ack(duplicate=True)

REJECT = Dead("rejected by the consumer")
"""Returned by ``process()``: to the dead letters."""

REQUEUE = Return()
"""Returned by ``process()``: back to the queue, to be tried again in a second."""


class Reject(Exception):
    """Raised by ``process()``: this message cannot be handled, now or later.

    It goes to the queue's dead letters, with the reason; the events of its processing are dropped.
    """

    def __init__(self, reason: str = REJECT.reason) -> None:
        super().__init__(reason)
        self.reason = str(reason)


class Requeue(Exception):
    """Raised by ``process()``: back to the queue, to be tried again in a second.

    For what is not the message's fault and will pass. It counts as no failure, and nothing limits
    how often it happens.
    """


class ProcessTimeout(TimeoutError):
    """An attempt took longer than the consumer's ``timeout``: a failed one."""

    @classmethod
    def after(cls, seconds: float, doing: str = "") -> ProcessTimeout:
        """Return one that tells how long it was given, and ``doing`` what."""
        return cls(f"it took more than {seconds:g} s{doing and f' to {doing}'}")


class ProcessDied(Exception):
    """The process in which an attempt ran has ended: a failed one."""


class RemoteError(Exception):
    """What an attempt in another process has raised.

    Attributes:
        kind: the name of the exception's class.
        traceback: as text.
    """

    def __init__(self, kind: str, traceback: str) -> None:
        super().__init__(kind, traceback)
        self.kind = kind
        self.traceback = traceback

    def __str__(self) -> str:
        return f"{self.kind}, in another process:\n{self.traceback}"


class HandlerExit(Exception):
    """A handler raised what is no ``Exception``, such as KeyboardInterrupt: a failed attempt."""


def of_handler(error: BaseException) -> BaseException:
    """Return what a handler has raised as something that ends its attempt, and nothing else.

    To the engine such an exception means its own end, or its generator's.
    """
    if isinstance(error, Exception | SystemExit):
        return error
    found = HandlerExit(f"the handler raised {type(error).__qualname__}")
    found.__cause__ = error
    return found
