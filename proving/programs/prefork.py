"""A Celery worker: each task is a unit of work, and each child process ends after a few of them."""

from __future__ import annotations

import functools
import os
import random
from pathlib import Path

from outbox import CollectorFull, auto_publishing, configure
from proving.history import Journal
from proving.programs.task_queue import TASK, task_queue
from proving.programs.unit import Unit, journal

journal("prefork")
configure()
app = task_queue(Path(os.environ["PROVE_HISTORY"]))


class Failed(Exception):
    """The unit of work fails on purpose."""


class Child:
    """This child process of the worker."""

    def __init__(self, pid: int) -> None:
        self.history = Journal.of_process(Path(os.environ["PROVE_HISTORY"]), "prefork", pid)
        self.chance = random.Random(pid)
        self.units = 0


@functools.cache
def child(pid: int) -> Child:
    return Child(pid)


@app.task(name=TASK, throws=(Failed,))  # type: ignore[untyped-decorator]
def unit_of_work() -> None:
    this = child(os.getpid())
    this.units += 1
    unit = Unit(this.history, str(this.units), this.chance)
    try:
        with auto_publishing():
            unit.enqueue_some()
            if this.chance.random() < 0.3:
                unit.roll_back()
                raise Failed
            unit.commit()
    except CollectorFull:
        unit.roll_back()
