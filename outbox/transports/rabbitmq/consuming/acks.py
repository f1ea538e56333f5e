"""The acks to write for deliveries that are done."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from outbox.messages.delivery import Delivery

__all__ = ["Acks", "Done"]


class Done:
    """The deliveries that are done and wait for their acks. No I/O.

    Any thread adds; the link's thread takes, then pauses to gather the next acks. It is woken for
    the first delivery after a pause, and during a pause when a quarter of the prefetch is done, so
    that the broker can go on delivering.
    """

    def __init__(self, prefetch: int) -> None:
        self._waiting: deque[Delivery] = deque()
        self._many = max(1, prefetch // 4)
        self._woken = False  # or in a pause
        self._hurried = False

    def add(self, delivery: Delivery) -> bool:
        """Add ``delivery``; return whether to wake the link's thread to take."""
        self._waiting.append(delivery)
        if not self._woken:
            self._woken = True
            return True
        if len(self._waiting) >= self._many and not self._hurried:
            self._hurried = True
            return True
        return False

    def take(self) -> list[Delivery]:
        """Take all deliveries out, and begin a pause unless one has begun."""
        self._hurried = False  # first: this may miss deliveries added from now on
        waiting = self._waiting
        return [waiting.popleft() for _ in range(len(waiting))]

    def end_pause(self) -> bool:
        """End the pause; return whether to take what was added meanwhile, and pause again."""
        self._woken = False  # before the check: a delivery added after it wakes the thread
        self._woken = bool(self._waiting)
        return self._woken


class Acks:
    """The unsettled deliveries of one channel. For one thread; no I/O.

    A channel numbers its deliveries from 1. One ack can cover all numbers up to its own
    (``multiple``), but only if none of them is still being processed. A number must be settled at
    most once: the broker closes the channel the second time.

    A delivery above one that is still being processed needs a separate ack, unless the lower one is
    done soon. So such acks are held back until the next call.
    """

    def __init__(self) -> None:
        self._settled: set[int] = set()  # the settled numbers above the lowest unsettled one
        self._lowest = 1
        self._held: list[int] = []

    @property
    def held(self) -> bool:
        """Whether acks are held back."""
        return bool(self._held)

    def done(self, tags: Iterable[int], *, hold: bool = True) -> list[tuple[int, bool]]:
        """Settle ``tags`` and return the acks to write: (number, multiple), ascending.

        Args:
            tags: the numbers of deliveries that are done.
            hold: whether acks may be held back until the next call.
        """
        new = sorted(tag for tag in tags if self.settle(tag, advance=False))
        due, may_wait = (self._held, new) if hold else ([*self._held, *new], [])
        self._advance()
        # All below the lowest are settled, so one ack with the highest of these covers them. That
        # number must not have been acked before, or the broker rejects it as unknown.
        together = sorted(tag for tag in (*due, *may_wait) if tag < self._lowest)
        acks = [(together[-1], len(together) > 1)] if together else []
        self._held = [tag for tag in may_wait if tag > self._lowest]
        return acks + [(tag, False) for tag in sorted(due) if tag > self._lowest]

    def settle(self, tag: int, *, advance: bool = True) -> bool:
        """Note that ``tag`` is settled other than by an ack; return False if it already was."""
        if tag < self._lowest or tag in self._settled:
            return False
        self._settled.add(tag)
        if advance:
            self._advance()
        return True

    def _advance(self) -> None:
        while self._lowest in self._settled:
            self._settled.remove(self._lowest)
            self._lowest += 1
