"""Steps: what a message asks its engine to do next, and the loops that have it done."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Generator
from typing import Any, NamedTuple, TypeAlias, TypeVar

from outbox.backlog.chunk import Chunk
from outbox.consumers.outcome import ProcessTimeout, of_handler

__all__ = [
    "Abandoned",
    "Blocking",
    "Call",
    "Confirm",
    "HandlerCancelled",
    "Pause",
    "Step",
    "Steps",
    "call",
    "cancelled_in_time",
    "drive",
]

T = TypeVar("T")


class Call(NamedTuple):
    """Call the application.

    Attributes:
        function: what it returns may have to be awaited.
        arguments: of the call.
        timeout: seconds, or None.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    timeout: float | None = None


class Confirm(NamedTuple):
    """Wait for the report of ``chunk``, which is the result."""

    chunk: Chunk


class Blocking(NamedTuple):
    """Call ``function``, which waits for a database."""

    function: Callable[[], Any]


class Pause(NamedTuple):
    """Wait for ``seconds``, or until the worker stops."""

    seconds: float


Step: TypeAlias = Call | Confirm | Blocking | Pause
Steps: TypeAlias = Generator[Step, Any, T]


class Abandoned(BaseException):
    """Raised by a step when the worker has stopped: the message is left, and delivered again."""


class HandlerCancelled(Exception):
    """A handler ended by a cancellation that did not come from the worker: a failed attempt."""


def call(steps: Steps[T], take: Callable[[Step], Any]) -> T:
    """Take ``steps`` here and now, and return their result.

    Args:
        steps: of a message.
        take: does what a step says. What it raises is raised in the steps.
    """
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            step = steps.send(value) if error is None else steps.throw(error)
        except StopIteration as end:
            result: T = end.value
            return result
        value = error = None
        try:
            value = take(step)
        except BaseException as raised:
            error = raised


async def drive(
    steps: Steps[T],
    take: Callable[[Step], Awaitable[Any]],
    may_end: Callable[[], bool] = lambda: True,
) -> T:
    """Take ``steps`` in this task, and return their result.

    Args:
        steps: of a message.
        take: does what a step says. What it raises is raised in the steps.
        may_end: whether a cancellation of the task is to end it. Otherwise it was the handler's own
            doing, and has failed.
    """
    task = asyncio.current_task()

    def ends() -> bool:
        return task is not None and task.cancelling() > 0 and may_end()

    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            step = steps.send(value) if error is None else steps.throw(error)
        except StopIteration as end:
            result: T = end.value
            return result
        value = error = None
        try:
            value = await take(step)
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
        async with asyncio.timeout(seconds) as limit:
            result = await value
    except Exception as error:
        if not limit.expired():
            raise
        cause = None if isinstance(error, TimeoutError) else error
        raise ProcessTimeout.after(seconds) from cause
    if limit.expired():
        raise ProcessTimeout.after(seconds)
    return result
