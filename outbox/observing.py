"""The one seam through which a test kit sees everything and keeps it from the broker."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from outbox.event import Event
from outbox.transport import Transport

__all__ = ["Observer", "install", "installed"]


class Observer(Protocol):
    """Told of every event of the process, on any thread, while it is installed."""

    @property
    def transport(self) -> Transport:
        """What takes the place of every publisher's own."""
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


def installed() -> Observer | None:
    """Return the observer in force, or None."""
    return _installed


def install(observer: Observer | None) -> None:
    """Put ``observer`` in force for the whole process, or with None take the present one away."""
    global _installed
    _installed = observer
