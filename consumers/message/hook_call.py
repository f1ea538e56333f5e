"""One call of a function that runs when a worker starts or stops."""

from __future__ import annotations

import asyncio
import inspect
import logging

from outbox.consumers.hooks import Hook, HookFailed, name_of
from outbox.surroundings import Surroundings

__all__ = ["failed_start", "log_failed_stop", "run_hook", "run_hook_async"]

logger = logging.getLogger("outbox.consumer")


def failed_start(hook: Hook, error: BaseException) -> HookFailed:
    """Log what a start hook has raised; return the error that ends its worker."""
    failed = HookFailed(f"{name_of(hook)}(), an @on_worker_start function, has failed: {error!r}")
    failed.__cause__ = error
    logger.error("%s", failed, exc_info=error)
    return failed


def log_failed_stop(hook: Hook) -> None:
    """Log what a stop hook has raised, which is the current exception."""
    logger.exception("%s(), an @on_worker_stop function, has failed", name_of(hook))


def run_hook(hook: Hook, surroundings: Surroundings | None) -> None:
    """Call a plain hook inside what a framework needs around a handler.

    Raises:
        BaseException: it raised it.
        HookFailed: it returned something to await.
    """
    if surroundings is None:
        _refuse_awaitable(hook, hook())
        return
    with surroundings():
        _refuse_awaitable(hook, hook())


async def run_hook_async(hook: Hook, surroundings: Surroundings | None) -> None:
    """Call a hook, and await what it returns, inside what a framework needs around a handler.

    Raises:
        BaseException: it raised it; a SystemExit is the cause of a HookFailed, since it would end
            the event loop.
    """
    try:
        if surroundings is None:
            await _called(hook)
            return
        with surroundings():
            await _called(hook)
    except (SystemExit, KeyboardInterrupt) as error:
        raise HookFailed(f"it raised {error!r}") from error
    except asyncio.CancelledError:
        if (task := asyncio.current_task()) is not None and task.cancelling():
            raise
        raise HookFailed("it was cancelled") from None


async def _called(hook: Hook) -> None:
    value = hook()
    if inspect.isawaitable(value):
        await value


def _refuse_awaitable(hook: Hook, value: object) -> None:
    if inspect.iscoroutine(value):
        value.close()
        raise HookFailed(
            f"{name_of(hook)}() returned a coroutine, but is a plain function; make it async def"
        )
