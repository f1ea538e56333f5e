"""Messages that wait for a person: parked events and dead letters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from outbox.errors import BrokerError
from outbox.messages.topics import matches

__all__ = ["Address", "Kind", "ParkedMessage", "ReplayResult", "Selection"]

Kind = Literal["parked", "dead", "foreign"]


class Address(NamedTuple):
    """Where a message is published to; the exchange ``""`` is the broker's default exchange."""

    exchange: str
    target: str

    def __str__(self) -> str:
        return f"{self.exchange}/{self.target}" if self.exchange else f"the queue {self.target}"


@dataclass(frozen=True, slots=True, eq=False)
class ParkedMessage:
    """One message of a parking or dead-letter queue, as its headers tell of it.

    Any client may have put it there: every text may hold anything.

    Attributes:
        queue: where it is now.
        kind: ``parked``, ``dead`` (by a worker or the broker itself), or ``foreign``: without
            headers that tell where it came from.
        id: the AMQP ``message_id``; empty where there is none.
        body: the bytes.
        content_type: the MIME type, if there is one.
        origin: where it was published to first, if that is known.
        died_in: the queue whose consumer gave it up, of a dead letter.
        reason: why it is here, if that is known.
        error: the class of the exception, of a dead letter.
        at: when it came here, ISO 8601, as its header tells it.
        attempts: how often it was tried, of a dead letter that tells.
        returns: how often it has been given back to the queue it is in, where the broker counts.
    """

    queue: str
    kind: Kind
    id: str
    body: bytes
    content_type: str | None = None
    origin: Address | None = None
    died_in: str | None = None
    reason: str | None = None
    error: str | None = None
    at: str | None = None
    attempts: int | None = None
    returns: int = 0

    def destination(self, *, to_origin: bool = False) -> Address | str:
        """Return where a replay publishes it, or why there is none.

        Args:
            to_origin: send a dead letter to its original address, where every queue bound there
                gets it again, rather than to the one queue that it died in.
        """
        if self.kind == "dead" and not to_origin:
            found = Address("", self.died_in) if self.died_in else None
        else:
            found = self.origin
        if found is None or not found.target:
            return "it has no header that tells where it came from"
        if found == ("", self.queue):
            return "its address is the queue that it is in"
        return found


@dataclass(frozen=True, slots=True)
class Selection:
    """Which messages a command is about; without any condition, all.

    Attributes:
        ids: any of these; empty for any id.
        reason: a part of the reason.
        target: a topic pattern of the original target.
    """

    ids: frozenset[str] = frozenset()
    reason: str | None = None
    target: str | None = None

    def __bool__(self) -> bool:
        """Return whether there is a condition."""
        return bool(self.ids) or self.reason is not None or self.target is not None

    def __contains__(self, message: ParkedMessage) -> bool:
        """Return whether ``message`` meets every condition."""
        if self.ids and message.id not in self.ids:
            return False
        if self.reason is not None and self.reason not in (message.reason or ""):
            return False
        return self.target is None or (
            message.origin is not None and matches(self.target, message.origin.target)
        )


class ReplayResult(NamedTuple):
    """What a replay came to.

    Attributes:
        done: confirmed at their destination.
        left: not accepted there, each with the reason.
        error: why nothing is known of the others, or None: it has ended the replay.
    """

    done: tuple[ParkedMessage, ...]
    left: tuple[tuple[ParkedMessage, str], ...]
    error: BrokerError | None = None
