"""The backend of Django's own tasks: a call is an event, as one of ``outbox.tasks`` is."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from django.apps import apps
from django.core import checks
from django.tasks import Task as DjangoTask
from django.tasks import TaskResult, TaskResultStatus, task_backends
from django.tasks.backends.base import BaseTaskBackend
from django.tasks.base import TaskError
from django.tasks.exceptions import InvalidTask, TaskResultDoesNotExist
from django.tasks.signals import task_enqueued
from django.utils import timezone
from django.utils.json import normalize_json

from outbox import UsageError
from outbox.configuration import overriding_url
from outbox.django import project
from outbox.django.tasks.adapted_task import (
    REJECTED,
    AdaptedTask,
    as_json,
    in_zone,
    queue_of,
    result_of,
    worker_ids,
)
from outbox.results.result_row import CANCELLED, FAILED, RETRYING, RUNNING, SUCCEEDED, ResultRow
from outbox.tasks import Task, task_results
from outbox.tasks.call_arguments import DoesNotFit, parts_of
from outbox.tasks.call_options import CallOptions, sent
from outbox.url import BrokerURL

__all__ = ["OutboxTask", "TaskBackend", "tasks_among"]

_ATTRIBUTES = ("retry", "timeout", "deduplicate", "keep_result", "hide_errors")
_STATUSES = {
    RUNNING: TaskResultStatus.RUNNING,
    RETRYING: TaskResultStatus.READY,
    SUCCEEDED: TaskResultStatus.SUCCESSFUL,
    FAILED: TaskResultStatus.FAILED,
    CANCELLED: TaskResultStatus.FAILED,
}


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class OutboxTask(DjangoTask):
    """One of Django's tasks with attributes of outbox: ``@task(timeout=30)``, from Django 6.1.

    Attributes:
        retry, timeout, deduplicate, keep_result, hide_errors: see :func:`outbox.tasks.task`; None
            for what the backend's ``OPTIONS`` say.
    """

    retry: Any = None
    timeout: Any = None
    deduplicate: Any = None
    keep_result: Any = None
    hide_errors: Any = None


class TaskBackend(BaseTaskBackend):
    """Django's tasks over outbox: the ``BACKEND`` in the setting ``TASKS``.

    A call is an event: inside ``transaction.atomic()`` it belongs to the transaction, outside of
    one it is stored at once. ``manage.py outbox consume`` runs it. ``OPTIONS`` may have ``retry``,
    ``timeout``, ``deduplicate``, ``keep_result`` and ``hide_errors``, which are those of
    :func:`outbox.tasks.task`. Thread-safe.
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

    @property
    def supports_get_result(self) -> bool:
        """Whether there is a database for results.

        Raises:
            UsageError: results can't be kept in it.
        """
        return task_results.results_of_test() is not None or task_results.store_here() is not None

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
        own = {name: getattr(task, name, None) for name in _ATTRIBUTES}
        known_options = {n: self.options[n] for n in _ATTRIBUTES if n in self.options}
        attributes = {**known_options, **{n: v for n, v in own.items() if v is not None}}
        known = _adapted.get(task.func)
        if known is not None and known.attributes == attributes:
            return known
        made = _adapted[task.func] = AdaptedTask(task, self, attributes)
        return made

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

    def get_result(self, result_id: str) -> TaskResult:
        """Return what is known of a task that has begun, or was cancelled.

        Of its attempts the last one is known, and how many there were.

        Raises:
            TaskResultDoesNotExist: no worker has begun it, or it is forgotten; or it is a task of
                outbox, or of code that this project doesn't have.
            NotImplementedError: there is no database for results.
            sqlalchemy.exc.SQLAlchemyError: the database can't be read.
        """
        if not self.supports_get_result:
            result: TaskResult = super().get_result(result_id)
            return result
        row = task_results.row_here(str(result_id))
        task = None if row is None else _task_named(row.task)
        if row is None or task is None:
            raise TaskResultDoesNotExist(str(result_id))
        return self._result_of(row, task)

    def _result_of(self, row: ResultRow, task: Any) -> TaskResult:
        try:
            args, kwargs, _ = parts_of(json.loads(row.args or "{}"))
        except (ValueError, RecursionError, DoesNotFit):
            args, kwargs = [], {}
        result = result_of(
            self.adapted(task).called(row.queue),
            row.id,
            _STATUSES[row.status],
            args,
            kwargs,
            backend=self.alias,
            enqueued_at=in_zone(row.enqueued_at),
            started_at=in_zone(row.started_at),
            finished_at=in_zone(row.ended_at),
            last_attempted_at=in_zone(row.attempted_at),
            errors=_errors_of(row),
            worker_ids=worker_ids(row.attempt, row.worker) if row.attempt else [],
        )
        if row.status == SUCCEEDED and row.value is not None:
            object.__setattr__(result, "_return_value", json.loads(row.value))
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
_CANCELLED = "outbox.tasks.TaskCancelled"


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


def _task_named(name: str) -> Any:
    """Return Django's task of this name, or None.

    The name may come from a message: nothing is imported but modules of the project's apps.
    """
    module_name, _, attribute = name.partition(":")
    module = sys.modules.get(module_name)
    if module is None:
        names = [config.name for config in apps.get_app_configs()]
        if not any(f"{module_name}.".startswith(f"{each}.") for each in names):
            return None
        try:
            module = importlib.import_module(module_name)
        except ModuleNotFoundError:
            return None
    found = vars(module).get(attribute)
    return found if isinstance(found, DjangoTask) else None


def _errors_of(row: ResultRow) -> list[TaskError]:
    """Return the error of the last attempt, if it has failed."""
    if row.status == CANCELLED:
        return [TaskError(exception_class_path=_CANCELLED, traceback="it was cancelled")]
    if row.status not in (FAILED, RETRYING) or not (row.error_type or row.error):
        return []
    text = row.traceback or row.error
    # The row has the class without its module, which the last lines of a traceback have.
    line = rf"^((?:[\w]+\.)*{re.escape(row.error_type)})(?::|$)"
    paths = re.findall(line, text, re.MULTILINE) if row.error_type else []
    path = paths[-1] if paths else row.error_type or REJECTED
    if "." not in path:
        path = f"builtins.{path}"
    return [TaskError(exception_class_path=path, traceback=text)]


def _priority(priority: int) -> int:
    """Return Django's priority, -100 to 100, as one of 0 to 9: in order, but not one to one."""
    return round((priority + 100) * 9 / 200)
