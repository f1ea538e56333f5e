"""Recurring tasks for tests: with a schedule and a queue of the test's choice."""

from __future__ import annotations

import datetime

from outbox.event import make_event, set_headers
from outbox.ids import follow_on_id
from outbox.messages import task_queues
from outbox.messages.headers import SCHEDULED_FOR, TASK
from outbox.recurring.recurring_task import RecurringTask
from outbox.recurring.schedules import EverySchedule, Schedule
from outbox.serializer import JSONSerializer

__all__ = ["DAILY", "QUICK", "TICK", "recurring"]

TICK = datetime.timedelta(seconds=0.25)  # a task of an application has a second at least
QUICK = EverySchedule(TICK)
DAILY = EverySchedule(datetime.timedelta(days=1))


def recurring(
    queue: str,
    name: str = "tick",
    schedule: Schedule = QUICK,
    *,
    catch_up: bool = False,
    skips: bool = False,
) -> RecurringTask:
    """Return a recurring task, which no module has."""
    task_queues.note(queue, None)

    def event_of(tick: datetime.datetime) -> object:
        event = make_event(
            JSONSerializer(),
            1 << 20,
            None,
            {"args": []},
            queue,
            "",
            id=follow_on_id("tick", name, tick.isoformat()),
            priority=5,
        )
        headers = {TASK: name, SCHEDULED_FOR: round(tick.timestamp() * 1e6)}
        set_headers(event, headers)
        return event

    return RecurringTask(name, queue, schedule, catch_up, skips, event_of)  # type: ignore[arg-type]
