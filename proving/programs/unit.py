"""A unit of work in a program under test, which writes down what it enqueues."""

from __future__ import annotations

import os
import random
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outbox import enqueue_event
from proving import bugs
from proving.history import Journal
from proving.pace import Pace

__all__ = ["Draft", "Unit", "does", "journal", "pace"]

_PADDING = "x" * 120
_TARGETS = {
    "order": "order.placed",
    "task": "task.given",
    "charge": "charge.made",
    "shaky": "shaky.thing",
    "bounded": "bounded.thing",
    "misaddressed": "order.placed",
}
_CONSUMED = ("order", "task", "charge")
_WORK = {"fail": 0.05, "retry": 0.1, "slow": 0.012}  # all others follow
_DELAY = (1.5, 4.0)  # seconds at least and at most
_DELAYED = 0.5  # of the events of a unit that delays some


def journal(kind: str) -> Journal:
    """Plant the bug and return this process's journal; every program calls this first."""
    bugs.plant(os.environ.get("PROVE_BUG", ""))
    return Journal.of_process(_folder(), kind, os.getpid())


def pace(kind: str) -> Pace:
    """Return the pace of this process."""
    return Pace(_folder(), kind)


def does(habit: str) -> bool:
    """Return whether the programs have ``habit``, see :data:`proving.ground.HABITS`."""
    return habit in os.environ.get("PROVE_HABITS", "").split(",")


def _folder() -> Path:
    return Path(os.environ["PROVE_HISTORY"])


@dataclass
class Draft:
    """An event to enqueue.

    Attributes:
        payload: its payload.
        target: its target.
        options: the other arguments of ``enqueue_event``.
        facts: what is expected of it.
    """

    payload: dict[str, Any]
    target: str
    options: dict[str, Any]
    facts: dict[str, Any]

    def enqueue(self, enqueue: Callable[..., Any] = enqueue_event) -> Any:
        """Enqueue it; return the event."""
        return enqueue(self.payload, self.target, **self.options)


class Unit:
    """A unit of work whose events are written down.

    Attributes:
        name: the name, unique in the history.
        keys: the keys of the events enqueued so far.
    """

    def __init__(
        self,
        history: Journal,
        name: str,
        chance: random.Random,
        *,
        delays: bool = False,
        once: bool = False,
        **options: Any,
    ) -> None:
        """Begin a unit.

        Args:
            history: the journal of this process.
            name: the name, unique in this process.
            chance: the source of randomness.
            delays: whether some events are delayed.
            once: whether its events must not arrive twice while nothing goes wrong.
            **options: the options of every event.
        """
        self._delays = delays
        self._once = once
        self._options = options
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
        draft = self._draft(lane, seq)
        self._intend(draft, draft.enqueue().id)

    def enqueue_some(self) -> None:
        """Enqueue one to four events."""
        for _ in range(self._chance.randint(1, 4)):
            self.enqueue()

    def draft(self, count: int) -> list[Draft]:
        """Write down that ``count`` events may come out, all or none, and return them.

        They have ids already. A later ``commit()`` or ``roll_back()`` says which it is.
        """
        self._history.write("unsure", unit=self.name)
        drafts = [self._draft(None, 0) for _ in range(count)]
        for draft in drafts:
            draft.options["id"] = str(uuid.uuid4())
            self._intend(draft, draft.options["id"])
        return drafts

    def commit(self) -> None:
        """Write down that the work has succeeded; from now on the library owes its events."""
        self._history.write("commit", unit=self.name)

    def roll_back(self) -> None:
        """Write down that the work has failed."""
        self._history.write("rollback", unit=self.name)

    def confirm(self, keys: list[str]) -> None:
        """Write down that the library has reported ``keys`` as published."""
        self._history.write("confirm", keys=keys)

    def _draft(self, lane: str | None, seq: int) -> Draft:
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
        self.keys.append(key)
        facts: dict[str, Any] = {"key": key, "work": work}
        options = dict(self._options)
        if self._delays and self._chance.random() < _DELAYED:
            options["delay"] = self._chance.uniform(*_DELAY)
            facts["not_before"] = time.time() + options["delay"]
        elif kind == "order":
            facts |= {"lane": lane or self.name, "seq": seq or number}
        if kind == "charge":
            facts["effect"] = True
        if kind in _CONSUMED:
            facts["routable"] = True
        if kind == "misaddressed":
            options |= {"exchange": f"{os.environ['PROVE_NAME']}.missing", "unroutable": "park"}
            facts["only"] = "parked"
        if "session" in options or "using" in options:
            facts["stored"] = True
        if self._once:
            facts["once"] = True
        payload = {"key": key, "work": work, "padding": _PADDING}
        return Draft(payload, _TARGETS[kind], options, facts)

    def _intend(self, draft: Draft, event_id: str) -> None:
        self._history.write("intent", unit=self.name, id=event_id, **draft.facts)
