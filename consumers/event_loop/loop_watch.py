"""A watch over an event loop, which logs what blocks it.

While a handler blocks the loop, with ``time.sleep()`` or a driver that isn't asynchronous, no other
coroutine of the worker goes on, no timeout can cancel it, and nothing would say so.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from types import FrameType

from outbox.consumers.current import current_message
from outbox.messages.delivery import Delivery

__all__ = ["LoopWatch"]

logger = logging.getLogger("outbox.consumer")

_PATIENCE = 3.0  # seconds until the first warning; each further one takes twice as long
_LONGEST_PATIENCE = 300.0  # seconds between two warnings about the same blockage
_EVERY = 1.0  # seconds between two checks
_FRAMES = 20
_NAMED = 5  # messages


class LoopWatch:
    """A thread that checks every second whether a loop turns."""

    def __init__(self, running: Callable[[], Iterable[Delivery]]) -> None:
        """Create the watch; ``running`` returns the messages that the loop works on."""
        self._running = running
        self._ended = threading.Event()

    def start(self, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
        """Start watching ``loop``, which runs in ``thread``."""
        watch = threading.Thread(
            target=self._run, args=(loop, thread), name="outbox-worker-loop-watch", daemon=True
        )
        watch.start()

    def end(self) -> None:
        """Stop watching, soon."""
        self._ended.set()

    def _run(self, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
        while not self._ended.wait(_EVERY):
            turned = threading.Event()
            began = time.monotonic()
            patience = _PATIENCE
            try:
                loop.call_soon_threadsafe(turned.set)
            except RuntimeError:  # the loop is closed
                return
            # Twice: a process that was suspended needs a moment after it is resumed.
            while not (turned.wait(patience) or turned.wait(_EVERY / 10)):
                if self._ended.is_set():
                    return
                self._report(loop, thread, time.monotonic() - began)
                patience = min(2 * patience, _LONGEST_PATIENCE)
            if patience > _PATIENCE:
                logger.warning("the event loop goes on after %.1f s", time.monotonic() - began)

    def _report(
        self, loop: asyncio.AbstractEventLoop, thread: threading.Thread, seconds: float
    ) -> None:
        logger.warning(
            "the event loop has been blocked for %.1f s; no asyncio handler goes on, and no "
            "timeout ends one. Call what blocks with asyncio.to_thread(). Running: %s, at\n%s",
            seconds,
            _named(loop, list(self._running())),
            _stack_of(thread),
        )


def _named(loop: asyncio.AbstractEventLoop, running: list[Delivery]) -> str:
    """Name the message whose handler blocks the loop, or those of which it is one."""
    task = asyncio.current_task(loop)
    if task is not None and sys.version_info >= (3, 12):
        event = task.get_context().copy().run(current_message)
        if event is not None:
            return f"message {event.id!r} of {event.queue!r}"
    names = [f"message {each.message_id!r} of {each.queue!r}" for each in running[:_NAMED]]
    more = len(running) - len(names)
    return ", ".join(names) + (f" and {more} more" if more else "") or "no message"


def _stack_of(thread: threading.Thread) -> str:
    """Return the stack of ``thread``, without the frames of the loop and the engine."""
    frames = list(traceback.walk_stack(sys._current_frames().get(thread.ident or 0)))
    theirs = [each for each in frames if not _is_engines(each[0])] or frames
    stack = traceback.StackSummary.extract(iter(theirs[:_FRAMES]))  # the innermost is the first
    stack.reverse()
    return "".join(traceback.format_list(stack)).rstrip()


def _is_engines(frame: FrameType) -> bool:
    module = str(frame.f_globals.get("__name__"))
    return module.startswith(("asyncio.", "threading", "outbox.consumers."))
