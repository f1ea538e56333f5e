"""Which event a confirm speaks of.

The broker numbers what a channel publishes from 1 on (Confirm.Select) and answers with
Basic.Ack or Basic.Nack: in any order, singly, or with ``multiple`` for all numbers up to one that
are still outstanding. An event that no queue takes comes back first, as Basic.Return, which has no
number; its Ack follows.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence

from outbox.backlog.chunk import Entry

__all__ = ["Confirms"]

_Address = tuple[str, str, str]


class Confirms:
    """The outstanding entries of one channel. For one thread; no I/O."""

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._outstanding: dict[int, Entry] = {}
        self._lowest = 1
        self._next = 1
        self._returned: dict[int, str] = {}
        self._by_address: dict[_Address, deque[int]] | None = None  # made when it is needed

    def __len__(self) -> int:
        return len(self._outstanding)

    def sent(self, entries: Sequence[Entry]) -> None:
        """Note that ``entries`` go out next, in this order."""
        first = self._next
        self._next = first + len(entries)
        self._outstanding.update(zip(range(first, self._next), entries, strict=True))
        if self._by_address is not None:
            self._index(self._by_address, zip(range(first, self._next), entries, strict=True))

    def returned(self, event_id: str, exchange: str, target: str, reason: str) -> bool:
        """Note that the broker gave an event back; return whether one is outstanding.

        Of several with the same id and address it is the first that has not come back.
        """
        if self._by_address is None:
            self._by_address = {}
            self._index(self._by_address, self._in_order())
        tags = self._by_address.get((event_id, exchange, target))
        while tags:
            tag = tags.popleft()
            if tag in self._outstanding:
                self._returned[tag] = reason
                return True
        return False

    def confirmed(
        self, answers: Iterable[tuple[int, int]]
    ) -> tuple[list[Entry], list[tuple[Entry, str]]]:
        """Return what some confirms speak of: entries, and apart those that came back, and why.

        A number that is not outstanding is passed over; 0 with ``multiple`` means all.

        Args:
            answers: (number, whether ``multiple``), in the order in which they came.
        """
        pop = self._outstanding.pop
        returned = self._returned
        entries: list[Entry] = []
        came_back: list[tuple[Entry, str]] = []
        for tag, multiple in answers:
            tags: Iterable[int] = (tag,)
            if multiple:
                end = min(tag + 1 if tag else self._next, self._next)
                tags = range(self._lowest, end)
                self._lowest = max(self._lowest, end)
            for one in tags:
                entry = pop(one, None)
                if entry is None:
                    continue
                if returned and one in returned:
                    came_back.append((entry, returned.pop(one)))
                else:
                    entries.append(entry)
        if not self._outstanding:
            self._lowest = self._next
            self._by_address = None
        return entries, came_back

    def clear(self) -> list[Entry]:
        """Return all that is outstanding, in the order in which it was sent, and start anew."""
        left = [entry for _, entry in self._in_order()]
        self._reset()
        return left

    def _in_order(self) -> list[tuple[int, Entry]]:
        return sorted(self._outstanding.items(), key=lambda item: item[0])

    @staticmethod
    def _index(by_address: dict[_Address, deque[int]], sent: Iterable[tuple[int, Entry]]) -> None:
        for tag, entry in sent:
            event = entry.sent_as
            by_address.setdefault((event.id, event.exchange, event.target), deque()).append(tag)
