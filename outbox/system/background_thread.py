"""A daemon thread that callers start without waiting for it."""

from __future__ import annotations

import _thread
import contextlib
import logging
import queue
import sys
import threading
import time
from collections.abc import Callable

from outbox.errors import UsageError
from outbox.system import threads
from outbox.system.fork_pause import Pause

__all__ = ["STARTS_NONE_AT_EXIT", "BackgroundThread", "let_start"]

logger = logging.getLogger("outbox")

_MOMENT = 0.1  # seconds
_PATIENCE = 1.0
"""Seconds until a start is tried again that hasn't happened."""

STARTS_NONE_AT_EXIT = sys.version_info[:2] == (3, 12)
"""Whether Python starts no thread any more once it has begun to exit, before any exit hook."""


def let_start(is_started: Callable[[], bool]) -> None:
    """Give a thread that starts another one a moment, if Python may exit next and refuse that."""
    if STARTS_NONE_AT_EXIT:
        deadline = time.monotonic() + _MOMENT
        while not is_started() and time.monotonic() < deadline:
            time.sleep(0.0005)


class BackgroundThread:
    """A daemon thread, started once. Thread-safe, also in signal handlers and finalizers.

    ``threading.Thread.start()`` waits for the new thread, and a signal handler that raises during
    that wait may leave a lock taken for which the new thread then waits forever. So another thread,
    which no signal handler can interrupt, does the starting.

    Attributes:
        started: whether it has been started.
        ended: whether it has ended.
        ident: its identifier while it runs, else 0.
        pause: where it pauses for forks, while it runs.
    """

    pause: Pause

    def __init__(self, prepare: Callable[[], None], run: Callable[[], None], *, name: str) -> None:
        """Create the thread, without starting it.

        Args:
            prepare: a function called once, before the thread is started.
            run: the function that the thread runs.
            name: the name of the thread.
        """
        self._prepare = prepare
        self._run = run
        self._name = name
        self._starting = threading.RLock()
        self._asked_at = -_PATIENCE
        self.ident = 0
        self._waiters: list[_thread.LockType] = []
        self._cancelled = False
        self.started = False
        self.ended = False

    def start(self) -> None:
        """Have the thread started soon, unless that has been done or cancelled.

        Raises:
            UsageError: a thread can't work in this process, or must not be started yet.
            RuntimeError: the system has no more threads.
        """
        if self.started or self._cancelled or time.monotonic() - self._asked_at < _PATIENCE:
            return
        threads.check_start()
        try:
            _thread.start_new_thread(self._start, ())
        except RuntimeError as error:
            if "shutdown" not in str(error):
                raise
            raise UsageError(
                "Python starts no thread while it exits: call publisher.make_ready() before, when "
                "the application starts"
            ) from error
        self._asked_at = time.monotonic()
        let_start(lambda: self.started)

    def start_now(self) -> None:
        """Start the thread and wait until it runs, unless that has been done or cancelled.

        Raises:
            UsageError: a thread can't work in this process, or must not be started yet.
            RuntimeError: the system has no more threads.
            OSError: the system has no more file descriptors.
        """
        if not self.started:
            threads.check_start()
            self._start_once()

    def cancel(self) -> bool:
        """Prevent a later start; return whether there was none yet."""
        with self._starting:
            self._cancelled = True
            return not self.started

    def join(self, timeout: float) -> bool:
        """Wait at most ``timeout`` seconds for its end; return whether it has ended."""
        waiter = _thread.allocate_lock()
        waiter.acquire()
        self._waiters.append(waiter)
        if not self.ended:
            waiter.acquire(timeout=timeout)
        return self.ended

    def wait_for(self, bell: queue.SimpleQueue[None], timeout: float | None) -> None:
        """Wait, on the thread itself, until ``bell`` rings; take all that it has rung.

        Args:
            bell: the queue into which others put None if there is something to do.
            timeout: the seconds to wait at most, or None.
        """
        with self.pause, contextlib.suppress(queue.Empty):
            bell.get(timeout=timeout)
            while True:
                bell.get_nowait()

    def _start(self) -> None:
        try:
            self._start_once()
        except Exception:
            logger.exception("cannot start the thread %s; trying again soon", self._name)

    def _start_once(self) -> None:
        with self._starting:
            if not self.started and not self._cancelled:
                self._prepare()
                threading.Thread(target=self._run_and_note, name=self._name, daemon=True).start()
                self.started = True

    def _run_and_note(self) -> None:
        self.ident = threading.get_ident()
        self.pause = Pause()
        try:
            self._run()
        finally:
            self.pause.end()
            self.ident = 0
            self.ended = True
            while self._waiters:
                self._waiters.pop().release()
