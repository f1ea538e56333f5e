"""The queues of tasks: what they are is decided here, for those who call and for those who run.

A task is an event to the default exchange, with the task's name in a header. The first one may be
published before any worker has made its queue; then the publisher makes it.
"""

from __future__ import annotations

from outbox.event import Event
from outbox.messages.delivery import QueueSpec, QueueType
from outbox.messages.headers import TASK
from outbox.settings import Settings

__all__ = ["is_task", "note", "noted", "queue_of", "spec_of"]

_noted: dict[str, int | None] = {}


def note(queue: str, max_priority: int | None) -> None:
    """Note that this process has tasks for ``queue``.

    Args:
        queue: the name of the queue.
        max_priority: the highest priority that its tasks ask for; None for what was noted before,
            or for the setting's.
    """
    _noted[queue] = max_priority or _noted.get(queue)


def noted(queue: str) -> int | None:
    """Return the highest priority that tasks for ``queue`` have asked for, or None."""
    return _noted.get(queue)


def queue_of(settings: Settings) -> str:
    """Return the queue of tasks that name none."""
    return settings.tasks_queue


def spec_of(queue: str, settings: Settings) -> QueueSpec | None:
    """Return how ``queue`` is declared; None if this process knows of no tasks for it.

    Quorum queues, unless priorities are asked for: then classic ones.
    """
    if queue not in _noted and queue != settings.tasks_queue:
        return None
    highest = _noted.get(queue) or settings.tasks_max_priority or None
    kind: QueueType = "quorum" if highest is None else "classic"
    return QueueSpec(queue, (), "", max_priority=highest, queue_type=kind)


def is_task(event: Event) -> bool:
    """Return whether ``event`` is a task on its way to its queue."""
    return not event.exchange and TASK in event.headers
