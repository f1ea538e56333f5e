"""Steps, which a message asks its engine to take, and the loops that take them."""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Awaitable, Callable, Generator
from typing import Any, NamedTuple, TypeAlias, TypeVar

from outbox.backlog.chunk import Chunk
from outbox.consumers.outcome import ProcessTimeout, of_handler
from outbox.results.pending_write import PendingWrite
from outbox.system import process
from outbox.system.forked_child import end_child
from outbox.system.steady_clock import monotonic

__all__ = [
    "Abandoned",
    "Blocking",
    "Call",
    "Closing",
    "Confirm",
    "HandlerCancelled",
    "Parked",
    "Pause",
    "Step",
    "Steps",
    "Written",
    "call",
    "cancelled_in_time",
    "drive",
]

T = TypeVar("T")


class Call(NamedTuple):
    """A call of application code.

    Attributes:
        function: the function; its result may have to be awaited.
        arguments: the arguments of the call.
        timeout: the time limit in seconds, or None.
    """

    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()
    timeout: float | None = None

    def run(self) -> Any:
        """Call the function; a child that it forks ends here, if not before."""
        pid = process.pid
        try:
            result = self.function(*self.arguments)
        except BaseException as error:
            if process.pid != pid:
                end_child(error)
            raise
        if process.pid != pid:
            end_child(None)
        return result


class Confirm(NamedTuple):
    """A wait for the report of ``chunk``, which is the result of the step."""

    chunk: Chunk


class Blocking(NamedTuple):
    """A call of ``function``, which blocks on a database."""

    function: Callable[[], Any]


class Written(NamedTuple):
    """A wait until a row of the results of tasks has been written."""

    write: PendingWrite


class Parked(NamedTuple):
    """The same, while the engine goes on with another message.

    Attributes:
        write: the write.
        is_last: whether all that is left then is to settle the message.
    """

    write: PendingWrite
    is_last: bool


class Closing(enum.Enum):
    """What becomes of a queue while one of its messages waits.

    Attributes:
        NEVER: its other messages begin as usual.
        WHEN_MANY: none of them begins once as many wait as the engine has threads or tasks.
        AT_ONCE: none of them begins.
    """

    NEVER = enum.auto()
    WHEN_MANY = enum.auto()
    AT_ONCE = enum.auto()


class Pause(NamedTuple):
    """A wait, or until the worker stops; the engine goes on with another message meanwhile.

    Attributes:
        seconds: the seconds to wait.
        until: then a condition to wait for, which must not block; None for none.
        closing: whether other messages of the queue may begin meanwhile.
        is_in_attempt: whether an attempt goes on afterwards, in the same context. Otherwise it goes
            on in a fresh one: the next attempt sees nothing of the last one.
    """

    seconds: float
    until: Callable[[], bool] | None = None
    closing: Closing = Closing.NEVER
    is_in_attempt: bool = False


Step: TypeAlias = Call | Confirm | Blocking | Written | Parked | Pause
_LEAVING = (Pause, Parked)
Steps: TypeAlias = Generator[Step, Any, T]


class Abandoned(BaseException):
    """Raised by a step when the worker has stopped: the message is left, and redelivered."""


class HandlerCancelled(Exception):
    """A failed attempt: its handler was cancelled, but not by the worker."""


def call(steps: Steps[T], take: Callable[[Step], Any]) -> T | Pause | Parked:
    """Take ``steps`` in this thread, and return their result.

    A pause is returned as well, before it has begun: when it is over, call this once more. So is
    ``Parked``.

    Args:
        steps: the steps of a message.
        take: takes one step and returns its result; its exceptions are raised in the steps. It is
            never given a pause.
    """
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            step = steps.send(value) if error is None else steps.throw(error)
        except StopIteration as end:
            result: T = end.value
            return result
        if isinstance(step, _LEAVING):
            return step
        value = error = None
        try:
            value = take(step)
        except BaseException as raised:
            error = raised


async def drive(
    steps: Steps[T],
    take: Callable[[Step], Awaitable[Any]],
    is_ending: Callable[[], bool] | None = None,
) -> T | Pause | Parked:
    """Take ``steps`` in this task, and return their result, or a pause; see :func:`call`.

    Args:
        steps: the steps of a message.
        take: takes one step and returns its result; its exceptions are raised in the steps.
        is_ending: returns whether the worker has cancelled the task. Otherwise the handler caused
            the cancellation, and the attempt has failed. None if any caller may cancel the task.
    """
    task = asyncio.current_task()

    def is_cancelled() -> bool:
        return task is not None and task.cancelling() > 0 and (is_ending is None or is_ending())

    pid = process.pid
    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            step = steps.send(value) if error is None else steps.throw(error)
        except StopIteration as end:
            result: T = end.value
            return result
        if isinstance(step, _LEAVING):
            return step
        value = error = None
        try:
            value = await take(step)
            if process.pid != pid:  # a coroutine has forked, and this is the child
                end_child(None)
        except asyncio.CancelledError as raised:
            if is_cancelled():
                error = raised
            else:
                # A cancellation that is left counted would make is_cancelled() true in later steps.
                while task is not None and task.uncancel():
                    pass
                error = HandlerCancelled("the handler was cancelled, but not by the worker")
                error.__cause__ = raised
        except BaseException as raised:
            if process.pid != pid:
                end_child(raised)
            error = of_handler(raised)
            # asyncio.TaskGroup leaves a cancellation counted (Python 3.11 and 3.12): that the task
            # is being cancelled isn't enough to tell.
            if is_ending is not None and is_ending():  # it turned its cancellation into that
                error = asyncio.CancelledError()
                error.__cause__ = raised


async def cancelled_in_time(value: Awaitable[Any], seconds: float) -> Any:
    """Await ``value``, and cancel it after ``seconds``.

    Raises:
        ProcessTimeout: it took longer, even if it has swallowed the cancellation, or has blocked
            the event loop so that it couldn't be cancelled.
    """
    deadline = monotonic() + seconds
    try:
        async with asyncio.timeout(seconds) as limit:
            result = await value
    except asyncio.CancelledError:  # of the whole task
        raise
    except BaseException as error:
        if not limit.expired() and monotonic() < deadline:
            raise
        cause = None if isinstance(error, TimeoutError) else error
        raise ProcessTimeout.after(seconds) from cause
    if limit.expired() or monotonic() >= deadline:
        raise ProcessTimeout.after(seconds)
    return result
