"""The table of what messages may call.

A name in a message comes from outside. It is only ever looked up here, in a table that is made when
the worker starts from the modules that it was given: never by importing or reading an attribute
that the message names.
"""

from __future__ import annotations

import inspect
import logging
import os
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from outbox import UsageError, sinks
from outbox.tasks.call_arguments import Parameters
from outbox.tasks.decorator import Task
from outbox.tasks.mapped import is_mapped, name_of

__all__ = ["ONLY_DECORATED", "Entry", "TaskTable", "tasks_among", "tasks_of"]

logger = logging.getLogger("outbox.consumer")

ONLY_DECORATED = "OUTBOX_TASKS_ONLY_DECORATED"


@dataclass(frozen=True, slots=True)
class Entry:
    """What a name calls.

    Attributes:
        name: the name.
        call: the function; of a method it takes the instance first.
        parameters: its parameters.
        task: the task that it is, or None if it isn't decorated.
        takes_instance: whether its first argument is an instance of a mapped class.
    """

    name: str
    call: Callable[..., Any]
    parameters: Parameters
    task: Task[Any, Any] | None = None
    takes_instance: bool = False

    @property
    def is_async(self) -> bool:
        """Whether a call must be awaited."""
        return inspect.iscoroutinefunction(self.call)


def tasks_of(module: types.ModuleType) -> list[Task[Any, Any]]:
    """Return the tasks that a module defines or imports, each once; Django's own among them."""
    return tasks_among(list(vars(module).values()))


def tasks_among(members: Iterable[Any]) -> list[Task[Any, Any]]:
    """Return the tasks among ``members``, each once."""
    found = {id(one): one for one in members if isinstance(one, Task)}
    if sinks.framework is not None:
        found.update({id(one): one for one in sinks.framework.tasks_among(members)})
    return list(found.values())


class TaskTable:
    """The table of a worker: names, and what they call. Immutable.

    Attributes:
        entries: the entries by name.
        classes: the mapped classes whose instances may be named, by name.
    """

    def __init__(self, modules: Iterable[types.ModuleType]) -> None:
        """Make the table of ``modules``.

        In it are all tasks that they define or import, under all their names; and, unless
        ``OUTBOX_TASKS_ONLY_DECORATED`` is set, their own public functions, and the class methods,
        static methods and methods of mapped instances that their own classes have.

        Raises:
            UsageError: an annotation of a task can't be resolved, or two have the same name.
        """
        modules = list(modules)
        self._modules = {module.__name__ for module in modules}
        self.entries: dict[str, Entry] = {}
        decorated: set[Any] = set()
        for module in modules:
            for task in tasks_of(module):
                decorated.add(task.function)
                self._add_task(task)
        if not _only_decorated():
            for module in modules:
                self._add_members(module, decorated)
        self.classes = _mapped_classes(modules, self.entries.values())

    def _add_task(self, task: Task[Any, Any]) -> None:
        parameters = task.target.parameters
        parameters.hints  # noqa: B018  fails now rather than with each message
        for name in (task.name, *task.aliases):
            known = self.entries.get(name)
            if known is not None and known.task is not task:
                raise UsageError(f"two tasks have the name {name!r}")
            self.entries[name] = Entry(name, task.function, parameters, task)

    def _add_members(self, module: types.ModuleType, decorated: set[Any]) -> None:
        for name, member in list(vars(module).items()):
            if name.startswith("_") or getattr(member, "__module__", None) != module.__name__:
                continue
            if isinstance(member, types.FunctionType):
                if member not in decorated and member.__qualname__ == name:
                    self._add(f"{module.__name__}:{name}", member, member)
            elif isinstance(member, type) and member.__qualname__ == name:
                self._add_class(member)

    def _add_class(self, kind: type) -> None:
        """Add what a class has from itself and from its bases in the modules."""
        seen: set[str] = set()
        for base in kind.__mro__:
            for name, member in list(vars(base).items()):
                if name in seen:
                    continue
                seen.add(name)  # what a library's class overrides is the library's
                if name.startswith("_") or base.__module__ not in self._modules:
                    continue
                full = f"{name_of(kind)}.{name}"
                if isinstance(member, classmethod | staticmethod):
                    if isinstance(member.__func__, types.FunctionType):
                        self._add(full, getattr(kind, name), member.__func__)
                elif isinstance(member, types.FunctionType) and is_mapped(kind):
                    self._add(full, member, member, owner=kind)

    def _add(
        self,
        name: str,
        call: Callable[..., Any],
        function: types.FunctionType,
        *,
        owner: type | None = None,
    ) -> None:
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            return
        if name not in self.entries:
            parameters = Parameters(call, name, owner)
            self.entries[name] = Entry(name, call, parameters, takes_instance=owner is not None)


def _only_decorated() -> bool:
    text = os.environ.get(ONLY_DECORATED, "").strip()
    if text not in ("", "0", "1"):
        raise UsageError(f"the environment variable {ONLY_DECORATED} is {text!r:.60}, not 1 or 0")
    return text == "1"


def _mapped_classes(
    modules: list[types.ModuleType], entries: Iterable[Entry]
) -> Mapping[str, type]:
    """Return the mapped classes that can be reached from modules and annotations.

    All models of a Django project are among them.
    """
    found: dict[str, type] = {}
    if sinks.framework is not None:
        found.update({name_of(kind): kind for kind in sinks.framework.mapped_classes()})
    if "sqlalchemy.orm" not in sys.modules:
        return found
    from outbox.sql.mapped_instances import classes_of, mapped_among

    found.update(classes_of(modules))
    for entry in entries:
        if entry.task is not None:
            hints = entry.parameters.hints.values()
            found.update({name_of(kind): kind for kind in mapped_among(hints)})
    return found
