"""Django's own tasks as tasks of outbox: the same names, queues, retries and workers.

Django's task stays what the application has. Beside it stands one of outbox, whose function does
what Django expects around a call: the context, the signals, and JSON's values.
"""

from __future__ import annotations

import functools
import inspect
import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping
from contextvars import ContextVar
from traceback import format_exception
from typing import Any

from django.tasks import DEFAULT_TASK_QUEUE_NAME, TaskContext, TaskResult, TaskResultStatus
from django.tasks.base import TaskError
from django.tasks.exceptions import InvalidTask
from django.tasks.signals import task_finished, task_started
from django.utils import timezone
from django.utils.json import normalize_json

from outbox import EventCollector
from outbox.django import project
from outbox.messages import task_queues
from outbox.messages.current_message import message_here
from outbox.messages.received_event import ReceivedEvent
from outbox.tasks import Task, task
from outbox.tasks.call_arguments import DoesNotFit, parts_of

__all__ = [
    "REJECTED",
    "AdaptedTask",
    "as_json",
    "in_zone",
    "queue_of",
    "result_of",
    "worker_ids",
]

REJECTED = "outbox.consumers.Reject"

_failure: ContextVar[tuple[str, BaseException] | None] = ContextVar(
    "outbox_django_failure", default=None
)


