"""Steps: what a message asks its engine to call next, and the loops that call it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Callable, Generator
from typing import Any, NamedTuple, TypeVar

from outbox.consumers.outcome import (
    ProcessTimeout,
    of_handler,
)

__all__ = [
    "Abandoned",
    "call",
    "cancelled_in_time",
    "drive",
    "HandlerCancelled",
    "Step",
    "Steps",
]

T = TypeVar("T")


class Step(NamedTuple):
    """What an engine is to do next.

    Attributes:
        call: the function; what it returns may have to be awaited.
        arguments: of the call.
        timeout: seconds, or None.
    """

    call: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    timeout: float | None = None


Steps = Generator[Step, Any, T]


class Abandoned(BaseException):
    """Raised out of a life that is to go on elsewhere: the message is left, and comes again."""


def _take(step: Step) -> Any:
    return step.call(*step.arguments)


def call(steps: Steps[T], take: Callable[[Step], Any] = _take) -> T:
    """Take ``steps`` here and now, and return their result.

    Args:
        steps: of a message.
        take: calls what a step says; by default without regard to its timeout. What it raises is
            raised in the steps.
    """
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            step = steps.send(value) if error is None else steps.throw(error)
        except StopIteration as end:
            found: T = end.value
            return found
        value = error = None
        try:
            value = take(step)
        except BaseException as raised:
            error = raised


class HandlerCancelled(Exception):
    """A handler ended by a cancellation that did not come from the worker: a failed attempt."""


async def drive(
    steps: Steps[T],
    may_end: Callable[[], bool] = lambda: True,
    in_time: Callable[[Awaitable[Any], float], Awaitable[Any]] | None = None,
) -> T:
    """Take ``steps``, awaiting what can be awaited, and return their result.

    Args:
        steps: of a message.
        may_end: whether a cancellation of the task is to end it. Otherwise it was the handler's own
            doing, and has failed.
        in_time: awaits in so many seconds; by default one that cancels.
    """
    task = asyncio.current_task()
    limited = in_time or cancelled_in_time

    def ends() -> bool:
        return task is not None and task.cancelling() > 0 and may_end()

    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            step = steps.send(value) if error is None else steps.throw(error)
        except StopIteration as end:
            found: T = end.value
            return found
        value = error = None
        try:
            value = step.call(*step.arguments)
            if value is not None and inspect.isawaitable(value):
                value = await (value if step.timeout is None else limited(value, step.timeout))
        except asyncio.CancelledError as raised:
            if ends():
                error = raised
            else:
                while task is not None and task.uncancel():
                    pass
                error = HandlerCancelled("the handler was cancelled, and not by the worker")
                error.__cause__ = raised
        except BaseException as raised:
            error = of_handler(raised)
            if ends():  # it is what the handler has made of its cancellation
                error = asyncio.CancelledError()
                error.__cause__ = raised


async def cancelled_in_time(value: Awaitable[Any], seconds: float) -> Any:
    """Await ``value``, and cancel it when it takes longer.

    Raises:
        ProcessTimeout: it was cancelled, whatever it has made of that.
    """
    try:
        async with asyncio.timeout(seconds) as scope:
            found = await value
    except Exception as error:
        if not scope.expired():
            raise
        cause = None if isinstance(error, TimeoutError) else error
        raise ProcessTimeout.after(seconds) from cause
    if scope.expired():
        raise ProcessTimeout.after(seconds)
    return found
