"""Filters: methods of a consumer that run around ``process``, inherited by its subclasses."""

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
    """Have ``method(self, event)`` called before ``process``.

    What it returns other than None is the message's outcome, such as ``REJECT``: neither the
    filters behind it nor ``process`` are called. What it raises counts as if ``process`` had.
    """
    _mark(method, "before")
    return method


def after(method: F) -> F:
    """Have ``method(self, event)`` called when ``process`` has succeeded.

    Events that it enqueues are follow-ons like those of ``process``, and what it raises counts as
    if ``process`` had. The last one defined is called first.
    """
    _mark(method, "after")
    return method


def around(method: F) -> F:
    """Have ``method(self, event)``, a generator with a single ``yield``, run around ``process``.

    Filters of kind *before* and *after* are inside, too. What ``process`` raises is raised at the
    ``yield``, a timeout included; one that does not raise it on makes the message a success. In a
    consumer of asyncio it may be an asynchronous generator. The first one defined is the outermost.
    """
    make: Any = (
        contextlib.asynccontextmanager(method)
        if inspect.isasyncgenfunction(method)
        else contextlib.contextmanager(method)
    )
    if not inspect.isasyncgenfunction(method) and not inspect.isgeneratorfunction(method):
        raise UsageError(f"{method.__qualname__} is around process(), but has no yield")
    make.is_async = inspect.isasyncgenfunction(method)
    _mark(make, "around")
    found: F = make
    return found


def _mark(method: Any, kind: str) -> None:
    setattr(method, _KIND, kind)


@dataclass(frozen=True, slots=True)
class Filters:
    """A consumer's filters: the names of its methods, in the order in which they are called."""

    before: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    around: tuple[str, ...] = ()


def filters_of(consumer: type, *, what: str) -> Filters:
    """Return the filters of a class: those of its bases first, without those that it skips.

    A method that overrides one of them is a filter in its place, of the same kind unless it says
    otherwise. ``skip`` names those that are left out, from the class that says so on down.

    Raises:
        UsageError: ``skip`` names what is no filter, or a filter is no method; begins with
            ``what``.
    """
    found: dict[str, str] = {}
    known: set[str] = set()
    for base in reversed(consumer.__mro__):
        for name, member in vars(base).items():
            kind = getattr(member, _KIND, None)
            if isinstance(kind, str):  # an object may have any attribute that it is asked for
                found[name] = kind
                known.add(name)
        skipped = vars(base).get("skip", ())
        if isinstance(skipped, str):
            raise UsageError(f"{what}: skip is {skipped!r}, not a list of names")
        for name in skipped:
            found.pop(name, None)  # a base may have skipped it: [*Base.skip, "one_more"]
            if name not in known:
                raise UsageError(f"{what}: skip names {name!r}, which is no filter that it has")
    for name, kind in found.items():
        if not callable(getattr(consumer, name)):
            raise UsageError(f"{what}: {name} is a filter, and no method: to leave it out, skip it")
        if kind == "around" and getattr(getattr(consumer, name), _KIND, None) != kind:
            raise UsageError(f"{what}: {name} overrides a filter and needs @around itself")

    def of(kind: str) -> tuple[str, ...]:
        return tuple(name for name, one in found.items() if one == kind)

    return Filters(of("before"), tuple(reversed(of("after"))), of("around"))
