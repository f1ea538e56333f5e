"""Runs the hooks of a subprocess, on the thread of its handlers."""

from __future__ import annotations

import asyncio
import inspect

from outbox.consumers.hooks import Hook, Hooks, begin_state
from outbox.consumers.message.hook_call import (
    failed_start,
    log_failed_stop,
    run_hook,
    run_hook_async,
)
from outbox.surroundings import Surroundings

__all__ = ["InlineHooks"]


class InlineHooks:
    """A runner of hooks in its caller's thread.

    Coroutine functions run in an event loop that turns during the hooks alone: the handlers of a
    subprocess are plain functions.
    """

    def __init__(self, hooks: Hooks, surroundings: Surroundings | None) -> None:
        """Create the runner."""
        self._hooks = hooks
        self._surroundings = surroundings
        self._runner = asyncio.Runner() if hooks.need_loop else None

    def start(self) -> None:
        """Run the start hooks, in order.

        Raises:
            HookFailed: one has failed; what it raised is logged.
        """
        if self._hooks:
            begin_state()
        for hook in self._hooks.start:
            try:
                self._run(hook)
            except BaseException as error:
                raise failed_start(hook, error) from error

    def stop(self) -> None:
        """Run the stop hooks, the last one first; what they raise is logged."""
        for hook in reversed(self._hooks.stop):
            try:
                self._run(hook)
            except BaseException:
                log_failed_stop(hook)
        if self._runner is not None:
            self._runner.close()

    def _run(self, hook: Hook) -> None:
        if self._runner is not None and inspect.iscoroutinefunction(hook):
            self._runner.run(run_hook_async(hook, self._surroundings))
        else:
            run_hook(hook, self._surroundings)
