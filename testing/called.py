"""Calls of tasks in tests: what an assertion expects, and the consumers that run them."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import ModuleType
from typing import Any, TypeAlias

from outbox import Event
from outbox.configuration import publisher_if_any, settings_to_store
from outbox.consumers import Consumer
from outbox.consumers.tasks.task_queue import queues_of_tasks
from outbox.consumers.tasks.task_table import tasks_among
from outbox.messages import task_queues
from outbox.messages.headers import TASK
from outbox.tasks import Task
from outbox.tasks.call_arguments import DoesNotFit, Parameters, parts_of
from outbox.tasks.decorator import module_of_task
from outbox.tasks.mapped import MARK
from outbox.tasks.target import Target, target_of
from outbox.testing.matching import is_dead_letter

__all__ = ["ExpectedCall", "Runnable", "criteria_of", "with_tasks"]

Runnable: TypeAlias = type[Consumer] | Consumer | Task[Any, Any] | ModuleType
"""What a test can have run: consumers, tasks, and modules with all their tasks."""


class ExpectedCall:
    """The payload of a call: equal to each that calls the function in the same way."""

    def __init__(
        self, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Expect ``call`` with these arguments; with ``...`` alone, with any.

        Raises:
            UsageError: no worker could call it.
            InvalidEvent: the arguments don't fit.
        """
        target: Any = getattr(call, "target", None)
        if not isinstance(target, Target):
            of_framework = tasks_among([call])
            target = of_framework[0].target if of_framework else target_of(call)
        self.name: str = target.name
        self._parameters: Parameters = target.parameters
        self._text = f"{self.name}({', '.join(_texts(args, kwargs))})"
        self._wanted: Any = None
        if not (tuple(args) == (...,) and not kwargs):
            body = self._parameters.written((*target.first, *args), kwargs)
            self._wanted = _bound(self._parameters, {**body, "args": [*body["args"]]})

    def __repr__(self) -> str:
        return self._text

    def __eq__(self, payload: object) -> bool:
        return self._wanted is None or self._wanted == _bound(self._parameters, payload)

    __hash__ = None  # type: ignore[assignment]


def _texts(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[str]:
    named = [f"{name}={value!r}" for name, value in kwargs.items()]
    return ["..." if value is ... else repr(value) for value in args] + named


def _bound(parameters: Parameters, body: Any) -> Any:
    """Return the arguments by the names of their parameters, however they were given."""
    try:
        args, kwargs, typed = parts_of(body)
        values = [_identity(value) for value in args]
        named = {name: _identity(value) for name, value in kwargs.items()}
        bound = parameters.signature.bind(*values, **named).arguments
    except (DoesNotFit, TypeError):
        return None
    return dict(bound), bool(typed)


def _identity(value: Any) -> Any:
    """Return a mapped instance without how it was stored."""
    return {MARK: value[MARK][:2]} if type(value) is dict and MARK in value else value


def criteria_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the criteria for an event that these options of a call make."""
    criteria = dict(options)
    at = criteria.pop("at", None)
    if at is not None:
        criteria["delay" if isinstance(at, datetime.timedelta) else "deliver_at"] = at
    return criteria


def _module_of(one: Task[Any, Any]) -> ModuleType:
    """Return the module of a task, also of code that was executed without one."""
    name = one.function.__module__
    module = sys.modules.get(name)
    if module is None:
        module = ModuleType(name)
        vars(module).update(one.function.__globals__)
    return module


def with_tasks(
    runnables: Sequence[Runnable], events: Iterable[Event] = ()
) -> list[type[Consumer] | Consumer]:
    """Return the consumers among ``runnables``, and those of the queues of tasks.

    Args:
        runnables: consumers, tasks and modules; if there are none, all tasks that ``events`` call.
        events: the events that were published.
    """
    consumers: list[type[Consumer] | Consumer] = []
    modules: dict[str, ModuleType] = {}
    publisher = publisher_if_any()
    settings = settings_to_store() if publisher is None else publisher.settings
    queues = {task_queues.queue_of(settings): None}
    for one in runnables:
        if isinstance(one, Task):
            made = _module_of(one)
            modules[made.__name__] = made
        elif isinstance(one, ModuleType):
            modules[one.__name__] = one
        else:
            consumers.append(one)
    if not runnables:
        for name in [event.headers.get(TASK) for event in events]:
            module = module_of_task(str(name)) if name else None
            if module is not None:
                modules[module.__name__] = module
    if modules:
        members = [member for module in modules.values() for member in vars(module).values()]
        queues |= {one.queue: None for one in members if isinstance(one, Task) and one.queue}
        calls = [event for event in events if task_queues.is_task(event)]
        queues |= {call.target: None for call in calls if not is_dead_letter(call)}
        consumers += queues_of_tasks(modules.values(), list(queues), settings)
    return consumers
