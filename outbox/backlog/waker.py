"""Wakes coroutines that await what other threads resolve."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from typing import TYPE_CHECKING, Any

from outbox.backlog.chunk import Chunk

if TYPE_CHECKING:
    import asyncio

__all__ = ["Waker", "reported", "running_trio"]


class Waker:
    """A waker of futures on one event loop. Thread-safe.

    Futures that are due at the same time share a call: a loop is woken by a byte through a socket,
    and with a hundred tasks that publish concurrently, a byte for each is expensive.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._due: deque[asyncio.Future[None]] = deque()
        self._called = False

    def wake(self, waiter: asyncio.Future[None]) -> None:
        """Resolve ``waiter`` soon; do nothing once the loop is closed."""
        self._due.append(waiter)
        if self._called:
            return
        self._called = True
        try:
            self.loop.call_soon_threadsafe(self.wake_due)
        except RuntimeError:  # the loop was closed: nothing waits
            self._called = False
        except BaseException:  # a signal handler raised: the next wake() must call
            self._called = False
            raise

    def wake_due(self) -> None:
        """Resolve all that are due; only on the loop's thread."""
        self._called = False  # before looking: a later wake() calls again
        while self._due:
            _set(self._due.popleft())


async def reported(chunk: Chunk, timeout: float) -> bool:  # noqa: ASYNC109  cancels nothing
    """Wait until ``chunk`` is reported, at most ``timeout`` seconds; return whether it is.

    On asyncio or trio.
    """
    trio = running_trio()
    if trio is not None:
        await _reported_on_trio(trio, chunk, timeout)
        return chunk.reported is not None
    import asyncio  # imported already where a loop runs; programs without one do not pay for it

    loop = asyncio.get_running_loop()
    waker: Waker | None = getattr(_here, "waker", None)
    if waker is None or waker.loop is not loop:
        waker = _here.waker = Waker(loop)
    waiter: asyncio.Future[None] = loop.create_future()
    # Not asyncio.timeout(): it cancels the task to end the wait; setting a future is enough.
    timer = loop.call_later(timeout, _set, waiter)
    chunk.on_reported(lambda _: waker.wake(waiter))
    try:
        await waiter
    finally:
        timer.cancel()
    if chunk.reported is not None and loop.time() >= timer.when():
        waker.wake_due()  # late: a signal handler may have raised in the call before
    return chunk.reported is not None


async def _reported_on_trio(trio: Any, chunk: Chunk, timeout: float) -> None:  # noqa: ASYNC109
    token = trio.lowlevel.current_trio_token()
    event = trio.Event()

    def wake(_: object) -> None:
        with contextlib.suppress(trio.RunFinishedError):  # nothing waits
            token.run_sync_soon(event.set)

    chunk.on_reported(wake)
    with trio.move_on_after(timeout):
        await event.wait()


def running_trio() -> Any:
    """Return the module ``trio`` in a task of it, or else None; never import it."""
    trio: Any = sys.modules.get("trio")
    if trio is None:
        return None
    try:
        trio.lowlevel.current_task()
    except (RuntimeError, AttributeError):  # no task; or another thread is still importing it
        return None
    return trio


def _set(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


_here = threading.local()
"""The waker of the loop that runs, or last ran, on this thread."""
