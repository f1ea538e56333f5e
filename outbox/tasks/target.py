"""What a call calls: a function of a module or a method of a class, under the name it travels by.

A name is ``module:qualified.name``. It must lead back to the same object, in the caller's process
as in the worker's; whatever has no such name is refused in the caller's line.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
import os
import sys
import types
from typing import Any

from outbox.errors import UsageError
from outbox.header_values import CheckedHeaders
from outbox.messages.headers import KEEP_RESULT, TASK
from outbox.tasks import mapped
from outbox.tasks.call_arguments import Parameters, parameters_of

__all__ = [
    "Target",
    "check_function",
    "name_of_function",
    "note_task",
    "parameters_of_task",
    "target_of",
]

_NOTHING: tuple[Any, ...] = ()
_LIBRARIES = frozenset(("django", "sqlalchemy"))


class Target:
    """What a call calls.

    Attributes:
        name: the name under which workers know it.
        headers: the headers of its events.
        parameters: the parameters.
        first: the instance that it is a method of, as a tuple of one; empty for all else.
    """

    __slots__ = ("first", "headers", "name", "parameters")

    def __init__(
        self,
        name: str,
        parameters: Parameters,
        first: tuple[Any, ...] = _NOTHING,
        *,
        is_kept: bool = True,
    ) -> None:
        self.name = name
        headers: dict[str, Any] = {TASK: name}
        if not is_kept:  # for workers that don't know the task
            headers[KEEP_RESULT] = 0
        self.headers = CheckedHeaders(headers)
        self.parameters = parameters
        self.first = first


_of_tasks: dict[str, Parameters] = {}


def note_task(name: str, parameters: Parameters) -> None:
    """Note the parameters of a task of this process."""
    _of_tasks[name] = parameters


def parameters_of_task(name: str) -> Parameters | None:
    """Return the parameters of a task that this process has imported, or None."""
    return _of_tasks.get(name)


def target_of(call: Any) -> Target:
    """Return what ``call`` calls.

    Raises:
        UsageError: workers could not call it; the message says why, and what to do.
    """
    if isinstance(call, types.MethodType):
        owner, function = call.__self__, call.__func__
        if not isinstance(function, types.FunctionType):
            raise UsageError(f"{call!r:.100} isn't a method that is written in Python")
        if isinstance(owner, type):
            return _of_class(owner, function.__name__)
        if mapped.is_instance(owner):
            return _of_instance(owner, function)
        raise UsageError(
            f"{type(owner).__qualname__}.{function.__name__} is a method of an object that no "
            "worker could find again: it isn't an instance of a mapped class; write a function "
            "that makes the object, decorate it with @task, and call that later"
        )
    if isinstance(call, types.FunctionType):
        return _of_function(call)
    hint = ""
    if isinstance(call, functools.partial):
        hint = ": give later() the function itself, and its arguments"
    elif callable(call):
        hint = "; write a function that calls it, and decorate it with @task"
    raise UsageError(f"{call!r:.100} isn't a function or a method{hint}")


@functools.lru_cache(maxsize=1024)
def _of_function(function: types.FunctionType) -> Target:
    name = name_of_function(function)
    module, _, path = name.partition(":")
    owner, found = _found(module, path)
    if getattr(found, "function", None) is function:
        target: Target = found.target  # of a task
        return target
    if found is not function:
        raise UsageError(
            f"{name} isn't the function that was given: the module has another object under this "
            "name, perhaps one that a decorator made; give that its wrapper functools.wraps()"
        )
    is_method = owner is not None and not isinstance(
        inspect.getattr_static(owner, function.__name__), staticmethod
    )
    return Target(name, parameters_of(function, name, owner if is_method else None))


def _found(module: str, path: str) -> tuple[type | None, Any]:
    """Return the class that a name leads through last, and what it leads to; None for nothing."""
    owner: Any = None
    found: Any = sys.modules.get(module) or sys.modules.get("__main__")
    for name in path.split("."):
        owner, found = found, getattr(found, name, None)
    return (owner if isinstance(owner, type) else None), found


@functools.lru_cache(maxsize=1024)
def _of_class(owner: type, name: str) -> Target:
    full = f"{_module_of(owner, owner.__qualname__)}:{owner.__qualname__}.{name}"
    check_path(full)
    member = inspect.getattr_static(owner, name, None)
    if not isinstance(member, classmethod):
        raise UsageError(f"{full} isn't a class method of that name")
    return Target(full, parameters_of(getattr(owner, name), full))


def _of_instance(owner: Any, function: types.FunctionType) -> Target:
    kind: Any = type(owner)
    full = f"{_module_of(kind, kind.__qualname__)}:{kind.__qualname__}.{function.__name__}"
    check_path(full)
    if inspect.getattr_static(kind, function.__name__, None) is not function:
        raise UsageError(f"{full} isn't a method of the class of that name")
    library = function.__module__.partition(".")[0]
    if library in _LIBRARIES:
        raise UsageError(
            f"{full} is a method of {library}, which workers don't call; write one that calls it"
        )
    return Target(full, parameters_of(function, full, kind), (owner,))


def name_of_function(function: types.FunctionType) -> str:
    """Return the name of a function, by which workers know it unless it is given another.

    Raises:
        UsageError: it has none: it is local to another function, or of a program that can't be
            imported.
    """
    full = f"{_module_of(function, function.__qualname__)}:{function.__qualname__}"
    check_path(full)
    return full


def check_path(name: str) -> None:
    """Check that a name leads to something public in a module.

    Raises:
        UsageError: it doesn't.
    """
    path = name.partition(":")[2]
    if "<locals>" in path or "<lambda>" in path:
        raise UsageError(
            f"{name} is local to a function, so that no worker could find it; move it to the "
            "module, or, if it is what a decorator has made, use functools.wraps() there"
        )
    if any(part.startswith("_") for part in path.split(".")):
        raise UsageError(f"{name} isn't public; workers call nothing whose name begins with _")
    if len(name.encode(errors="replace")) > 255:
        raise UsageError(f"the name {name:.60}... has more than 255 bytes in UTF-8")


def check_function(function: Any) -> None:
    """Check that ``function`` can be a task.

    Raises:
        UsageError: it isn't a plain function or coroutine function.
    """
    if not isinstance(function, types.FunctionType):
        raise UsageError(
            f"@task needs a function of a module, not {function!r:.100}; for methods of mapped "
            "classes, class and static methods use later(), which needs no decorator"
        )
    if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
        raise UsageError(
            f"@task: {function.__qualname__}() has a yield, so that calling it does nothing"
        )


def _module_of(thing: Any, path: str) -> str:
    """Return the module of a function or class, by the name under which it can be imported."""
    module = str(thing.__module__)
    if module != "__main__":
        return module
    main = sys.modules["__main__"]
    spec = getattr(main, "__spec__", None)
    if spec is not None and spec.name != "__main__":
        return str(spec.name)
    file = getattr(main, "__file__", None)
    stem = os.path.splitext(os.path.basename(file))[0] if file else ""
    if file and stem.isidentifier():
        try:
            there = importlib.util.find_spec(stem)
        except (ImportError, ValueError):
            there = None
        if there is not None and there.origin and os.path.samefile(there.origin, file):
            return stem
    raise UsageError(
        f"{path} is defined in the program itself (__main__), which no worker can import; move it "
        "to a module, and import that"
    )
