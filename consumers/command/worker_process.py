"""A worker process, as its supervisor knows it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from outbox.consumers.command.supervised_worker import READY, STOPPING
from outbox.system.child_process import ChildProcess

__all__ = ["WorkerProcess"]


class WorkerProcess(ChildProcess):
    """One process, from its start to its end. Used by one thread.

    Attributes:
        place: the number of its place, from 1; those that follow it have the same.
        ready: whether it has reported that it consumes.
        kill_at: on the monotonic clock, when it is ended by force; None unless it stops.
    """

    def __init__(self, place: int, command: Sequence[str], *, with_input: bool) -> None:
        """Start ``command``, the same for all, in the place of this number.

        Raises:
            OSError: it cannot be started.
        """
        self.place = place
        self.ready = False
        self.kill_at: float | None = None
        self._began = time.monotonic()
        self._status, status = os.pipe()
        os.set_blocking(self._status, False)
        super().__init__(command, status, with_input=with_input)

    @property
    def age(self) -> float:
        """The seconds since its start."""
        return time.monotonic() - self._began

    @property
    def status(self) -> int | None:
        """The descriptor that is readable when it reports something; None when it never will."""
        return self._status if self._status >= 0 else None

    def listen(self, grace: float) -> None:
        """Take note of what it reports; when it stops by itself it has ``grace`` seconds."""
        if self._status < 0:
            return
        try:
            reported = os.read(self._status, 64)
        except BlockingIOError:
            return
        if not reported:
            self._stop_listening()
        self.ready |= READY in reported
        if STOPPING in reported:
            self._leave(grace)

    def terminate(self, grace: float) -> None:
        """Ask it to end within ``grace`` seconds; no second time."""
        if self.kill_at is None:
            self._leave(grace)
            self._process.send_signal(signal.SIGTERM)

    def close(self) -> None:
        """Let go of it, and listen no more."""
        self._stop_listening()
        super().close()

    def _stop_listening(self) -> None:
        if self._status >= 0:
            os.close(self._status)
            self._status = -1

    def _leave(self, grace: float) -> None:
        if self.kill_at is None:
            self.kill_at = time.monotonic() + grace

    def __str__(self) -> str:
        return f"worker {self.place} (process {self.pid})"
