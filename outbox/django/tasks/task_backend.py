"""The backend of Django's own tasks: a call is an event, as one of ``outbox.tasks`` is."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from django.apps import apps
from django.core import checks
from django.tasks import Task as DjangoTask
from django.tasks import TaskResult, TaskResultStatus, task_backends
from django.tasks.backends.base import BaseTaskBackend
from django.tasks.exceptions import InvalidTask
from django.tasks.signals import task_enqueued
from django.utils import timezone
from django.utils.json import normalize_json

from outbox import UsageError
from outbox.configuration import overriding_url
from outbox.django import project
from outbox.django.tasks.adapted_task import AdaptedTask, as_json, queue_of, result_of
from outbox.tasks import Task
from outbox.tasks.call_options import CallOptions, sent
from outbox.url import BrokerURL

__all__ = ["OutboxTask", "TaskBackend", "tasks_among"]

_ATTRIBUTES = ("retry", "timeout", "deduplicate")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutboxTask(DjangoTask):
    """One of Django's tasks with attributes of outbox: ``@task(timeout=30)``, from Django 6.1.

    Attributes:
        retry, timeout, deduplicate: see :func:`outbox.tasks.task`; None for what the backend's
            ``OPTIONS`` say.
    """

    retry: Any = None
    timeout: Any = None
    deduplicate: Any = None


class TaskBackend(BaseTaskBackend):
    """Django's tasks over outbox: the ``BACKEND`` in the setting ``TASKS``.

    A call is an event: inside ``transaction.atomic()`` it belongs to the transaction, outside of
    one it is stored at once. ``manage.py outbox consume`` runs it. ``OPTIONS`` may have ``retry``,
    ``timeout`` and ``deduplicate``, which are those of :func:`outbox.tasks.task`. Thread-safe.
    """

    task_class = OutboxTask
    supports_defer = True
    supports_async_task = True

    @property
    def supports_priority(self) -> bool:
        """Whether tasks may have priorities: not in RabbitMQ's quorum queues."""
        settings = project.settings_to_store()
        if settings.tasks_max_priority:
            return True
        url = overriding_url() or project.current().url or settings.url
        return url is not None and BrokerURL.parse(url).scheme not in _RABBITMQ

    def validate_task(self, task: Any) -> None:
        """Check that workers can run ``task``.

        Raises:
            InvalidTask: they can't; the message says why.
        """
        super().validate_task(task)
        try:
            self.adapted(task)
        except UsageError as error:
            raise InvalidTask(str(error)) from error

    def adapted(self, task: Any) -> AdaptedTask:
        """Return the task of outbox for one of Django's, the same for each function.

        Raises:
            UsageError: workers could not call its function, or an option is invalid.
        """
        attributes = {name: self._attribute(task, name) for name in _ATTRIBUTES}
        known = _adapted.get(task.func)
        if known is not None and known.attributes == attributes:
            return known
        made = _adapted[task.func] = AdaptedTask(task, self, attributes)
        return made

    def _attribute(self, task: Any, name: str) -> Any:
        own = getattr(task, name, None)
        default = False if name == "deduplicate" else None
        return self.options.get(name, default) if own is None else own

    def enqueue(self, task: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> TaskResult:
        """Call ``task`` later, once the transaction that is open has been committed.

        Raises:
            TypeError: an argument is of a type that JSON doesn't have.
            InvalidTask: workers can't run it.
            InvalidEvent: the arguments don't fit its function.
            OutboxError: what ``enqueue_event()`` raises.
        """
        self.validate_task(task)
        args, kwargs = normalize_json(list(args)), normalize_json(dict(kwargs))
        options = {"priority": _priority(task.priority), "queue": queue_of(task.queue_name)}
        if task.run_after is not None:
            is_aware = timezone.is_aware(task.run_after)
            options["at"] = task.run_after if is_aware else timezone.make_aware(task.run_after)
        own = self.adapted(task).task
        handle = sent(own.target, own, as_json(args), as_json(kwargs), CallOptions.checked(options))
        result = result_of(
            task,
            handle.id,
            TaskResultStatus.READY,
            args,
            kwargs,
            backend=self.alias,
            enqueued_at=timezone.now(),
        )
        task_enqueued.send(type(self), task_result=result)
        return result

    def check(self, **_: Any) -> list[checks.CheckMessage]:
        """Check the backend's settings, as ``manage.py check`` does."""
        where = f"TASKS[{self.alias!r}]"
        found: list[checks.CheckMessage] = []
        if not apps.is_installed("outbox.django"):
            found.append(
                checks.Error(
                    f"{where} needs outbox.django, which is not in INSTALLED_APPS.",
                    id="outbox.E008",
                )
            )
        for name in self.options:
            if name not in _ATTRIBUTES:
                [meant] = difflib.get_close_matches(str(name).lower(), _ATTRIBUTES, 1) or [""]
                hint = (
                    f"Do you mean {meant!r}?" if meant else f"There are {', '.join(_ATTRIBUTES)}."
                )
                found.append(
                    checks.Error(
                        f"{where}['OPTIONS'] has an unknown key {name!r}.",
                        hint=hint,
                        id="outbox.E009",
                    )
                )
        return found


_adapted: dict[Any, AdaptedTask] = {}
_RABBITMQ = ("amqp", "amqps")


def tasks_among(members: Iterable[Any]) -> list[Task[Any, Any]]:
    """Return the tasks of outbox for those of Django's among ``members``, ready to run.

    A task may be declared for another backend, and be called with ``using(backend=...)``. Without
    a backend of outbox there are none.
    """
    originals = [member for member in members if isinstance(member, DjangoTask)]
    backends = [each for each in task_backends.all() if isinstance(each, TaskBackend)]
    found = []
    for original in originals if backends else ():
        declared = [each for each in backends if each.alias == original.backend]
        found.append((declared or backends)[0].adapted(original).ready_to_run())
    return found


def _priority(priority: int) -> int:
    """Return Django's priority, -100 to 100, as one of 0 to 9: in order, but not one to one."""
    return round((priority + 100) * 9 / 200)
