"""The current collector: one context variable, and the functions that set it."""

from __future__ import annotations

from contextvars import ContextVar, Token
from typing import Any

from outbox.unit_of_work.buffer import Buffer

__all__ = ["Scope", "begin", "enter", "leave", "present", "resume"]


class Scope:
    """A collector's place in a context.

    Attributes:
        collector: the ``EventCollector``, whose module is built on this one.
        buffer: the innermost buffer of its unit of work.
        outer: the scope before it, or None.
    """

    __slots__ = ("buffer", "collector", "outer")

    def __init__(self, collector: Any, buffer: Buffer, outer: Scope | None) -> None:
        self.collector = collector
        self.buffer = buffer
        self.outer = outer


_scope: ContextVar[Scope | None] = ContextVar("outbox_scope", default=None)
present = _scope.get
"""Returns the innermost scope of this context, or None."""
resume = _scope.set
"""Makes an earlier scope the innermost again, for a generator's next step."""


def enter(collector: Any, buffer: Buffer) -> Token[Scope | None]:
    """Make ``buffer`` of ``collector`` the innermost of this context."""
    return _scope.set(Scope(collector, buffer, _scope.get()))


def begin(collector: Any, buffer: Buffer) -> None:
    """Make ``buffer`` of ``collector`` the only one of this context, for its lifetime."""
    _scope.set(Scope(collector, buffer, None))


def leave(token: Token[Scope | None]) -> None:
    """Restore the scope that was innermost before ``enter``.

    In another context than that of ``enter`` (a generator entered in one context and closed in
    another, a synchronous dependency between two threads) the token doesn't apply. Then the
    innermost scope goes only if it is closed or directly above the one to restore; at worst, a
    closed buffer remains current, never another unit's.
    """
    try:
        _scope.reset(token)
    except ValueError:
        scope, before = _scope.get(), token.old_value
        if scope is not None and (
            scope.buffer.closed or (isinstance(before, Scope) and scope.outer is before)
        ):
            _scope.set(scope.outer)
