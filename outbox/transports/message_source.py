"""The transport that messages are moved from: what is asked of it, and which of its queues."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, Self, TypeVar

from outbox.event import Event
from outbox.messages.dead_letters import PARKING_QUEUE, origin_headers
from outbox.messages.delivery import QueueSpec, dead_letter_queue
from outbox.messages.parked_message import Address
from outbox.messages.topics import matches

__all__ = ["Chosen", "Moved", "Publish", "Source", "for_queue", "published"]

_T = TypeVar("_T")

Publish = Callable[[Sequence[Event]], Sequence[str | None]]
"""Publishes events at the destination; returns for each why it isn't there, None if it is."""


class Moved(NamedTuple):
    """What became of some messages.

    Attributes:
        number: how many are at the destination and no longer at the source.
        left: the ids of those that stay at the source, each with the reason.
    """

    number: int
    left: Sequence[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Chosen:
    """The queues whose messages are to be moved.

    Attributes:
        specs: the queues, with their dead letters; empty for all that the source can list.
        with_parked: whether parked events and those without a queue are moved as well.
    """

    specs: tuple[QueueSpec, ...]
    with_parked: bool

    def names(self) -> list[str]:
        """Return the names of the queues, each once."""
        names = [name for spec in self.specs for name in (spec.name, dead_letter_queue(spec.name))]
        return list(dict.fromkeys([*names, *([PARKING_QUEUE] if self.with_parked else [])]))

    def has_address(self, exchange: str, target: str) -> bool:
        """Return whether an event with this address goes to one of the queues."""
        if not exchange:
            return target in self.names()
        return any(
            spec.exchange == exchange
            and any(matches(topic, target) for topic in (spec.name, *spec.topics))
            for spec in self.specs
        )


class Source(Protocol):
    """A transport that messages are taken from. For one thread.

    A *place* is a queue, or where events wait that have no queue yet.
    """

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            UsageError: a queue that was named doesn't exist, or the transport can't be used.
            BrokerError: it can't be reached.
        """
        ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def users(self) -> str | None:
        """Return who else uses it, as far as that can be found out; None if no one is found."""
        ...

    def specs(self) -> list[QueueSpec]:
        """Return the queues to create at the destination."""
        ...

    def places(self) -> list[str]:
        """Return the places to look into, in this order."""
        ...

    def count(self, place: str) -> int:
        """Return the number of messages to move from ``place``."""
        ...

    def move(self, place: str, publish: Publish) -> Iterator[Moved]:
        """Move what is in ``place`` now, some messages at a time.

        No consumer gets a message while it is being published. One that ``publish`` has confirmed
        is then deleted; if this process ends in between, it is in both places.
        """
        ...

    def in_hand(self) -> str | None:
        """Return a text about messages that others have in hand, None if there are none."""
        ...


def published(
    found: Sequence[tuple[_T, Event]], publish: Publish, left: list[tuple[str, str]]
) -> list[_T]:
    """Publish events; return the messages of those that are at the destination.

    Args:
        found: messages at the source, with their events.
        publish: publishes them.
        left: where the ids of the others are added, each with the reason.
    """
    reasons = publish([event for _, event in found]) if found else []
    done: list[_T] = []
    for (message, event), reason in zip(found, reasons, strict=True):
        if reason is None:
            done.append(message)
        else:
            left.append((event.id, reason))
    return done


def for_queue(event: Event, queue: str) -> Event:
    """Return the event that is delivered from ``queue`` as ``event`` would be.

    It is published to the queue alone: the other queues bound to its address have copies of their
    own. Its address is in headers, as with a replayed dead letter.
    """
    headers = event.headers
    if (event.exchange, event.target) != ("", queue):
        headers = {**headers, **origin_headers(Address(event.exchange, event.target))}
    return dataclasses.replace(event, exchange="", target=queue, headers=headers, unroutable="fail")
