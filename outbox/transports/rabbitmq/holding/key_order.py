"""Keeps the order of the events of one key when the broker nacks some of them. No I/O.

Without a nack nothing is done here. After one, the events of that key take turns: each is sent when
the one before it has been confirmed, and later ones wait behind them. Events that were in flight
together with a nacked one may have overtaken it already.
"""

from __future__ import annotations

import bisect
import itertools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from outbox.backlog.chunk import Entry

__all__ = ["KeyOrder"]

_END = 1 << 62  # behind the number of whatever was sent
_number = operator.itemgetter(0)


@dataclass(slots=True)
class _Turns:
    """The events of one key: those that wait, each with its place, and the one that was sent."""

    waiting: list[tuple[int, Entry]] = field(default_factory=list)
    sent: tuple[int, Entry] | None = None
    scheduled: bool = False


class KeyOrder:
    """The nacked events of one publisher that have a key, and those behind them. One thread.

    Attributes:
        keys: what waits, by key.
    """

    def __init__(self) -> None:
        self.keys: dict[str, _Turns] = {}
        self._places_at_end = itertools.count(_END)

    def nacked(self, entries: Iterable[Entry], numbers: Mapping[Entry, int]) -> list[str]:
        """Let nacked ``entries`` wait; return the keys to call :meth:`take_turn` for later.

        Args:
            entries: entries with a key.
            numbers: their places in the order in which they were sent; the end, if not given.
        """
        to_schedule: list[str] = []
        for entry in entries:
            key = entry.event.key or ""
            turns = self.keys.setdefault(key, _Turns())
            number = numbers.get(entry)
            place = (next(self._places_at_end) if number is None else number, entry)
            if turns.sent is not None and turns.sent[1] is entry:
                place, turns.sent = turns.sent, None  # its first place
            bisect.insort_right(turns.waiting, place, key=_number)
            if not turns.scheduled and turns.sent is None:
                turns.scheduled = True
                to_schedule.append(key)
        return to_schedule

    def hold_back(self, entries: Iterable[Entry]) -> tuple[list[Entry], list[Entry]]:
        """Split ``entries`` into those that can be sent, and those that wait for their turn now."""
        ready: list[Entry] = []
        waiting: list[Entry] = []
        for entry in entries:
            turns = self.keys.get(entry.event.key) if entry.event.key is not None else None
            if turns is None or (turns.sent is not None and turns.sent[1] is entry):
                ready.append(entry)
            else:
                turns.waiting.append((next(self._places_at_end), entry))
                waiting.append(entry)
        return ready, waiting

    def take_turn(self, key: str) -> Entry | None:
        """Return the event of ``key`` to send next, if there is one and it is its turn."""
        turns = self.keys.get(key)
        if turns is None:
            return None
        turns.scheduled = False
        if turns.sent is not None and turns.sent[1].fate is None:
            return None
        turns.sent = None
        while turns.waiting:
            turns.sent = turns.waiting.pop(0)
            if turns.sent[1].fate is None:
                return turns.sent[1]
        del self.keys[key]
        return None

    def settled(self, entries: Iterable[Entry]) -> list[str]:
        """Return the keys whose turn has ended, as their event is among ``entries``."""
        ended: list[str] = []
        for entry in entries:
            turns = self.keys.get(entry.event.key) if entry.event.key is not None else None
            if turns is not None and turns.sent is not None and turns.sent[1] is entry:
                ended.append(entry.event.key or "")
        return ended

    def closed(self) -> list[Entry]:
        """Forget everything; return the entries that waited, in the order of each key."""
        waiting = [entry for turns in self.keys.values() for _, entry in turns.waiting]
        self.keys.clear()
        return waiting
