"""A worker process, as its parent knows it."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence

from outbox.consumers.command import child_process

__all__ = ["WorkerProcess"]


class WorkerProcess:
    """One process, from its start to its end. Used by one thread.

    Attributes:
        place: the number of its place, from 1; those that follow it have the same.
        ready: whether it has told that it consumes.
        kill_at: on the monotonic clock, when it is ended by force; None unless it stops.
    """

    def __init__(
        self, place: int, command: Sequence[str], lifeline: int, *, with_input: bool
    ) -> None:
        """Start ``command`` in an interpreter of its own.

        A fresh one: a fork would take over what the parent's threads hold and what its libraries
        have open, and on macOS ends in a crash.

        Args:
            place: the number of its place.
            command: the program and its arguments, the same for all.
            lifeline: the descriptor that ends when the parent does.
            with_input: whether it gets the parent's standard input, for a debugger.

        Raises:
            OSError: it cannot be started.
        """
        self.place = place
        self.ready = False
        self.kill_at: float | None = None
        self._status, status = os.pipe()
        os.set_blocking(self._status, False)
        self._began = time.monotonic()
        try:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **child_process.environment(lifeline, status)},
                pass_fds=(lifeline, status),
                stdin=None if with_input else subprocess.DEVNULL,
            )
        except BaseException:
            self.close()
            raise
        finally:
            os.close(status)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    @property
    def age(self) -> float:
        """The seconds since its start."""
        return time.monotonic() - self._began

    @property
    def status(self) -> int | None:
        """The descriptor that is readable when it tells something; None when it never will."""
        return self._status if self._status >= 0 else None

    def listen(self, grace: float) -> None:
        """Take note of what it tells; when it stops by itself it has ``grace`` seconds."""
        if self._status < 0:
            return
        try:
            told = os.read(self._status, 64)
        except BlockingIOError:
            return
        if not told:
            self.close()
        self.ready |= child_process.READY in told
        if child_process.STOPPING in told:
            self._leave(grace)

    def terminate(self, grace: float) -> None:
        """Ask it to end within ``grace`` seconds; no second time."""
        if self.kill_at is None:
            self._leave(grace)
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()

    def code(self) -> int | None:
        """Return what it has exited with, a signal's number as a negative one, or None."""
        return self._process.poll()

    def wait(self) -> None:
        """Wait for the end of a process that was killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

    def close(self) -> None:
        """Listen no more."""
        if self._status >= 0:
            os.close(self._status)
            self._status = -1

    def _leave(self, grace: float) -> None:
        if self.kill_at is None:
            self.kill_at = time.monotonic() + grace

    def __str__(self) -> str:
        return f"worker {self.place} (process {self.pid})"
