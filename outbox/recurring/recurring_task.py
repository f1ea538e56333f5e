"""A recurring task as transports know it: a schedule, and the event of each tick."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass

from outbox.event import Event
from outbox.recurring.schedules import Schedule

__all__ = ["RecurringTask", "TickRecord"]


@dataclass(frozen=True, slots=True)
class RecurringTask:
    """A recurring task of a worker.

    Attributes:
        name: the name of the task.
        queue: the queue that its calls go to.
        schedule: its times.
        catch_up: whether one tick is made up for all that were missed.
        skips: whether a tick is left out while the last one's call has not ended.
        event: makes the event of the tick at a time: the same id for the same time.
    """

    name: str
    queue: str
    schedule: Schedule
    catch_up: bool
    skips: bool
    event: Callable[[datetime.datetime], Event]


@dataclass(frozen=True, slots=True)
class TickRecord:
    """What a broker has of a recurring task, also of one that no program has any more.

    Attributes:
        name: the name of the task.
        schedule: the text of its schedule; None if a worker holds that.
        next_at: the time of its next tick; None likewise.
        last_at: the time of its last tick; None likewise, or if there was none.
        has_worker: whether a worker ticks for it; None where that isn't known.
    """

    name: str
    schedule: str | None = None
    next_at: datetime.datetime | None = None
    last_at: datetime.datetime | None = None
    has_worker: bool | None = None
