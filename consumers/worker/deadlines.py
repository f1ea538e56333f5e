"""A watch over calls with a time limit, which calls back when one exceeds it."""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable

from outbox.system.steady_clock import monotonic

__all__ = ["Ticket", "Deadlines"]

logger = logging.getLogger("outbox.consumer")


class Ticket:
    """A call that is being watched."""

    __slots__ = ("deadline", "on_expired")

    def __init__(self, deadline: float, on_expired: Callable[[], None]) -> None:
        self.deadline = deadline
        self.on_expired = on_expired


class Deadlines:
    """A watch over calls, with a thread that calls back for late ones. Thread-safe.

    A call either leaves in time or expires, never both: whichever removes its ticket, under the
    lock, decides. The thread runs from the first call until :meth:`close`.

    Nearly all calls leave long before their deadline. So a call that leaves doesn't wake the
    thread, which sleeps until the earliest deadline that was known when it last looked.
    """

    def __init__(self) -> None:
        """Create the watch, without starting its thread yet."""
        self._lock = threading.Lock()
        self._earlier = threading.Condition(self._lock)
        self._running: set[Ticket] = set()
        self._next_look = math.inf  # no later than the deadline of any running call
        self._thread: threading.Thread | None = None
        self._closed = False

    def enter(self, seconds: float, on_expired: Callable[[], None]) -> Ticket:
        """Start watching a call.

        Args:
            seconds: the time limit of the call.
            on_expired: called when the limit is exceeded, on the watch's thread; must be quick.
        """
        ticket = Ticket(monotonic() + seconds, on_expired)
        with self._lock:
            self._running.add(ticket)
            if ticket.deadline < self._next_look:
                self._look_at(ticket.deadline)
        return ticket

    def leave(self, ticket: Ticket) -> bool:
        """Stop watching a call; return whether it was in time.

        The clock decides: a call that has kept the thread from running, by holding the GIL, is late
        although it hasn't expired yet, which it does then.
        """
        with self._lock:
            in_time = ticket in self._running and (self._closed or monotonic() < ticket.deadline)
            if in_time:
                self._running.remove(ticket)
        return in_time

    def close(self) -> None:
        """End the thread; no call expires any more."""
        with self._lock:
            self._closed = True
            self._earlier.notify()

    def _look_at(self, instant: float) -> None:
        self._next_look = instant
        if self._thread is not None:
            self._earlier.notify()
        elif not self._closed:
            self._thread = threading.Thread(
                target=self._run, name="outbox-worker-watch", daemon=True
            )
            self._thread.start()

    def _run(self) -> None:
        while not self._closed:
            with self._lock:
                late = self._wait_for_late()
            for ticket in late:
                try:
                    ticket.on_expired()
                except Exception:  # for instance, no more threads can be started
                    logger.exception("could not give up a late call")

    def _wait_for_late(self) -> list[Ticket]:
        while not self._closed and (remaining := self._next_look - monotonic()) > 0:
            self._earlier.wait(None if remaining == math.inf else remaining)
        if self._closed:
            return []
        now = monotonic()
        late = sorted((ticket for ticket in self._running if ticket.deadline <= now), key=_deadline)
        self._running.difference_update(late)
        self._next_look = min(map(_deadline, self._running), default=math.inf)
        return late


def _deadline(ticket: Ticket) -> float:
    return ticket.deadline