class AdaptedTask:
    """One of Django's tasks, and the task of outbox that stands beside it.

    Attributes:
        original: Django's task.
        backend: the ``outbox.django.TaskBackend`` that it runs for.
        is_async: whether its function is a coroutine function.
        attributes: what the task of outbox has been given, such as ``timeout``.
        task: the task of outbox. Each of its calls says for which queue it is.
    """

    def __init__(self, original: Any, backend: Any, attributes: Mapping[str, Any]) -> None:
        """Make the task of outbox for ``original``.

        Raises:
            UsageError: workers could not call its function, or an attribute is invalid.
        """
        self.original = original
        self.backend = backend
        self.is_async = inspect.iscoroutinefunction(original.func)
        self.attributes = attributes
        call = self._coroutine() if self.is_async else self._function()
        self.task: Task[..., Any] = task(**attributes)(call)
        names = {original.queue_name, *backend.queues} - {DEFAULT_TASK_QUEUE_NAME}
        self.task.also_in = sorted(names)
        for name in names:
            task_queues.note(name, None)

    def ready_to_run(self) -> Task[..., Any]:
        """Return the task of outbox, which calls back here how its messages have ended."""
        if self.task.consumer is None:
            self.task.consumer = _consumer_of(self)  # imported by workers alone
        return self.task

    def _function(self) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            result = self._begun(args, kwargs)
            task_started.send(type(self.backend), task_result=result)
            value = self.original.func(*self._context(result), *result.args, **result.kwargs)
            if _was_given_up():
                return None
            task_finished.send(type(self.backend), task_result=_succeeded(result, value))
            return as_json(result.return_value)

        return self._like_original(call)

    def _coroutine(self) -> Callable[..., Any]:
        async def call(*args: Any, **kwargs: Any) -> Any:
            result = self._begun(args, kwargs)
            await task_started.asend(type(self.backend), task_result=result)
            value = await self.original.func(*self._context(result), *result.args, **result.kwargs)
            await task_finished.asend(type(self.backend), task_result=_succeeded(result, value))
            return as_json(result.return_value)

        return self._like_original(call)

    def _like_original(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``call`` with the name of the task's function, and its parameters.

        Without the context, and without annotations, which Django never evaluates.
        """
        for name in ("__module__", "__name__", "__qualname__", "__doc__"):
            setattr(call, name, getattr(self.original.func, name))
        call.__annotations__ = {}
        of_original = inspect.signature(self.original.func).parameters.values()
        parameters = [each.replace(annotation=inspect.Parameter.empty) for each in of_original]
        signature = inspect.Signature(parameters[1 if self.original.takes_context else 0 :])
        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    def _context(self, result: TaskResult) -> tuple[Any, ...]:
        return (TaskContext(task_result=result),) if self.original.takes_context else ()

    def _begun(self, args: Iterable[Any], kwargs: Mapping[str, Any]) -> TaskResult:
        """Return the result of the attempt that begins here."""
        event = message_here()
        if event is None:
            raise RuntimeError(f"the task {self.task.name} is called without its message")
        return self._result(event, list(args), kwargs, TaskResultStatus.RUNNING)

    def _result(self, event: ReceivedEvent, args: Any, kwargs: Any, status: Any) -> TaskResult:
        """Return the result of an attempt that this process has begun."""
        now = timezone.now()
        return result_of(
            self.called(event.queue),
            event.id,
            status,
            args,
            kwargs,
            enqueued_at=in_zone(event.occurred_at),
            started_at=now if event.first_failure is None else in_zone(event.first_failure),
            last_attempted_at=now,
            backend=self.backend.alias,
            worker_ids=worker_ids(event.attempt, _worker_here(os.getpid())),
        )

    def called(self, queue: str) -> Any:
        """Return Django's task as it was called, perhaps for another queue or backend."""
        is_default = queue == project.settings_to_store().tasks_queue
        name = DEFAULT_TASK_QUEUE_NAME if is_default else queue
        own = self.original
        if (own.queue_name, own.backend) == (name, self.backend.alias):
            return own
        try:
            return own.using(queue_name=name, backend=self.backend.alias)
        except InvalidTask:  # as it is now, the backend wouldn't take it
            return own

    def failed(self, event: ReceivedEvent, reason: str) -> TaskResult:
        """Return the result of a message that is a dead letter."""
        try:
            args, kwargs, _ = parts_of(event.payload)
        except DoesNotFit:
            args, kwargs = [], {}
        result = self._result(event, args, kwargs, TaskResultStatus.FAILED)
        failure = _failure.get()
        if failure is not None and failure[0] == event.id:
            kind, trace = type(failure[1]), "".join(format_exception(failure[1]))
            path = f"{kind.__module__}.{kind.__qualname__}"
        else:
            path, trace = REJECTED, reason
        result.errors.append(TaskError(exception_class_path=path, traceback=trace))
        _set(result, finished_at=timezone.now())
        return result


def queue_of(name: str) -> str | None:
    """Return the queue that Django calls ``name``; None for that of the setting ``tasks_queue``."""
    return None if name == DEFAULT_TASK_QUEUE_NAME else name


def as_json(values: Any) -> Any:
    """Return what a worker gets of ``values``, which Django has normalised: keys are strings."""
    return json.loads(json.dumps(values))


def in_zone(moment: Any) -> Any:
    """Return an aware datetime as Django has it: naive with ``USE_TZ = False``."""
    if moment is None or timezone.is_aware(timezone.now()):
        return moment
    return timezone.make_naive(moment)


def result_of(
    task: Any, id_: str, status: Any, args: Any, kwargs: Any, **fields: Any
) -> TaskResult:
    """Return one of Django's results, with None for each time that isn't given.

    Raises:
        TypeError: an argument is of a type that JSON doesn't have.
        ValueError: it is bytes that aren't UTF-8.
    """
    times = dict.fromkeys(("enqueued_at", "started_at", "finished_at", "last_attempted_at"))
    given = {**times, "errors": [], "worker_ids": [], **fields}
    return TaskResult(task=task, id=id_, status=status, args=args, kwargs=kwargs, **given)


def worker_ids(attempt: int, last: str) -> list[str]:
    """Return an id for each attempt: only the last worker is known."""
    return [*[""] * (attempt - 1), last]


@functools.lru_cache(maxsize=4)
def _worker_here(pid: int) -> str:
    return f"{socket.gethostname()}:{pid}"


def _set(result: TaskResult, **fields: Any) -> None:
    """Change fields of a result, which is frozen, as Django's own backends do."""
    for name, value in fields.items():
        object.__setattr__(result, name, value)


def _was_given_up() -> bool:
    """Return whether the attempt has exceeded its timeout, and has failed with that."""
    return EventCollector.current().closed


def _succeeded(result: TaskResult, value: Any) -> TaskResult:
    try:
        value = normalize_json(value)
    except (TypeError, ValueError) as error:
        from outbox.consumers import Reject

        # Not tried again: the task has done its work.
        raise Reject(f"what it returned can't be carried by JSON: {error}") from error
    status = TaskResultStatus.SUCCESSFUL
    _set(result, status=status, finished_at=timezone.now(), _return_value=value)
    return result


def _consumer_of(adapted: AdaptedTask) -> type[Any]:
    """Return a class whose callbacks send Django's signal of a task that has failed for good."""
    from outbox.consumers import Consumer

    sender = type(adapted.backend)

    class Calls(Consumer):
        def on_failure(self, event: ReceivedEvent, error: BaseException) -> None:
            _failure.set((event.id, error))

        def on_dead(self, event: ReceivedEvent, reason: str) -> Any:
            result = adapted.failed(event, reason)
            if adapted.is_async:
                return task_finished.asend(sender, task_result=result)
            return task_finished.send(sender, task_result=result)

    return Calls
