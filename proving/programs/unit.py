"""A unit of work in a program under test, which writes down what it enqueues."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

from outbox import enqueue_event
from proving import bugs
from proving.history import Journal
from proving.pace import Pace

__all__ = ["Unit", "journal", "pace"]

_PADDING = "x" * 120
_TARGETS = {
    "order": "order.placed",
    "task": "task.given",
    "charge": "charge.made",
    "shaky": "shaky.thing",
    "bounded": "bounded.thing",
}
_CONSUMED = ("order", "task", "charge")
_WORK = {"fail": 0.05, "retry": 0.1, "slow": 0.012}  # all others follow


def journal(kind: str) -> Journal:
    """Plant the bug and return this process's journal; every program calls this first."""
    bugs.plant(os.environ.get("PROVE_BUG", ""))
    return Journal(_folder(), f"{kind}-{os.getpid()}")


def pace(kind: str) -> Pace:
    """Return the pace of this process."""
    return Pace(_folder(), kind)


def _folder() -> Path:
    return Path(os.environ["PROVE_HISTORY"])


class Unit:
    """A unit of work whose events are written down.

    Attributes:
        name: the name, unique in the history.
        keys: the keys of the events enqueued so far.
    """

    def __init__(self, history: Journal, name: str, chance: random.Random, **options: Any) -> None:
        self._options = options  # of every event
        self._history = history
        self._chance = chance
        self.name = f"{history.by}/{name}"
        self.keys: list[str] = []

    def enqueue(self, lane: str | None = None, seq: int = 0) -> None:
        """Enqueue an event of a random kind.

        Args:
            lane: the lane in which the order is promised; by default this unit.
            seq: the event's number in ``lane``; by default its number in this unit.
        """
        kinds = os.environ["PROVE_KINDS"].split(",")
        kind = "order" if self._chance.random() < 0.6 else self._chance.choice(kinds)
        work = None
        if kind in _CONSUMED and os.environ["PROVE_WORK"]:
            weights = [*_WORK.values(), 1 - sum(_WORK.values())]
            [work] = self._chance.choices([*_WORK, "follow"], weights)
            if kind == "charge" and work == "slow":
                work = "follow"
        number = len(self.keys)
        key = f"{self.name}/{number}"
        payload = {"key": key, "work": work, "padding": _PADDING}
        event = enqueue_event(payload, _TARGETS[kind], **self._options)
        facts: dict[str, Any] = {}
        if kind == "order":
            facts = {"lane": lane or self.name, "seq": seq or number}
        if kind == "charge":
            facts["effect"] = True
        if "session" in self._options:
            facts["stored"] = True
        self._history.write("intent", unit=self.name, key=key, id=event.id, work=work, **facts)
        self.keys.append(key)

    def enqueue_some(self) -> None:
        """Enqueue one to four events."""
        for _ in range(self._chance.randint(1, 4)):
            self.enqueue()

    def commit(self) -> None:
        """Write down that the work has succeeded; from now on the library owes its events."""
        self._history.write("commit", unit=self.name)

    def roll_back(self) -> None:
        """Write down that the work has failed."""
        self._history.write("rollback", unit=self.name)

    def confirm(self, keys: list[str]) -> None:
        """Write down that the library has reported ``keys`` as published."""
        self._history.write("confirm", keys=keys)
