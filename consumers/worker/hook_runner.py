"""Runs the hooks of a worker, one at a time, where its handlers run."""

from __future__ import annotations

import concurrent.futures
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future

from outbox.consumers.hooks import Hook, Hooks, name_of
from outbox.consumers.message.hook_call import failed_start, log_failed_stop

__all__ = ["CallHook", "HookRunner"]

CallHook = Callable[[Hook], "Future[None]"]
"""A function that has a hook called where it belongs, and returns a future of its end."""

_LEAST = 1.0  # seconds for the stop hooks, however late it is
_LOOK_EVERY = 0.2  # seconds between two looks at the deadline of a stop


class HookRunner:
    """A runner of a worker's hooks."""

    def __init__(
        self,
        hooks: Hooks,
        call: CallHook,
        on_started: Callable[[], None],
        on_failed: Callable[[Exception], None],
    ) -> None:
        """Create the runner.

        Args:
            hooks: the hooks.
            call: has a hook called.
            on_started: called when all start hooks have returned, unless the worker stops.
            on_failed: called with a HookFailed when one has failed, or with what ``on_started`` has
                raised.
        """
        self._hooks = hooks
        self._call = call
        self._on_started = on_started
        self._on_failed = on_failed
        self._deadline = math.inf
        self._is_stopping = False
        self._has_stopped = False
        self._thread = threading.Thread(target=self._start, name="outbox-worker-start", daemon=True)

    def start(self) -> None:
        """Run the start hooks, in the background."""
        self._thread.start()

    def end_start(self, deadline: float) -> None:
        """Begin no further start hook, and wait for the one that runs, until ``deadline``."""
        self._deadline = deadline
        self._is_stopping = True
        if self._thread.ident is not None:
            self._thread.join(max(0.0, deadline - time.monotonic()) + _LEAST)

    def stop(self, deadline: float) -> None:
        """Run the stop hooks, the last one first, until ``deadline`` or for a second."""
        if self._thread.ident is None or self._has_stopped:
            return  # it was never started, or is stopped again
        self._has_stopped = True
        self._deadline = max(deadline, time.monotonic() + _LEAST)
        for hook in reversed(self._hooks.stop):
            try:
                self._run(hook)
            except BaseException:
                log_failed_stop(hook)

    def _start(self) -> None:
        for hook in self._hooks.start:
            if self._is_stopping:
                return
            try:
                self._run(hook)
            except BaseException as error:
                self._on_failed(failed_start(hook, error))
                return
        if not self._is_stopping:
            try:
                self._on_started()
            except Exception as error:  # else the worker would never consume, in silence
                self._on_failed(error)

    def _run(self, hook: Hook) -> None:
        """Have a hook called, and wait for its end.

        Raises:
            BaseException: it raised it.
            TimeoutError: it didn't end before the deadline; a coroutine was cancelled.
        """
        future = self._call(hook)
        while not future.done():
            left = self._deadline - time.monotonic()
            if left <= 0:
                future.cancel()
                raise TimeoutError(f"{name_of(hook)}() didn't end before the worker had to")
            concurrent.futures.wait([future], min(left, _LOOK_EVERY))
        future.result()
