"""A script with threads and an event loop, which publishes until SIGTERM.

Its main thread is interrupted by signals, and another one configures outbox again and again, if the
programs have these habits. With a spool, the kind is ``spooled``: what outbox reports as kept is
then owed as well.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
import time

from outbox import CollectorFull, EventCollector, auto_publishing, configure
from outbox.report import PublishReport
from outbox.system.signals import Signals
from proving.programs.interrupted import Interrupted
from proving.programs.late import in_late_task, in_late_thread
from proving.programs.unit import Unit, does, journal, pace

KIND = "spooled" if os.environ.get("OUTBOX_SPOOL") else "script"
HISTORY = journal(KIND)
PACE = pace(KIND)
THREADS = 2
TASKS = 2
PAUSE = 0.05  # seconds at most between two units
ROTATION = 1.0  # seconds between two calls of configure()


class Failed(Exception):
    """The unit of work fails on purpose."""


class Lane:
    """A sequence of units of work whose events keep their order."""

    def __init__(self, name: str) -> None:
        self.name = f"{HISTORY.by}/{name}"
        self.chance = random.Random(self.name)
        self.succeeds = True
        """Whether the present unit will succeed."""
        self._units = 0
        self._seq = 0

    def unit(self) -> Unit:
        """Return the next unit."""
        self._units += 1
        self.succeeds = self.chance.random() < 0.7
        return Unit(HISTORY, f"{self.name.rpartition('/')[2]}/{self._units}", self.chance)

    def fill(self, unit: Unit) -> None:
        """Enqueue the unit's events, in some units also inside a savepoint or a block."""
        for _ in range(self.chance.randint(1, 4)):
            self._seq += 1
            unit.enqueue(self.name, self._seq)
        if self.chance.random() < 0.2:
            self._roll_back_inside(unit)

    def _roll_back_inside(self, unit: Unit) -> None:
        inner = Unit(HISTORY, f"{unit.name.partition('/')[2]}/inner", self.chance)
        if self.chance.random() < 0.5:
            block = EventCollector.current().savepoint()
        else:
            block = auto_publishing()
        try:
            with block:
                inner.enqueue_some()
                inner.roll_back()
                raise Failed
        except Failed:
            pass

    def end(self, unit: Unit) -> None:
        """Commit the unit or roll it back, and write that down."""
        if not self.succeeds:
            unit.roll_back()
            raise Failed
        unit.commit()

    @staticmethod
    def note(unit: Unit, report: PublishReport | None) -> None:
        """Write down which events the library reports as published, or as kept in the spool."""
        if report is None:
            return
        safe = report.published + (report.kept if KIND == "spooled" else ())
        if safe:
            unit.confirm([event.payload["key"] for event in safe])


def in_thread(lane: Lane, stopping: threading.Event) -> None:
    while not stopping.is_set():
        unit = lane.unit()
        try:
            with auto_publishing() as block:
                lane.fill(unit)
                in_late_thread(HISTORY, unit, lane.chance, succeeds=lane.succeeds)
                lane.end(unit)
            lane.note(unit, block.report)
        except Failed:
            pass
        except CollectorFull:
            unit.roll_back()
            time.sleep(0.5)
        stopping.wait(lane.chance.random() * PAUSE * PACE.factor)


async def in_task(lane: Lane, stopping: threading.Event) -> None:
    while not stopping.is_set():
        unit = lane.unit()
        try:
            async with auto_publishing() as block:
                lane.fill(unit)
                in_late_task(HISTORY, unit, lane.chance, succeeds=lane.succeeds)
                lane.end(unit)
            lane.note(unit, block.report)
        except Failed:
            pass
        except CollectorFull:
            unit.roll_back()
            await asyncio.sleep(0.5)
        await asyncio.sleep(lane.chance.random() * PAUSE * PACE.factor)


async def in_tasks(stopping: threading.Event) -> None:
    async with asyncio.TaskGroup() as tasks:
        for number in range(TASKS):
            tasks.create_task(in_task(Lane(f"task{number}"), stopping))


def rotate(stopping: threading.Event) -> None:
    while not stopping.wait(ROTATION):
        configure()
        HISTORY.write("configured")


def interrupt(signals: Signals) -> None:
    interrupted = Interrupted(HISTORY, random.Random(HISTORY.by))
    while not signals.asked:
        try:
            interrupted.work()
        except CollectorFull:
            time.sleep(0.5)
        time.sleep(interrupted.pause * PACE.factor)


def main() -> None:
    configure()
    stopping = threading.Event()
    signals = Signals(second_exits=None)
    signals.begin()
    threads = [
        threading.Thread(target=in_thread, args=(Lane(f"thread{number}"), stopping))
        for number in range(THREADS)
    ]
    threads.append(threading.Thread(target=lambda: asyncio.run(in_tasks(stopping))))
    if does("rotate"):
        threads.append(threading.Thread(target=rotate, args=(stopping,)))
    for thread in threads:
        thread.start()
    if does("interrupt"):
        interrupt(signals)
    while not signals.asked:
        time.sleep(0.05)
    stopping.set()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    main()
