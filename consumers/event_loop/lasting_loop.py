"""An event loop that the tasks of an application can't end.

asyncio lets a ``SystemExit`` or ``KeyboardInterrupt`` of any task end the loop, and so do
``loop.stop()`` and the cancellation of all tasks. In a program that is right; in a worker, one
message would end all others.
"""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

__all__ = ["run", "undisturbed"]

T = TypeVar("T")

logger = logging.getLogger("outbox.consumer")


def run(
    main: Coroutine[Any, Any, T],
    *,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
    context: contextvars.Context | None = None,
) -> T:
    """Run ``main`` in a new event loop, as ``asyncio.run`` does, whatever its other tasks raise.

    A task that has raised SystemExit or KeyboardInterrupt has failed like one that has raised
    anything else: whatever awaits it gets the exception. In the main thread Ctrl-C still ends the
    loop.

    Args:
        main: the coroutine.
        loop_factory: creates the loop; None for the default.
        context: the context of ``main``; None for a copy of the caller's.

    Raises:
        BaseException: ``main`` raised it, or the loop can't go on.
    """
    is_main = threading.current_thread() is threading.main_thread()
    survived = SystemExit if is_main else (SystemExit, KeyboardInterrupt)
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        loop = runner.get_loop()
        task = loop.create_task(main, context=context)
        while True:
            try:
                return loop.run_until_complete(task)
            except survived as error:
                if task.done():
                    raise
                logger.error("a task raised %r; the event loop goes on", error, exc_info=error)
            except RuntimeError as error:
                if task.done() or loop.is_closed() or not str(error).startswith(_STOPPED):
                    raise
                logger.error("a task stopped the event loop; it goes on")


async def undisturbed(wait: Callable[[], Awaitable[Any]]) -> None:
    """Await ``wait()``, once more whenever a handler cancels the current task with all others."""
    task = asyncio.current_task()
    while True:
        try:
            await wait()
            return
        except asyncio.CancelledError:
            logger.error("a handler cancelled a task of the worker; it goes on")
            while task is not None and task.uncancel():
                pass


_STOPPED = "Event loop stopped before Future completed"  # of asyncio and uvloop
