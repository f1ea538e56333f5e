"""The observer: how a test kit sees every event, and decides where it goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from outbox.event import Event
from outbox.settings import Settings
from outbox.transports.transport import Transport

__all__ = ["Attachment", "KeptResults", "Observer", "seam"]


class Attachment(Protocol):
    """What ties an event to a transaction of a framework that announces no rollback.

    Attributes:
        advice: for a test that misses the event: how the transaction gets to its end.
    """

    advice: str

    def holds(self) -> bool:
        """Return whether the event is still in the transaction, or was committed with it."""
        ...


class KeptResults(Protocol):
    """The results of tasks in a test, which are in memory. Thread-safe."""

    def get(self, id_: str) -> Any:
        """Return the ``ResultRow`` of a task, or None."""
        ...

    def cancel(self, id_: str, task: str = "") -> bool:
        """Cancel a task unless it runs or is done; return whether it will not run."""
        ...


class Observer(Protocol):
    """An observer of every event of the process, on any thread, while it is installed.

    A unit of work keeps the observer that was installed when it began, even for what happens after
    the test, when the next test has installed another.

    Attributes:
        hands_over: whether this process publishes stored events after the commit, as it does
            without an observer.
        results: the results of tasks; None where workers write them into a database.
    """

    hands_over: bool

    @property
    def results(self) -> KeptResults | None: ...  # noqa: D102

    def transport_of(self, settings: Settings) -> Transport:
        """Return the transport that replaces that of a publisher with these settings."""
        ...

    def consumed_with(self, settings: Settings) -> Settings:
        """Return the settings with which a worker consumes instead of these.

        Raises:
            UsageError: nothing can be consumed.
        """
        ...

    def enqueued(self, event: Event) -> None:
        """Note that ``event`` was collected."""
        ...

    def stored_in_transaction(self, event: Event) -> None:
        """Note that ``event`` was stored in a transaction of the application's database."""
        ...

    def attached(self, event: Event, attachment: Attachment) -> None:
        """Note that ``event``, collected or stored just now, is dropped once that doesn't hold."""
        ...

    def committed(self, events: Sequence[Event]) -> None:
        """Note that the transaction in which ``events`` were stored was committed.

        It may be noted more than once, and for a transaction that a test only treats so.
        """
        ...

    def cleared(self, events: Sequence[Event]) -> None:
        """Note that a rollback or ``clear_events()`` dropped ``events``."""
        ...


class _Seam:
    """Where an observer is installed.

    Attributes:
        observer: the observer of the whole process, or None.
    """

    __slots__ = ("observer",)

    def __init__(self) -> None:
        self.observer: Observer | None = None


seam = _Seam()
"""Read for each event, so an attribute and not a function."""
