"""Which acks to write for the messages that are done."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Acks"]


class Acks:
    """The deliveries of one channel that the broker still waits for. For one thread; no I/O.

    A channel numbers its deliveries from 1 on. One ack may speak for all up to a number
    (``multiple``), but only when none below it is still being worked on. A number is settled at
    most once: the broker closes the channel over a second time.
    """

    def __init__(self) -> None:
        self._settled: set[int] = set()  # those above the lowest that is not settled
        self._lowest = 1

    def done(self, tags: Iterable[int]) -> list[tuple[int, bool]]:
        """Settle ``tags`` and return the acks to write: (number, multiple), ascending."""
        new = sorted(tag for tag in tags if self.settle(tag, advance=False))
        self._advance()
        # Below the lowest all are settled: the highest new one there speaks for the others. It
        # must itself be outstanding, or the broker takes it for an unknown number.
        together = [tag for tag in new if tag < self._lowest]
        acks = [(together[-1], len(together) > 1)] if together else []
        return acks + [(tag, False) for tag in new if tag > self._lowest]

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
