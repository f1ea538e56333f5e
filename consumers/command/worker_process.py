"""A worker process, as seen by its supervisor."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Sequence

from outbox.consumers.command.supervised_worker import (
    LOADED,
    READY,
    RETIRE,
    RETIRING,
    STOPPING,
)
from outbox.consumers.losses.begun_keeper import BegunKeeper
from outbox.system.child_process import ChildProcess

__all__ = ["WorkerProcess"]


_SLOW = 60.0
"""Seconds between two warnings that a process is still importing the application."""


class WorkerProcess(ChildProcess):
    """One process, from start to exit. Used by one thread.

    Attributes:
        slot: the number of its slot, from 1; its successors have the same.
        loaded: whether it has reported that it has imported the application, or waits for changes.
        ready: whether it has reported that it consumes.
        retiring: whether it has reported that it begins nothing more, and needs a successor.
        kill_at: the time on the monotonic clock at which to kill it; None unless it is stopping.
    """

    def __init__(
        self, slot: int, command: Sequence[str], keeper: BegunKeeper | None, *, with_input: bool
    ) -> None:
        """Start ``command`` in the slot with this number.

        Args:
            slot: the number of the slot.
            command: the program and its arguments.
            keeper: keeps the table of begun messages; None if there is none.
            with_input: whether the process gets the parent's standard input.

        Raises:
            OSError: the command cannot be started.
        """
        self.slot = slot
        self.loaded = False
        self.ready = False
        self.retiring = False
        self.kill_at: float | None = None
        self._began = time.monotonic()
        self._slow_at = _SLOW
        self._status, status = os.pipe()
        os.set_blocking(self._status, False)
        self._keeper = keeper
        self._region = None if keeper is None else keeper.take()
        try:
            if keeper is None or self._region is None:
                super().__init__(command, status, with_input=with_input)
            else:
                super().__init__(
                    command,
                    status,
                    with_input=with_input,
                    shared=[keeper.descriptor],
                    variables=keeper.variables(self._region),
                )
        except BaseException:
            self.take_messages(0)
            raise

    @property
    def age(self) -> float:
        """The seconds since it was started."""
        return time.monotonic() - self._began

    @property
    def status(self) -> int | None:
        """The descriptor that becomes readable when it reports something; None once it can't."""
        return self._status if self._status >= 0 else None

    def listen(self, grace: float) -> None:
        """Read its reports; once it has begun to stop, it has ``grace`` seconds."""
        if self._status < 0:
            return
        try:
            reported = os.read(self._status, 64)
        except BlockingIOError:
            return
        if not reported:
            self._stop_listening()
        self.ready |= READY in reported
        self.loaded |= LOADED in reported or self.ready
        self.retiring |= RETIRING in reported
        if STOPPING in reported:
            self._set_deadline(grace)

    def is_slow(self) -> bool:
        """Return whether another minute has gone by without the application being imported."""
        if self.loaded or self.age < self._slow_at:
            return False
        self._slow_at += _SLOW
        return True

    def retire(self) -> None:
        """Ask it to begin nothing more, and to exit when what runs has ended."""
        self.say(RETIRE)

    def terminate(self, grace: float) -> None:
        """Ask it to exit within ``grace`` seconds; only the first call has an effect."""
        if self.kill_at is None:
            self._set_deadline(grace)
            self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Kill it; the messages that run in it lose nothing by that."""
        if self._keeper is not None and self._region is not None:
            self._keeper.spare(self._region)
        super().kill()

    def take_messages(self, code: int) -> list[str]:
        """Return the messages that ran in it when it ended with ``code``, for people to read.

        Each has lost an attempt. Only the first call returns them.
        """
        region, self._region = self._region, None
        if self._keeper is None or region is None:
            return []
        return self._keeper.free(region, code)

    def close(self) -> None:
        """Close both pipes; if the process still runs, it stops."""
        self._stop_listening()
        super().close()

    def _stop_listening(self) -> None:
        if self._status >= 0:
            os.close(self._status)
            self._status = -1

    def _set_deadline(self, grace: float) -> None:
        if self.kill_at is None:
            self.kill_at = time.monotonic() + grace

    def __str__(self) -> str:
        return f"worker {self.slot} (process {self.pid})"
