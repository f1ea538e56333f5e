"""Workers of this process that wait for events in a database, so that its publishers wake them."""

from __future__ import annotations

import threading

from outbox.system import process

__all__ = ["Listeners", "listeners_at"]


class Listeners:
    """The events to set when something was published to one database. Thread-safe."""

    def __init__(self) -> None:
        self._events: dict[threading.Event, None] = {}

    def add(self, event: threading.Event) -> None:
        """Set ``event`` at each :meth:`wake` from now on."""
        self._events[event] = None

    def remove(self, event: threading.Event) -> None:
        """Undo :meth:`add`."""
        self._events.pop(event, None)

    def wake(self) -> None:
        """Set all events."""
        for event in list(self._events):
            event.set()


_by_address: dict[str, Listeners] = {}


def listeners_at(address: str) -> Listeners:
    """Return the listeners of the database at ``address``: the same object in all of a process."""
    return _by_address.setdefault(address, Listeners())


process.after_fork(_by_address.clear)
