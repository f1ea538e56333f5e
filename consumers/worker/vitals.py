"""What a worker lets its parent know once a second: what runs, and which of its parts answer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from outbox import Publisher
from outbox.consumers.worker.task_engine import TaskEngine
from outbox.consumers.worker.thread_engine import ThreadEngine
from outbox.messages.delivery import Delivery
from outbox.service.health.judge import LONGEST_STEP
from outbox.service.health.pulse import Pulse
from outbox.transports.subscription import Subscription

__all__ = ["Vitals"]


class Vitals:
    """The looks at a worker. Used by one thread, which asks the others and never waits for one.

    Messages don't note when they begin: that would cost each of them. Instead, a message counts
    from the first look that finds it, so its age is up to a second short.
    """

    def __init__(
        self,
        engines: Iterable[ThreadEngine | TaskEngine],
        subscription: Subscription,
        publisher: Publisher,
    ) -> None:
        """Prepare to look at the engines and the connections of a started worker."""
        self._engines = list(engines)
        self._pulses = {"io": Pulse(subscription.ping), "publisher": Pulse(publisher.ping)}
        for engine in self._engines:
            if isinstance(engine, TaskEngine):
                self._pulses["loop"] = Pulse(engine.ping)
        self._ages: dict[Delivery, float] = {}
        self._ended: dict[ThreadEngine | TaskEngine, int] = {}
        self._all_late = 0.0

    def look(self, seconds: float) -> dict[str, Any]:
        """Return this part of the report, ``seconds`` after the look before."""
        pulses = {
            name: silence
            for name, pulse in self._pulses.items()
            if (silence := pulse.step(seconds)) is not None
        }
        pulses["handlers"] = self._handlers(seconds)
        running = [delivery for engine in self._engines for delivery in engine.in_flight.running()]
        ages = self._ages
        self._ages = {
            delivery: ages[delivery] + seconds if delivery in ages else 0.0 for delivery in running
        }
        return {
            "in_flight": len(running),
            "late": sum(engine.late for engine in self._engines),
            "oldest": max(self._ages.values(), default=None),
            "pulses": pulses,
        }

    def _handlers(self, seconds: float) -> float:
        """Return for how long all handlers of an engine have been late, and none of them ended."""
        are_late = False
        for engine in self._engines:
            ended = engine.late_ended
            if ended != self._ended.get(engine, 0):
                self._ended[engine] = ended
                self._all_late = 0.0
            are_late |= engine.late >= engine.size
        self._all_late = self._all_late + min(seconds, LONGEST_STEP) if are_late else 0.0
        return self._all_late
