"""Functions that run when a worker starts and stops, and what they share with handlers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, TypeVar

from outbox import UsageError
from outbox.system.signatures import takes_no_arguments

__all__ = [
    "Hook",
    "HookFailed",
    "Hooks",
    "begin_state",
    "declared",
    "end_state",
    "name_of",
    "on_worker_start",
    "on_worker_stop",
    "worker_state",
]

Hook = Callable[[], object]
F = TypeVar("F", bound=Hook)


class HookFailed(RuntimeError):
    """A function with ``@on_worker_start`` has failed; its cause is what that raised."""


@dataclass(frozen=True, slots=True)
class Hooks:
    """The declared functions, in the order of their declaration.

    Attributes:
        start: those to run when a worker starts.
        stop: those to run, last one first, when it stops.
    """

    start: tuple[Hook, ...] = ()
    stop: tuple[Hook, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.start or self.stop)

    @property
    def need_loop(self) -> bool:
        """Whether one of them is a coroutine function."""
        return any(map(inspect.iscoroutinefunction, (*self.start, *self.stop)))


_start: list[Hook] = []
_stop: list[Hook] = []


def declared() -> Hooks:
    """Return what was declared in this process so far."""
    return Hooks(tuple(_start), tuple(_stop))


def on_worker_start(hook: F) -> F:
    """Run the decorated function when a worker starts, before it consumes.

    It takes no arguments. A plain function runs on a thread of the handlers, or on their event loop
    if all consumers are asynchronous; a coroutine function always on the event loop. Functions
    run in the order of their declaration, one at a time, once for each ``Worker``; also once in
    each subprocess of ``--isolate process``. If one raises, the others aren't run, and the worker
    ends without having consumed: ``Worker.wait`` raises, and ``outbox-consume`` exits with 1.

    Put what handlers share, such as a client for HTTP, into :data:`worker_state`.

    Raises:
        UsageError: it isn't a function without arguments, or it has a ``yield``.
    """
    _start.append(_checked(hook, "on_worker_start"))
    return hook


def on_worker_stop(hook: F) -> F:
    """Run the decorated function when a worker stops, after the last message.

    It runs where those of :func:`on_worker_start` do, last declared first, once, also after a start
    that has failed; what the start was to make may be missing then. All of them have what is left
    of the shutdown timeout, at least a second. What one raises is logged.

    Raises:
        UsageError: it isn't a function without arguments, or it has a ``yield``.
    """
    _stop.append(_checked(hook, "on_worker_stop"))
    return hook


def name_of(hook: Hook) -> str:
    """Return the name of a function, for messages."""
    return str(getattr(hook, "__qualname__", repr(hook)))


def _checked(hook: F, decorator: str) -> F:
    if not callable(hook) or isinstance(hook, type):
        raise UsageError(f"@{decorator} needs a function without arguments, not {hook!r:.80}")
    if inspect.isgeneratorfunction(hook) or inspect.isasyncgenfunction(hook):
        raise UsageError(
            f"@{decorator}: {name_of(hook)}() has a yield; put what follows it into a function "
            "with @on_worker_stop"
        )
    if not takes_no_arguments(hook):
        raise UsageError(f"@{decorator}: {name_of(hook)}() must take no arguments")
    return hook


@dataclass(slots=True)
class _Namespaces:
    """Where the values of :data:`worker_state` are.

    Attributes:
        running: those of the workers that run, the latest last.
        outside: what was set outside of a worker.
    """

    running: list[dict[str, Any]] = field(default_factory=list)
    outside: dict[str, Any] = field(default_factory=dict)


_namespaces = _Namespaces()
_current: ContextVar[dict[str, Any]] = ContextVar("the worker's state")


def begin_state() -> dict[str, Any]:
    """Begin the state of a worker, which is current in this context and its copies."""
    values: dict[str, Any] = {}
    _namespaces.running.append(values)
    _current.set(values)
    return values


def end_state(values: dict[str, Any]) -> None:
    """End the state of a worker; do nothing if it has ended."""
    _namespaces.running[:] = [each for each in _namespaces.running if each is not values]


class _WorkerState:
    """The attributes that a worker's hooks and handlers share."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        for values in (_here(), _namespaces.outside):
            if name in values:
                return values[name]
        raise AttributeError(
            f"worker_state has no attribute {name!r}; set it in a function with @on_worker_start"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        _here()[name] = value

    def __delattr__(self, name: str) -> None:
        try:
            del _here()[name]
        except KeyError:
            raise AttributeError(f"worker_state has no attribute {name!r}") from None

    def __repr__(self) -> str:
        return f"<worker_state: {', '.join(sorted({**_namespaces.outside, **_here()})) or 'empty'}>"


def _here() -> dict[str, Any]:
    """Return the values of this context's worker; else of the latest that runs; else the others.

    A thread that a handler starts by itself has none in its context.
    """
    values = _current.get(None)
    if values is not None:
        return values
    return _namespaces.running[-1] if _namespaces.running else _namespaces.outside


worker_state = _WorkerState()
"""What the handlers of a worker share: any attributes, set by a function with ``@on_worker_start``.

Each worker has its own, and so has each subprocess of ``--isolate process``. Outside of workers,
such as in a test, there is one for the process, whose attributes workers see as well, unless they
set their own. Reading and setting an attribute is thread-safe.
"""
