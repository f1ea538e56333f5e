"""Which acks to write for the messages that are done."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from outbox.messages.delivery import Delivery

__all__ = ["Acks", "Done"]


class Done:
    """Deliveries that are done, until their acks are written. No I/O.

    Any thread adds; the link's thread takes, then pauses, so that the acks of a short time go out
    together. It is woken for the first delivery after a pause, and in a pause once a quarter of the
    prefetch is done: the broker must not run out of room for more.
    """

    def __init__(self, prefetch: int) -> None:
        self._waiting: deque[Delivery] = deque()
        self._many = max(1, prefetch // 4)
        self._woken = False  # or in a pause
        self._hurried = False

    def add(self, delivery: Delivery) -> bool:
        """Add one; return whether the link's thread must be woken to take."""
        self._waiting.append(delivery)
        if not self._woken:
            self._woken = True
            return True
        if len(self._waiting) >= self._many and not self._hurried:
            self._hurried = True
            return True
        return False

    def take(self) -> list[Delivery]:
        """Take all out. A pause begins, unless one has already."""
        self._hurried = False  # before: what is added from now on may be left behind
        waiting = self._waiting
        return [waiting.popleft() for _ in range(len(waiting))]

    def end_pause(self) -> bool:
        """End the pause; return whether to take what has come meanwhile, in a pause again."""
        self._woken = False  # before looking: who adds after that finds it
        self._woken = bool(self._waiting)
        return self._woken


class Acks:
    """The deliveries of one channel that the broker still waits for. For one thread; no I/O.

    A channel numbers its deliveries from 1 on. One ack may speak for all up to a number
    (``multiple``), but only when none below it is still being worked on. A number is settled at
    most once: the broker closes the channel over a second time.

    What is above one that is worked on needs an ack of its own, unless that one is done soon. So
    such acks are held back, until the next call.
    """

    def __init__(self) -> None:
        self._settled: set[int] = set()  # those above the lowest that is not settled
        self._lowest = 1
        self._held: list[int] = []

    @property
    def held(self) -> bool:
        """Whether acks are held back."""
        return bool(self._held)

    def done(self, tags: Iterable[int], *, hold: bool = True) -> list[tuple[int, bool]]:
        """Settle ``tags`` and return the acks to write: (number, multiple), ascending.

        Args:
            tags: that are done.
            hold: whether any may be held back, until another call.
        """
        new = sorted(tag for tag in tags if self.settle(tag, advance=False))
        due, may_wait = (self._held, new) if hold else ([*self._held, *new], [])
        self._advance()
        # Below the lowest all are settled: the highest one there speaks for the others. It must
        # itself be outstanding, or the broker takes it for an unknown number.
        together = sorted(tag for tag in (*due, *may_wait) if tag < self._lowest)
        acks = [(together[-1], len(together) > 1)] if together else []
        self._held = [tag for tag in may_wait if tag > self._lowest]
        return acks + [(tag, False) for tag in sorted(due) if tag > self._lowest]

    def settle(self, tag: int, *, advance: bool = True) -> bool:
        """Settle one by other means than an ack; return False if it had been settled before."""
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
