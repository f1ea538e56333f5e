"""The task that runs here."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from outbox.messages.current_message import message_here

__all__ = ["TaskRun", "current_task"]


@dataclass(frozen=True, slots=True)
class TaskRun:
    """One attempt at a task.

    Attributes:
        id: the id of the call, the same in every attempt.
        name: the name that was called.
        attempt: the number of this attempt, 1 for the first.
        queue: the queue that it came from.
        scheduled_for: the time (aware, in UTC) at which a recurring task was to run; None if it was
            called.
    """

    id: str
    name: str
    attempt: int
    queue: str
    scheduled_for: datetime.datetime | None = None


def current_task() -> TaskRun | None:
    """Return the task that the calling code is part of, or None.

    Filters and callbacks are part of it. Coroutines and ``asyncio.to_thread`` inherit it; a bare
    ``threading.Thread`` does not.
    """
    event = message_here()
    if event is None or not event.task:
        return None
    return TaskRun(event.id, event.task, event.attempt, event.queue, event.scheduled_for)
