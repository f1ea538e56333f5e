"""Messages that need a person's decision: parked events and dead letters."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Literal, NamedTuple

from outbox.errors import BrokerError
from outbox.messages.topics import matches

__all__ = ["Address", "Kind", "ParkedMessage", "ReplayResult", "Selection"]

Kind = Literal["parked", "dead", "foreign"]


class Address(NamedTuple):
    """The address a message is published to; ``""`` is the broker's default exchange."""

    exchange: str
    target: str

    def __str__(self) -> str:
        return f"{self.exchange}/{self.target}" if self.exchange else f"the queue {self.target}"


@dataclass(frozen=True, slots=True, eq=False)
class ParkedMessage:
    """A message of a parking or dead-letter queue, as its headers describe it.

    Any client may have put it there: every text may hold anything.

    Attributes:
        queue: the queue it is in.
        kind: ``parked``, ``dead`` (by a worker or the broker itself), or ``foreign``: without
            headers that say where it came from.
        id: the AMQP ``message_id``; empty if missing.
        body: the encoded payload.
        content_type: the MIME type, if there is one.
        origin: the address it was first published to, if known.
        died_in: the queue whose consumer gave it up, if it is a dead letter.
        reason: the reason why it is here, if known.
        error: the class of the exception, if it is a dead letter.
        at: the time at which it came here, ISO 8601, by its header.
        attempts: the number of attempts, if a dead letter says.
        returns: how often it was returned to the queue it is in, if the broker counts that.
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
        """Return the address that a replay publishes it to, or the reason why there is none.

        Args:
            to_origin: True to send a dead letter to its original address, so that every queue
                bound there gets it again, and not only the queue that it died in.
        """
        if self.kind == "dead" and not to_origin:
            address = Address("", self.died_in) if self.died_in else None
        else:
            address = self.origin
        if address is None or not address.target:
            return "it has no header that says where it came from"
        if address == ("", self.queue):
            return "its address is the queue that it is in"
        return address


@dataclass(frozen=True, slots=True)
class Selection:
    """The messages that a command selects; without any condition, all.

    Attributes:
        ids: the ids to select; empty for any id.
        reason: a part of the reason.
        target: a topic pattern for the original target.
        before: the instant (aware) before which it came here; one whose time isn't known is not
            selected then.
    """

    ids: frozenset[str] = frozenset()
    reason: str | None = None
    target: str | None = None
    before: datetime.datetime | None = None

    def __bool__(self) -> bool:
        """Return whether there is a condition."""
        return bool(self.ids) or (self.reason, self.target, self.before) != (None, None, None)

    def __contains__(self, message: ParkedMessage) -> bool:
        """Return whether ``message`` meets every condition."""
        if self.ids and message.id not in self.ids:
            return False
        if self.reason is not None and self.reason not in (message.reason or ""):
            return False
        if self.before is not None and not _is_before(message.at, self.before):
            return False
        return self.target is None or (
            message.origin is not None and matches(self.target, message.origin.target)
        )


def _is_before(text: str | None, moment: datetime.datetime) -> bool:
    """Return whether ``text`` is a time, in ISO 8601, before ``moment``; without a zone, in UTC."""
    try:
        at = datetime.datetime.fromisoformat(text or "")
        return (at if at.tzinfo is not None else at.replace(tzinfo=datetime.UTC)) < moment
    except (ValueError, OverflowError):
        return False


class ReplayResult(NamedTuple):
    """The result of a replay.

    Attributes:
        done: the messages confirmed at their destination.
        left: the messages not accepted there, each with the reason.
        error: the error that ended the replay, so that nothing is known of the others, or None.
    """

    done: tuple[ParkedMessage, ...]
    left: tuple[tuple[ParkedMessage, str], ...]
    error: BrokerError | None = None
