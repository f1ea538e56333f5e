"""outbox in a Django project: ``enqueue_event()`` is an INSERT through Django's connection.

It behaves like ``Model.objects.create()``: inside ``transaction.atomic()`` the event belongs to the
transaction and its savepoints, outside of one it commits at once. Needs the extra
``outbox-events[django]``; add ``"outbox.django"`` to ``INSTALLED_APPS``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Unpack

from outbox import Event, MissingExtra, enqueue_event
from outbox.unit_of_work.collector import EventOptions

try:
    from asgiref.sync import sync_to_async
except ImportError as error:
    raise MissingExtra(
        "outbox.django needs Django, which isn't installed: pip install 'outbox-events[django]'"
    ) from error

from outbox.django.middleware import OutboxMiddleware

if TYPE_CHECKING:
    from outbox.django.tasks.task_backend import TaskBackend as TaskBackend

__all__ = ["OutboxMiddleware", "aenqueue_event", "enqueue_event"]


async def aenqueue_event(payload: Any, target: str, **options: Unpack[EventOptions]) -> Event:
    """Enqueue an event on an event loop; otherwise as ``enqueue_event()``.

    It runs in the thread of ``sync_to_async()``, where Django's connections may be used. Django has
    no transactions on an event loop, so the event commits by itself.
    """
    event: Event = await sync_to_async(enqueue_event)(payload, target, **options)
    return event


def __getattr__(name: str) -> Any:
    if name == "TaskBackend":  # imported by those who have tasks of Django's own
        try:
            from outbox.django.tasks.task_backend import TaskBackend
        except ModuleNotFoundError as error:
            if error.name != "django.tasks":
                raise
            raise MissingExtra(
                "outbox.django.TaskBackend needs Django 6.0 or newer, which has tasks"
            ) from error
        return TaskBackend
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
