"""What an application's exception consists of: the exceptions that decide about its message.

A handler's own ``raise`` may arrive inside something else: ``asyncio.TaskGroup`` raises groups, and
Python replaces a ``StopIteration`` that leaves a generator or a coroutine by a ``RuntimeError``. So
nothing asks for the class of an exception before it has looked inside with :func:`leaves`.
"""

from __future__ import annotations

from asyncio import CancelledError
from collections.abc import Iterator

from outbox.consumers.outcome import HandlerExit, of_handler

__all__ = ["causes", "leaves", "text_of", "unwrapped"]


def leaves(error: BaseException) -> list[BaseException]:
    """Return the exceptions that ``error`` stands for: itself, or the members of the group.

    Groups in groups are taken apart, in order. A cancellation is left out if there is anything
    else: in a group it only follows from the failure of another task. A bare BaseException becomes
    a ``HandlerExit``.
    """
    members: list[BaseException] = []
    pending = [error]
    while pending:  # not recursive: groups may be nested deeply
        error = unwrapped(pending.pop())
        group = error.__cause__ if isinstance(error, HandlerExit) else error
        if isinstance(group, BaseExceptionGroup):
            pending.extend(reversed(group.exceptions))
        else:
            members.append(error)
    failures = [member for member in members if not isinstance(member, CancelledError)]
    return [of_handler(member) for member in failures or members]


def unwrapped(error: BaseException) -> BaseException:
    """Return the ``StopIteration`` that Python has replaced by ``error``, if it has."""
    cause = error.__cause__
    if (
        isinstance(cause, StopIteration | StopAsyncIteration)
        and type(error) is RuntimeError
        and str(error).endswith(f" raised {type(cause).__name__}")
    ):
        return cause
    return error


def causes(error: BaseException) -> Iterator[BaseException]:
    """Yield ``error``, and the exceptions that it was explicitly raised from."""
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        original = getattr(cause, "orig", None)  # SQLAlchemy's
        cause = original if isinstance(original, BaseException) else cause.__cause__


def text_of(error: BaseException) -> str:
    """Return the text of ``error``; with an application's exception, even that may fail."""
    try:
        return str(error)
    except Exception as why:
        return f"(text unavailable: {type(why).__qualname__})"
