"""Units of work in a main thread whose signal handler raises or publishes, at any moment."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Sequence

from outbox import EventCollector, auto_publishing
from outbox.configuration import default_publisher
from proving.history import Journal
from proving.programs.unit import Draft, Unit

__all__ = ["Interrupted", "TimeLimit", "until_alarm"]

_SOONEST = 0.00002  # seconds until the signal
_DRAIN = 0.2  # seconds


class TimeLimit(Exception):
    """Raised by the signal handler, like the time limits of task queues."""


class Interrupted:
    """A sequence of units of work that are interrupted. For the main thread.

    Attributes:
        pause: the seconds to wait between two units.
        count: the number of exceptions that the signal handler has raised.
    """

    def __init__(self, history: Journal, chance: random.Random) -> None:
        """Install the handler of SIGALRM."""
        self.pause = 0.01
        self.count = 0
        self._usual: dict[str, float] = {}  # seconds that an action takes
        self._history = history
        self._chance = chance
        self._units = 0
        self._in_handler: Sequence[Draft] = ()
        signal.signal(signal.SIGALRM, self._on_alarm)

    def work(self) -> None:
        """Run one unit of work, and interrupt it."""
        unit = self._unit()
        drafts = unit.draft(self._chance.randint(1, 3))
        signalled = self._unit()
        publishes = self._chance.random() < 0.3
        self._in_handler = signalled.draft(1) if publishes else ()
        way = self._chance.choice((self._in_block, self._by_publish, self._by_drain))
        if way(drafts):
            unit.commit()
        if publishes:
            # The signal came in time, or these are left.
            if self._in_handler:
                signalled.roll_back()
            else:
                signalled.commit()

    def _unit(self) -> Unit:
        self._units += 1
        return Unit(self._history, f"main/{self._units}", self._chance, once=True)

    def _in_block(self, drafts: Sequence[Draft]) -> bool:
        """Publish in a block; return whether it has succeeded: otherwise either is right."""

        def block() -> None:
            with auto_publishing():
                for draft in drafts:
                    draft.enqueue()

        return self._interrupting("block", block)

    def _by_publish(self, drafts: Sequence[Draft]) -> bool:
        """Publish, and again what an interruption has left; return True."""
        collector = EventCollector()
        for draft in drafts:
            draft.enqueue(collector.enqueue_event)
        if not self._interrupting("publish", collector.publish):
            collector.publish()
        return True

    def _by_drain(self, drafts: Sequence[Draft]) -> bool:
        """Drain after a block; return True."""
        with auto_publishing():
            for draft in drafts:
                draft.enqueue()
        self._interrupting("drain", lambda: default_publisher().drain(_DRAIN))
        return True

    def _interrupting(self, kind: str, action: Callable[[], object]) -> bool:
        """Return whether ``action`` ended before it was interrupted."""
        usual = self._usual.get(kind, 0.002)
        begin = time.perf_counter()
        # Half of the signals come in time, whatever the machine.
        finished = until_alarm(_SOONEST + self._chance.uniform(0, 2 * usual), action)
        if finished:
            took = min(time.perf_counter() - begin, 0.1)
            self._usual[kind] = 0.9 * usual + 0.1 * took
        self.count += not finished
        return finished

    def _on_alarm(self, *_: object) -> None:
        if not self._in_handler:
            raise TimeLimit
        drafts, self._in_handler = self._in_handler, ()
        with auto_publishing(independent=True):
            for draft in drafts:
                draft.enqueue()


def until_alarm(seconds: float, action: Callable[[], object]) -> bool:
    """Call ``action``; return False if SIGALRM, after ``seconds``, made it raise TimeLimit."""
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            action()
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except TimeLimit:
        return False
    return True
