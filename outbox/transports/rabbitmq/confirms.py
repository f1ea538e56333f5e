"""Matches the broker's answers with entries.

A channel's messages are numbered from 1 (Confirm.Select). The broker answers with Basic.Ack or
Basic.Nack in any order: for one number, or with ``multiple`` for all outstanding numbers up to one.
An unroutable message is first returned (Basic.Return, which has no number) and then acked.
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
        self._sent_before = 0  # over earlier channels
        self._next = 1
        self._reset()

    def _reset(self) -> None:
        self._outstanding: dict[int, Entry] = {}
        self._lowest = 1
        self._sent_before += self._next
        self._next = 1
        self._returned: dict[int, str] = {}
        self._by_address: dict[_Address, deque[int]] | None = None  # built at the first return

    def __len__(self) -> int:
        return len(self._outstanding)

    def sent(self, entries: Sequence[Entry]) -> None:
        """Number ``entries``, which are sent next, in this order."""
        first = self._next
        self._next = first + len(entries)
        self._outstanding.update(zip(range(first, self._next), entries, strict=True))
        if self._by_address is not None:
            self._index(self._by_address, zip(range(first, self._next), entries, strict=True))

    def returned(self, event_id: str, exchange: str, target: str, reason: str) -> bool:
        """Note that the broker returned an event; return whether such an event is outstanding.

        If several have the same id and address, it is the first that hasn't been returned yet.
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
        """Return the answered entries, and separately those that were returned, with the reason.

        Numbers that aren't outstanding are ignored; 0 with ``multiple`` means all.

        Args:
            answers: pairs of a number and ``multiple``, in the order received.
        """
        pop = self._outstanding.pop
        returned = self._returned
        entries: list[Entry] = []
        unroutable: list[tuple[Entry, str]] = []
        for tag, multiple in answers:
            tags: Iterable[int] = (tag,)
            if multiple:
                end = min(tag + 1 if tag else self._next, self._next)
                tags = range(self._lowest, end)
                self._lowest = max(self._lowest, end)
            for number in tags:
                entry = pop(number, None)
                if entry is None:
                    continue
                if returned and number in returned:
                    unroutable.append((entry, returned.pop(number)))
                else:
                    entries.append(entry)
        if not self._outstanding:
            self._lowest = self._next
            self._by_address = None
        return entries, unroutable

    def numbers(self, tag: int, *, multiple: bool) -> dict[Entry, int]:
        """Return the outstanding entries of an answer, numbered in the order in which all are sent.

        The numbers go on over later channels.
        """
        tags = [tag] if not multiple else [one for one in self._outstanding if one <= (tag or one)]
        return {
            self._outstanding[one]: self._sent_before + one
            for one in tags
            if one in self._outstanding
        }

    def clear(self) -> list[Entry]:
        """Return the outstanding entries in the order sent, and reset for a new channel."""
        outstanding = [entry for _, entry in self._in_order()]
        self._reset()
        return outstanding

    def _in_order(self) -> list[tuple[int, Entry]]:
        return sorted(self._outstanding.items(), key=lambda item: item[0])

    @staticmethod
    def _index(by_address: dict[_Address, deque[int]], sent: Iterable[tuple[int, Entry]]) -> None:
        for tag, entry in sent:
            event = entry.sent_as
            by_address.setdefault((event.id, event.exchange, event.target), deque()).append(tag)
