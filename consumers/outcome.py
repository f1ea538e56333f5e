"""Outcomes: what is to become of a message; ``Worker.settle`` is the place that acts on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from outbox import BrokerError

__all__ = [
    "ACK",
    "REJECT",
    "REQUEUE",
    "Ack",
    "Dead",
    "Hold",
    "Outcome",
    "Reject",
    "Requeue",
    "Return",
]

REQUEUE_DELAY = 1.0
"""Seconds that a message is held before it goes back to its queue: requeueing at once is a loop."""


@dataclass(frozen=True, slots=True)
class Ack:
    """Done: the broker may forget the message."""


@dataclass(frozen=True, slots=True)
class Dead:
    """To the dead letters, with a reason.

    Attributes:
        reason: what is wrong, for whoever reads the dead letters.
        error: the exception behind it, if there is one.
    """

    reason: str
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Return:
    """Back to its queue, after ``delay`` seconds."""

    delay: float = REQUEUE_DELAY


@dataclass(frozen=True, slots=True)
class Hold:
    """Not the message's fault: held, and processed again once the broker takes events again."""

    error: BrokerError


Outcome: TypeAlias = Ack | Dead | Return | Hold

ACK = Ack()
"""Returned by ``process()``: done. None says the same."""

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
