"""The parent of worker processes: starts, replaces and stops them, and does nothing else.

It imports nothing of the application and opens no connection, so that nothing which happens to a
worker can happen to it.
"""

from __future__ import annotations

import logging
import select
import signal
import time
from collections import deque
from collections.abc import Sequence

from outbox import exit_codes
from outbox.consumers.command.restarts import Restarts
from outbox.consumers.command.signal_queue import SignalQueue
from outbox.consumers.command.supervised_worker import MARGIN
from outbox.consumers.command.worker_process import WorkerProcess

__all__ = ["Supervisor"]

logger = logging.getLogger("outbox.consumer.processes")

_LOOK_EVERY = 5.0
"""Seconds after which it looks around though nothing has told it to."""
_END_TIMEOUT = 5.0
"""Seconds to wait for the end of a process that was killed."""


class _Place:
    """Where one worker process works, and after its end another."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.restarts = Restarts()
        self.due = 0.0
        self.worker: WorkerProcess | None = None


class Supervisor:
    """Keeps a number of worker processes running until it is told to stop.

    - One that dies is replaced, after a back-off that grows while its successors die young.
    - One that exits with ``RECYCLED`` is replaced at once.
    - One that exits with ``USAGE`` ends all: a successor would fail alike.
    - Until one has come so far as to consume, only one is tried.
    - SIGTERM and SIGINT stop all in order, a second one at once. SIGHUP replaces all, one by one,
      each when its successor consumes; from a terminal, which sends it when it is closed, it
      stops all.
    - When it dies itself, however, its workers stop in order.
    """

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        *,
        shutdown_timeout: float,
        margin: float = MARGIN,
    ) -> None:
        """Look after ``processes`` processes that run ``command``; none is started yet.

        Args:
            command: the program of a worker, with its arguments.
            processes: how many, 1 or more.
            shutdown_timeout: seconds that a worker gives its messages at the end.
            margin: seconds beyond them after which a worker is killed.
        """
        self._command = list(command)
        self._grace = shutdown_timeout + margin
        self._places = [_Place(number) for number in range(1, processes + 1)]
        self._workers: list[WorkerProcess] = []
        self._proven = False
        self._stopping = False
        self._code = exit_codes.SUCCESS
        self._to_replace: deque[_Place] = deque()
        self._successor: WorkerProcess | None = None
        self._signals = SignalQueue()

    def run(self) -> int:
        """Look after the workers; return one of ``outbox.exit_codes``.

        To be called by the main thread, once.
        """
        with self._signals.open():
            try:
                while self._turn():
                    self._wait()
                for worker in self._workers:  # after a second signal
                    worker.kill()
                for worker in self._workers:
                    worker.wait(_END_TIMEOUT)
            finally:
                # Workers that still run, after a bug in here, stop in order.
                for worker in self._workers:
                    worker.close()
        return self._code

    # ------------------------------------------------------------------------ what happens

    def _turn(self) -> bool:
        """Do what there is to do; return whether there will be more."""
        for number in self._signals.take():
            self._on_signal(number)
        for worker in list(self._workers):
            worker.listen(self._grace)
            self._proven |= worker.ready
            code = worker.code()
            if code is not None:
                self._workers.remove(worker)
                worker.close()
                self._on_end(worker, code)
            elif worker.kill_at is not None and time.monotonic() >= worker.kill_at:
                self._on_stuck(worker)
        if not self._stopping:
            self._fill()
            self._replace()
        return self._code != exit_codes.KILLED and bool(self._workers or not self._stopping)

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            if not self._stopping:
                logger.info("%s: replacing all workers, one by one", name)
                self._to_replace = deque(self._places)
        elif not self._stopping:
            logger.info("%s: stopping", name)
            self._stop()
        else:
            logger.warning("%s, again: stopping at once", name)
            self._code = exit_codes.KILLED

    def _on_end(self, worker: WorkerProcess, code: int) -> None:
        place = self._places[worker.place - 1]
        if self._stopping:
            if code not in (exit_codes.SUCCESS, exit_codes.RECYCLED) and worker.ready:
                logger.warning("%s %s", worker, _told(code))
                self._code = self._code or exit_codes.UNFINISHED
            return
        if worker is self._successor and not worker.ready:
            self._successor = None
            self._to_replace.clear()
            logger.error("%s %s: the other workers are not replaced", worker, _told(code))
            return
        if place.worker is not worker:
            if code != exit_codes.SUCCESS:
                logger.warning("%s %s", worker, _told(code))
            return
        place.worker = None
        if code == exit_codes.USAGE:
            logger.error("%s %s, which another would do as well: stopping", worker, _told(code))
            self._code = exit_codes.USAGE
            self._stop()
        elif code == exit_codes.RECYCLED:
            logger.info("%s %s: another takes its place", worker, _told(code))
            place.due = 0.0
        else:
            self._back_off(place, f"{worker} {_told(code)} after {worker.age:.1f} s", worker.age)

    def _on_stuck(self, worker: WorkerProcess) -> None:
        logger.error("%s has not ended in time: it is killed", worker)
        worker.kill_at = None
        worker.kill()

    # ------------------------------------------------------------------------ what is done

    def _fill(self) -> None:
        """Start what is missing and due."""
        now = time.monotonic()
        for place in self._places if self._proven else self._places[:1]:
            successor = self._successor
            if place.worker is None and successor is not None and successor.place == place.number:
                place.worker, self._successor = successor, None
            if place.worker is None and place.due <= now:
                place.worker = self._start(place)

    def _replace(self) -> None:
        """Go on with replacing workers by others: one at a time, each when the other consumes."""
        successor = self._successor
        if successor is not None:
            if not successor.ready:
                return
            place = self._places[successor.place - 1]
            before, place.worker, self._successor = place.worker, successor, None
            if before is not None:
                before.terminate(self._grace)
        while self._to_replace and self._successor is None:
            place = self._to_replace.popleft()
            if place.worker is not None:  # otherwise a new one is about to come anyway
                self._successor = self._start(place)

    def _start(self, place: _Place) -> WorkerProcess | None:
        try:
            worker = WorkerProcess(place.number, self._command, with_input=len(self._places) == 1)
        except OSError as error:
            self._back_off(place, f"worker {place.number} cannot be started: {error}", 0.0)
            return None
        logger.info("%s begins", worker)
        self._workers.append(worker)
        return worker

    def _back_off(self, place: _Place, what: str, lived: float) -> None:
        wait = place.restarts.died(lived)
        place.due = time.monotonic() + wait
        if place.restarts.looping:
            count = place.restarts.in_a_row
            logger.error("%s, number %d in a row: another in %.1f s", what, count, wait)
        else:
            logger.warning("%s: another in %.1f s", what, wait)

    def _stop(self) -> None:
        self._stopping = True
        for worker in self._workers:
            worker.terminate(self._grace)

    # ------------------------------------------------------------------------ waiting

    def _wait(self) -> None:
        """Wait for a signal, a worker that tells something or ends, or the time to do something."""
        now = time.monotonic()
        times = [worker.kill_at for worker in self._workers if worker.kill_at is not None]
        if not self._stopping:
            places = self._places if self._proven else self._places[:1]
            times += [place.due for place in places if place.worker is None]
        pause = min([_LOOK_EVERY, *(moment - now for moment in times)])
        told = [worker.status for worker in self._workers if worker.status is not None]
        select.select([self._signals.fileno(), *told], [], [], max(0.0, pause))
        self._signals.clear_wake_up()


def _told(code: int) -> str:
    """Return what ``code`` says, to follow the name of a process."""
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    meanings = {
        exit_codes.USAGE: "ended with exit code 2 (wrong usage)",
        exit_codes.RECYCLED: "has done enough",
    }
    return meanings.get(code, f"ended with exit code {code}")
