"""The one seam through which a test kit sees everything and decides where it goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from outbox.event import Event
from outbox.settings import Settings
from outbox.transports.transport import Transport

__all__ = ["Observer", "install_observer", "installed_observer"]


class Observer(Protocol):
    """Told of every event of the process, on any thread, while it is installed.

    A unit of work keeps the observer under which it began: what comes of it later, when the test
    is over and the next one has its own, is told to the first.

    Attributes:
        hands_over: whether what was stored and committed is published by this process, as it is
            without an observer.
    """

    hands_over: bool

    def transport_of(self, settings: Settings) -> Transport:
        """Return what takes the place of the transport of a publisher with these settings."""
        ...

    def consumed_with(self, settings: Settings) -> Settings:
        """Return the settings with which a worker consumes in the place of these.

        Raises:
            UsageError: nothing can be consumed.
        """
        ...

    def enqueued(self, event: Event) -> None:
        """``event`` was collected."""
        ...

    def stored_in_transaction(self, event: Event) -> None:
        """``event`` was stored in a transaction of the application's database."""
        ...

    def cleared(self, events: Sequence[Event]) -> None:
        """``events`` were dropped by a rollback or by ``clear_events()``."""
        ...


_installed: Observer | None = None


def installed_observer() -> Observer | None:
    """Return the observer in force, or None."""
    return _installed


def install_observer(observer: Observer | None) -> None:
    """Put ``observer`` in force for the whole process, or with None take the present one away."""
    global _installed
    _installed = observer
