"""A place for one process at a time, and what its processes have come to."""

from __future__ import annotations

from outbox.service.health.policy import RestartBound
from outbox.service.health.restarts import Restarts
from outbox.service.worker_process import WorkerProcess

__all__ = ["Slot"]

_FAILED_IN_A_ROW = 3
_LINE_EVERY = 60.0
"""Seconds between two log lines on the deaths of a slot whose processes die again and again."""
_HEALTHY = 120.0
"""Seconds that a process must live for an earlier stuck one to be forgotten."""


class Slot:
    """A slot for one process at a time. Reads no clock.

    Attributes:
        number: its number, from 1.
        restarts: the delays before its next process.
        due: the time on the monotonic clock at which a missing process is started.
        worker: its process; None while there is none.
        started: the number of processes that were started in it.
        failed_starts: the attempts in a row to start one that have failed.
        trouble: how its last process has ended, until one is ready; empty for in no other way than
            it should.
    """

    def __init__(self, number: int) -> None:
        """Create an empty slot."""
        self.number = number
        self.restarts = Restarts()
        self.due = 0.0
        self.worker: WorkerProcess | None = None
        self.started = 0
        self.failed_starts = 0
        self.trouble = ""
        self._proven = False
        self._unready = 0
        self._unready_since = 0.0
        self._stuck = 0
        self._line_at = 0.0
        self._unlogged = 0

    @property
    def is_ready(self) -> bool:
        """Whether its process is ready, and goes on."""
        worker = self.worker
        return worker is not None and worker.ready and not (worker.leaving or worker.stuck)

    def code_replaced(self) -> None:
        """Note that from now on, its processes run other code."""
        self.due = 0.0
        self._proven = False
        self._unready = 0
        self._line_at = 0.0

    def became_ready(self) -> None:
        """Note that a process of it is ready."""
        self.trouble = ""
        self._proven = True
        self._unready = 0

    def never_ready(self, now: float, bound: RestartBound | None) -> bool:
        """Count a process that has ended without being ready; return whether to give up.

        A slot whose present code was ready once is never given up: what ends its processes may be
        one message, or something outside that comes back.
        """
        if self._proven:
            return False
        if not self._unready:
            self._unready_since = now
        self._unready += 1
        return (
            bound is not None
            and self._unready >= bound.deaths
            and now - self._unready_since >= bound.seconds
        )

    def is_hushed(self, now: float) -> bool:
        """Return whether its deaths repeat, and have had their line of this minute."""
        return now < self._line_at

    def note_death(self, now: float) -> int:
        """Note that a process has died; return how many others have since the last log line.

        If the slot is hushed, there is no line, else there is one now.
        """
        if self.is_hushed(now):
            self._unlogged += 1
            return 0
        if self._proven and self.restarts.repeated:
            self._line_at = now + _LINE_EVERY
        unlogged, self._unlogged = self._unlogged, 0
        return unlogged

    def was_stuck(self, lived: float) -> None:
        """Count a process that was killed because it was stuck, after ``lived`` seconds."""
        self._stuck = 1 if lived >= _HEALTHY else self._stuck + 1

    def look(self) -> None:
        """Forget stuck processes once the present one has lived for a while."""
        if self._stuck and self.worker is not None and self.worker.age >= _HEALTHY:
            self._stuck = 0

    @property
    def is_beyond_mending(self) -> bool:
        """Whether its last processes were stuck, or could not be started, one after the other."""
        return max(self._stuck, self.failed_starts) >= _FAILED_IN_A_ROW
