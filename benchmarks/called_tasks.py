"""The tasks of ``benchmarks.tasks``."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import time
from typing import Any

from outbox.tasks import task

countdown: Any = None


@dataclasses.dataclass
class Box:
    number: int
    colour: str


@task
def plain(number: int, text: str) -> None: ...


@task
def typed(day: datetime.date, price: decimal.Decimal, box: Box) -> None: ...


@task
def count(padding: str) -> None:
    countdown.handle()


@task
def doze(seconds: float) -> float:
    time.sleep(seconds)
    return time.time()


begun: list[tuple[float, int, float]] = []
"""When each task of ``benchmarks.task_order`` began, its priority, and when it was due."""


@task
def begin(priority: int, due: float, seconds: float) -> None:
    begun.append((time.time(), priority, due))
    time.sleep(seconds)
