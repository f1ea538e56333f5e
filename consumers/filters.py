"""Filters: methods of a consumer that run around ``process``; subclasses inherit them."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from outbox import UsageError

__all__ = ["Filters", "after", "around", "before", "filters_of"]

F = TypeVar("F", bound=Callable[..., Any])

_KIND = "_outbox_filter"


def before(method: F) -> F:
    """Call ``method(self, event)`` before ``process``.

    If it returns anything but None, that is the message's outcome, such as ``REJECT``: neither the
    filters after it nor ``process`` are called. An exception counts as one of ``process``.
    """
    _mark(method, "before")
    return method


def after(method: F) -> F:
    """Call ``method(self, event)`` after ``process`` has succeeded.

    Events it enqueues are follow-on events like those of ``process``, and an exception counts as
    one of ``process``. The last filter defined is called first.
    """
    _mark(method, "after")
    return method


def around(method: F) -> F:
    """Run ``method(self, event)``, a generator with a single ``yield``, around ``process``.

    It also encloses the *before* and *after* filters. Their exceptions and those of ``process``, a
    timeout included, are raised at the ``yield``; a filter that swallows one makes the message a
    success. In an asyncio consumer it may be an asynchronous generator. The first filter defined is
    the outermost.
    """
    make: Any = (
        contextlib.asynccontextmanager(method)
        if inspect.isasyncgenfunction(method)
        else contextlib.contextmanager(method)
    )
    if not inspect.isasyncgenfunction(method) and not inspect.isgeneratorfunction(method):
        raise UsageError(f"{method.__qualname__} is an @around filter, but has no yield")
    make.is_async = inspect.isasyncgenfunction(method)
    _mark(make, "around")
    marked: F = make
    return marked


def _mark(method: Any, kind: str) -> None:
    setattr(method, _KIND, kind)


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters of a consumer: names of its methods, in the order they are called."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    around: tuple[str, ...] = ()


def filters_of(consumer: type, *, what: str) -> Filters:
    """Return the filters of a class: inherited ones first, without those that it skips.

    A method that overrides a filter takes over its position, and its kind unless it is decorated.
    ``skip`` leaves filters out of the class that names them, and of its subclasses.

    Raises:
        UsageError: ``skip`` names something that is not a filter, or a filter is not a method; the
            message begins with ``what``.
    """
    kinds: dict[str, str] = {}
    known: set[str] = set()
    for base in reversed(consumer.__mro__):
        for name, member in vars(base).items():
            kind = getattr(member, _KIND, None)
            if isinstance(kind, str):  # some objects, such as mocks, have every attribute
                kinds[name] = kind
                known.add(name)
        skipped = vars(base).get("skip", ())
        if isinstance(skipped, str):
            raise UsageError(f"{what}: skip is {skipped!r}, not a list of names")
        for name in skipped:
            kinds.pop(name, None)  # a base may have skipped it: [*Base.skip, "one_more"]
            if name not in known:
                raise UsageError(f"{what}: skip names {name!r}, which is not one of its filters")
    for name, kind in kinds.items():
        if not callable(getattr(consumer, name)):
            raise UsageError(f"{what}: {name} is a filter, but not a method; to omit it, use skip")
        if kind == "around" and getattr(getattr(consumer, name), _KIND, None) != kind:
            raise UsageError(f"{what}: {name} overrides a filter and needs @around itself")

    def of(wanted: str) -> tuple[str, ...]:
        return tuple(name for name, kind in kinds.items() if kind == wanted)

    return Filters(of("before"), tuple(reversed(of("after"))), of("around"))
