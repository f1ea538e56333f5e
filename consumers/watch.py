"""Watches over calls that have a time limit, and tells when one takes too long."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

__all__ = ["Ticket", "Watch"]

logger = logging.getLogger("outbox.consumer")

_FEW = 64  # tickets of calls that have left, which are not worth tidying up


class Ticket:
    """One call that is being watched."""

    __slots__ = ("expired", "left", "on_expired")

    def __init__(self, on_expired: Callable[[], None]) -> None:
        self.on_expired: Callable[[], None] | None = on_expired
        self.expired = False
        self.left = False


class Watch:
    """Calls back, on a thread of its own, for calls that take too long. Thread-safe.

    Either a call has left in time or it has expired, never both. The thread is there from the
    first call on until :meth:`close`. Calls that have left take no room for long: there are never
    many more of them here than of those that run.
    """

    def __init__(self) -> None:
        """Nothing is watched yet."""
        self._changed = threading.Condition()
        self._heap: list[tuple[float, int, Ticket]] = []
        self._left = 0  # tickets in the heap whose calls have left
        self._numbers = itertools.count()
        self._thread: threading.Thread | None = None
        self._closed = False

    def enter(self, seconds: float, on_expired: Callable[[], None]) -> Ticket:
        """Begin to watch a call.

        Args:
            seconds: that it has.
            on_expired: called when they are over, on the watch's thread; must be quick.
        """
        ticket = Ticket(on_expired)
        with self._changed:
            heapq.heappush(self._heap, (time.monotonic() + seconds, next(self._numbers), ticket))
            if self._heap[0][2] is ticket:
                self._changed.notify()
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(
                    target=self._run, name="outbox-worker-watch", daemon=True
                )
                self._thread.start()
        return ticket

    def leave(self, ticket: Ticket) -> bool:
        """End watching; return whether the call was in time."""
        with self._changed:
            ticket.left = True
            ticket.on_expired = None  # it holds the message
            if ticket.expired:
                return False
            self._left += 1
            if self._left > _FEW and 2 * self._left > len(self._heap):
                self._heap = [entry for entry in self._heap if not entry[2].left]
                heapq.heapify(self._heap)
                self._left = 0
            return True

    def close(self) -> None:
        """End the thread; nothing expires any more."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                on_expired = self._wait_for_late()
            if on_expired is None:
                return
            try:
                on_expired()
            except Exception:  # one call that cannot be told must not end the watch over others
                logger.exception("a call that takes too long could not be told")

    def _wait_for_late(self) -> Callable[[], None] | None:
        while not self._closed:
            if not self._heap:
                self._changed.wait()
                continue
            deadline, _, ticket = self._heap[0]
            left = deadline - time.monotonic()
            if ticket.left or left <= 0:
                heapq.heappop(self._heap)
                if ticket.left:
                    self._left -= 1
                else:
                    ticket.expired = True
                    return ticket.on_expired
            else:
                self._changed.wait(left)
        return None
