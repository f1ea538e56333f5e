"""Watches over calls that have a time limit, and tells when one takes too long."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable

__all__ = ["Ticket", "Watch"]

logger = logging.getLogger("outbox.consumer")


class Ticket:
    """One call that is being watched."""

    __slots__ = ("deadline", "on_expired")

    def __init__(self, deadline: float, on_expired: Callable[[], None]) -> None:
        self.deadline = deadline
        self.on_expired = on_expired


class Watch:
    """Calls back, on a thread of its own, for calls that take too long. Thread-safe.

    Either a call has left in time or it has expired, never both. The thread is there from the
    first call on until :meth:`close`.

    Nearly all calls leave long before their time. So nothing is kept of those that have left, and
    the thread sleeps until the earliest of those that ran when it last looked could be late.
    """

    def __init__(self) -> None:
        """Nothing is watched yet."""
        self._lock = threading.Lock()
        self._earlier = threading.Condition(self._lock)
        self._running: set[Ticket] = set()
        self._next_look = math.inf  # no later than the deadline of any that runs
        self._thread: threading.Thread | None = None
        self._closed = False

    def enter(self, seconds: float, on_expired: Callable[[], None]) -> Ticket:
        """Begin to watch a call.

        Args:
            seconds: that it has.
            on_expired: called when they are over, on the watch's thread; must be quick.
        """
        ticket = Ticket(time.monotonic() + seconds, on_expired)
        with self._lock:
            self._running.add(ticket)
            if ticket.deadline < self._next_look:
                self._look_at(ticket.deadline)
        return ticket

    def leave(self, ticket: Ticket) -> bool:
        """End watching; return whether the call was in time."""
        with self._lock:
            in_time = ticket in self._running
            self._running.discard(ticket)
        return in_time

    def close(self) -> None:
        """End the thread; nothing expires any more."""
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
                except Exception:  # there can be no more threads, for instance
                    logger.exception("a call that takes too long could not be told")

    def _wait_for_late(self) -> list[Ticket]:
        while not self._closed and (left := self._next_look - time.monotonic()) > 0:
            self._earlier.wait(None if left == math.inf else left)
        if self._closed:
            return []
        now = time.monotonic()
        late = sorted((one for one in self._running if one.deadline <= now), key=_deadline)
        self._running.difference_update(late)
        self._next_look = min(map(_deadline, self._running), default=math.inf)
        return late


def _deadline(ticket: Ticket) -> float:
    return ticket.deadline
