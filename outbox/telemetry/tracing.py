"""The seam for traces: what an instrumentor is asked where events and messages pass."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from outbox.backlog.chunk import Chunk, Entry
from outbox.errors import BrokerError
from outbox.event import Event
from outbox.messages.delivery import Delivery
from outbox.settings import Settings

__all__ = ["Processing", "Tracer", "hidden", "seam"]


class Processing(Protocol):
    """An attempt at a message. Thread-safe; nothing here raises an exception."""

    def enter(self) -> None:
        """Make it current in this context, which must be the message's copy: it stays so."""
        ...

    def end(self, outcome: str, error: BaseException | None = None, reason: str = "") -> None:
        """Note the outcome of the attempt; the first call counts.

        Args:
            outcome: its name; ``docs/telemetry.md`` lists them.
            error: what made the attempt fail.
            reason: why it counts as failed without an error.
        """
        ...


class Tracer(Protocol):
    """What traces events and messages. Thread-safe; only ``make_event`` raises exceptions."""

    def make_event(self, settings: Settings, *arguments: Any) -> Event:
        """Make an event that carries its trace; see :func:`outbox.event.make_event`.

        Args:
            settings: the settings with which it will be published, or stored.
            *arguments: the arguments of that function, by position.
        """
        ...

    def sends(self, chunk: Chunk, settings: Settings) -> None:
        """Note that ``chunk`` is about to be handed in, on the caller's thread."""
        ...

    def revoked(self, chunk: Chunk) -> None:
        """Note that handing in ``chunk`` has failed; it may have been submitted all the same."""
        ...

    def sends_again(self, entries: Sequence[Entry]) -> None:
        """Note that ``entries``, some of which may be kept, are about to be sent."""
        ...

    def sent_again(self, entry: Entry, error: BrokerError | None) -> None:
        """Note that ``entry`` has its fate; with an error, that it stays kept."""
        ...

    def processing(self, delivery: Delivery, settings: Settings, began: int = 0) -> Processing:
        """Return an attempt at a message, which begins now.

        Args:
            delivery: the message.
            settings: the settings of the worker's publisher.
            began: when it began, in nanoseconds since the epoch; 0 for now.
        """
        ...

    def hidden(self) -> AbstractContextManager[object]:
        """Return a context manager in which other instrumentations see nothing."""
        ...

    def flush(self, seconds: float) -> None:
        """Export what has ended, within ``seconds``."""
        ...


class _Seam:
    """Where a tracer is installed.

    Attributes:
        tracer: the tracer of the process, or None.
    """

    __slots__ = ("tracer",)

    def __init__(self) -> None:
        self.tracer: Tracer | None = None


seam = _Seam()
"""Read for each event and message, so an attribute and not a function."""

_SHOWN: AbstractContextManager[object] = contextlib.nullcontext()


def hidden() -> AbstractContextManager[object]:
    """Return a context manager around outbox's own statements, which no trace needs to show.

    A relay or worker looks for work all the time.
    """
    tracer = seam.tracer
    return _SHOWN if tracer is None else tracer.hidden()
