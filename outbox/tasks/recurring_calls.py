"""The calls of recurring tasks, which no program makes: the events of their ticks."""

from __future__ import annotations

import datetime
from typing import Any

from outbox.event import Event, make_event, set_headers
from outbox.ids import follow_on_id
from outbox.messages import task_queues
from outbox.messages.cloud_events import headers_with_attributes
from outbox.messages.headers import SCHEDULED_FOR
from outbox.recurring.recurring_task import RecurringTask
from outbox.settings import Settings
from outbox.tasks.call_options import LATER
from outbox.tasks.decorator import Task

__all__ = ["recurring_task_of", "tick_id"]

_EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
_MICROSECOND = datetime.timedelta(microseconds=1)


def recurring_task_of(task: Task[Any, Any], settings: Settings) -> RecurringTask | None:
    """Return a task as transports know it, or None if it isn't a recurring one.

    Args:
        task: the task.
        settings: those of the worker's publisher. Its functions for headers are not asked, as
            nobody's context is there.

    Raises:
        InvalidEvent: the serializer can't carry a call without arguments.
    """
    if task.schedule is None:
        return None
    queue = task.queue or task_queues.queue_of(settings)
    priority = LATER if task.priority is None else task.priority

    def event_of(tick: datetime.datetime) -> Event:
        event = make_event(
            settings.serializer,
            settings.max_body_bytes,
            None,
            {"args": []},
            queue,
            "",
            task.target.headers,
            priority=priority,
            id=tick_id(task.name, tick),
        )
        scheduled_for = (tick - _EPOCH) // _MICROSECOND
        set_headers(event, {**event.headers, SCHEDULED_FOR: scheduled_for})
        if settings.envelope != "outbox":
            set_headers(event, headers_with_attributes(event, settings.envelope, settings.source))
        return event

    event_of(_EPOCH)  # fails now rather than at each tick
    return RecurringTask(
        task.name, queue, task.schedule, task.catch_up, task.overlap == "skip", event_of
    )


def tick_id(name: str, tick: datetime.datetime) -> str:
    """Return the id of the call of a task for a time: the same in each worker, a UUIDv5."""
    return follow_on_id("tick", name, tick.astimezone(datetime.UTC).isoformat())
