"""The parent of worker or relay processes: starts, replaces and stops them, and does nothing else.

It doesn't import the application or open connections: whatever kills a worker can't kill it.
"""

from __future__ import annotations

import logging
import math
import select
import signal
import time
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from outbox import exit_codes
from outbox.service.counts import add
from outbox.service.restarts import Restarts
from outbox.service.signal_queue import SignalQueue
from outbox.service.state import Face, Phase, ServiceState
from outbox.service.supervised import MARGIN
from outbox.service.worker_process import Keeper, WorkerProcess
from outbox.system.signals import BURST

__all__ = ["Supervisor"]

_CHECK_EVERY = 5.0
"""Seconds, at most, between checks of the workers, even if nothing wakes it."""
_SHOW_EVERY = 0.2
"""Seconds, at most, between two turns of the faces."""
_LOAD_LIMIT = 300.0
"""Seconds for a successor to import the application: enough for one that loads large models."""
_NAMED = 10
"""Messages, at most, that the log names when a worker has died."""
_END_TIMEOUT = 5.0
"""Seconds to wait for the exit of a killed process."""


class _Slot:
    """A slot for one worker process at a time."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.restarts = Restarts()
        self.due = 0.0
        self.worker: WorkerProcess | None = None
        self.started = 0
        self.trouble = ""
        """Why its last process has ended, until one is ready."""


class Supervisor:
    """Keeps a number of worker processes running until a signal stops them.

    - A worker that dies is replaced, after a back-off that grows while its successors die early.
    - A worker that leaves, because it has reached a limit, is replaced at once. It exits when what
      runs has ended, however long that takes; but only one at a time leaves each slot.
    - A worker that exits with ``USAGE`` before any has consumed stops all: a successor would fail
      in the same way. Later, something outside has changed, and is expected to change again.
    - Until a worker has consumed, only one is started at a time.
    - SIGTERM and SIGINT stop all workers gracefully; a second one, a second or more later, kills
      them. SIGHUP replaces them one by one, each once its successor consumes, or, if it means that
      the terminal was closed, stops all. A further SIGHUP begins anew, with the code of that time;
      a successor that hangs while it imports the application is killed, and the others stay.
    - A service that leaves begins nothing more, and ends when what runs has ended, however long
      that takes; SIGTERM and SIGINT turn that into a stop.
    - If the supervisor dies, however that happens, its workers stop gracefully.
    """

    def __init__(
        self,
        command: Sequence[str],
        processes: int,
        *,
        shutdown_timeout: float,
        margin: float = MARGIN,
        load_limit: float = _LOAD_LIMIT,
        keeper: Keeper | None = None,
        faces: Sequence[Face] = (),
        logger: logging.Logger | None = None,
        name: str = "worker",
    ) -> None:
        """Prepare to run ``processes`` processes of ``command``, without starting any.

        Args:
            command: the program of a worker, with its arguments.
            processes: the number of processes, 1 or more.
            shutdown_timeout: the seconds that a stopping worker gives its messages.
            margin: the seconds after that until a worker is killed.
            load_limit: the seconds that a worker's successor has to import the application.
            keeper: keeps what the workers have begun beyond their death; closed at the end.
            faces: what shows the service to the outside.
            logger: the log; the default is ``outbox.processes``.
            name: what the log calls a process.
        """
        self._command = list(command)
        self._grace = shutdown_timeout + margin
        self._load_limit = load_limit
        self._slots = [_Slot(number) for number in range(1, processes + 1)]
        self._workers: list[WorkerProcess] = []
        self._proven = False  # whether a worker has consumed: only then start all of them
        self._stopping = False
        self._stopping_since = 0.0
        self._code = exit_codes.SUCCESS
        self._to_replace: deque[_Slot] = deque()
        self._successor: WorkerProcess | None = None
        self._signals = SignalQueue()
        self._keeper = keeper
        self._faces = list(faces)
        self._logger = logger or logging.getLogger("outbox.processes")
        self._name = name
        self._leaving = False
        self._leave_by = math.inf
        self._was_ready = False
        self._restarts: Counter[str] = Counter()
        self._base: Any = None
        self.state = ServiceState(slots=processes)

    def run(self) -> int:
        """Run the workers until a signal stops them; return one of ``outbox.exit_codes``.

        Must be called on the main thread, once.
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
                for face in self._faces:
                    try:
                        face.close()
                    except Exception:
                        self._logger.exception("%r could not be closed", face)
                # If a bug has ended the loop, this stops the remaining workers gracefully.
                for worker in self._workers:
                    worker.close()
                if self._keeper is not None:
                    self._keeper.close()
        return self._code

    def leave(self, timeout: float | None = None) -> None:
        """Begin nothing more, and end when what runs has ended, under the handlers' own timeouts.

        Nothing that runs is interrupted, and no process is started any more. Only the first call
        has an effect, and only on the thread of ``run``, so from a face.

        Args:
            timeout: the seconds after which that becomes a stop; None for no limit.
        """
        if self._leaving or self._stopping:
            return
        self._leaving = True
        if timeout is not None:
            self._leave_by = time.monotonic() + timeout
        for worker in self._workers:
            worker.leave(self._grace)

    def stop(self, code: int = exit_codes.SUCCESS) -> None:
        """Stop all processes within the shutdown timeout, and end with ``code``.

        Only the first call has an effect, and only on the thread of ``run``, so from a face.
        """
        if not self._stopping:
            self._code = code
            self._stop()

    def _turn(self) -> bool:
        """Act on what has happened; return whether to go on."""
        for number in self._signals.take():
            self._on_signal(number)
        for worker in list(self._workers):
            worker.listen(self._grace)
            self._proven |= worker.ready
            code = worker.code()
            if code is not None:
                self._workers.remove(worker)
                worker.close()
                self._base = add(self._base, (worker.report or {}).get("counts"))
                self._on_end(worker, code, worker.take_messages(code))
            elif worker.kill_at is not None and time.monotonic() >= worker.kill_at:
                self._on_stuck(worker)
            elif not worker.loaded and worker.kill_at is None:
                self._check_loading(worker)
        if self._leaving and not self._stopping and time.monotonic() >= self._leave_by:
            self._logger.warning("what runs has not ended in time; stopping")
            self._stop()
        if not self._ending:
            self._relieve()
            self._fill()
            self._replace()
        self._show()
        return self._code != exit_codes.KILLED and bool(self._workers or not self._ending)

    @property
    def _ending(self) -> bool:
        """Whether no process is started any more."""
        return self._stopping or self._leaving

    def _show(self) -> None:
        """Make the state of this moment, and show it."""
        self.state = self._state()
        for face in list(self._faces):
            try:
                face.turn(self)
            except Exception:
                self._logger.exception("%r failed, and is not used any more", face)
                self._faces.remove(face)

    def _state(self) -> ServiceState:
        reasons = tuple(reason for slot in self._slots if (reason := self._reason(slot)))
        phase: Phase = "starting" if reasons else "ready"
        if self._stopping:
            phase, reasons = "stopping", ("stopping",)
        elif self._leaving:
            phase, reasons = "leaving", ("leaving",)
        return ServiceState(
            workers=tuple(worker.shown() for worker in self._workers),
            ready=not reasons,
            phase=phase,
            reasons=reasons,
            restarts=dict(self._restarts),
            base=self._base,
            slots=len(self._slots),
        )

    def _reason(self, slot: _Slot) -> str:
        """Return why a slot is not ready, or nothing."""
        worker = slot.worker
        if worker is not None and worker.ready:
            slot.trouble = ""
            return ""
        where = f"{self._name} {slot.number}"
        if worker is not None:
            return f"{where} is starting" + (f" ({slot.trouble})" if slot.trouble else "")
        return f"{where} is down" + (f" ({slot.trouble})" if slot.trouble else "")

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGHUP:
            if not self._ending:
                self._logger.info("received %s; replacing all workers, one by one", name)
                self._begin_to_replace()
        elif not self._stopping:
            self._logger.info("received %s; stopping", name)
            self._stop()
        elif time.monotonic() - self._stopping_since >= BURST:
            self._logger.warning("received %s while stopping; killing the workers", name)
            self._code = exit_codes.KILLED

    def _on_end(self, worker: WorkerProcess, code: int, lost: list[str]) -> None:
        slot = self._slots[worker.slot - 1]
        if lost:
            names = ", ".join(lost[:_NAMED]) + (", ..." if len(lost) > _NAMED else "")
            self._logger.warning("%s died while %d message(s) ran: %s", worker, len(lost), names)
        if self._ending:
            if code not in (exit_codes.SUCCESS, exit_codes.RECYCLED) and worker.ready:
                self._logger.warning("%s %s", worker, _describe(code))
                self._code = self._code or exit_codes.UNFINISHED
            return
        if worker is self._successor and not worker.ready:
            self._successor = None
            self._to_replace.clear()
            self._logger.error("%s %s; the other workers are not replaced", worker, _describe(code))
            return
        if slot.worker is not worker:
            if code not in (exit_codes.SUCCESS, exit_codes.RECYCLED):
                self._logger.warning("%s %s", worker, _describe(code))
            return
        slot.worker = None
        slot.trouble = f"the last one {_describe(code)}"
        if code == exit_codes.USAGE and not self._proven:
            self._logger.error("%s %s, as any other would; stopping", worker, _describe(code))
            self._code = exit_codes.USAGE
            self._stop()
        elif code == exit_codes.RECYCLED:
            self._logger.info("%s %s; starting another", worker, _describe(code))
            self._restarts["limit"] += 1
            slot.due = 0.0
        else:
            what = f"{worker} {_describe(code)} after {worker.age:.1f} s"
            is_error = code == exit_codes.USAGE
            self._restarts["died"] += 1
            self._back_off(slot, what, worker.age, is_error=is_error, has_lost=bool(lost))

    def _on_stuck(self, worker: WorkerProcess) -> None:
        self._logger.error("%s did not exit in time; killing it", worker)
        worker.kill_at = None
        worker.kill()

    def _check_loading(self, worker: WorkerProcess) -> None:
        """Notice a worker whose import of the application hangs."""
        if worker is self._successor and worker.age >= self._load_limit:
            self._logger.error(
                "%s did not import the application within %.0f s; killing it; the other workers "
                "are not replaced",
                worker,
                self._load_limit,
            )
            self._successor = None
            self._to_replace.clear()
            worker.kill()
        elif worker.is_slow():
            self._logger.warning(
                "%s is still importing the application after %.0f s", worker, worker.age
            )

    def _begin_to_replace(self) -> None:
        """Begin, or begin anew, to replace all workers by ones with the code of this time."""
        successor, self._successor = self._successor, None
        if successor is not None:
            successor.terminate(self._grace)
        self._to_replace = deque(self._slots)
        for slot in self._slots:
            slot.due = 0.0

    def _relieve(self) -> None:
        """Free the slots of leaving workers for their successors."""
        for slot in self._slots:
            worker = slot.worker
            if worker is None or not worker.leaving:
                continue
            if not any(other.slot == slot.number for other in self._workers if other is not worker):
                self._logger.info("%s is leaving; starting another", worker)
                self._restarts["limit"] += 1
                slot.worker = None
                slot.due = 0.0

    def _fill(self) -> None:
        """Start the workers that are missing and due."""
        now = time.monotonic()
        for slot in self._slots if self._proven else self._slots[:1]:
            successor = self._successor
            if slot.worker is None and successor is not None and successor.slot == slot.number:
                slot.worker, self._successor = successor, None
            if slot.worker is None and slot.due <= now:
                slot.worker = self._start(slot)

    def _replace(self) -> None:
        """Go on replacing workers: one at a time, each once its successor consumes."""
        successor = self._successor
        if successor is not None:
            if not successor.ready:
                return
            slot = self._slots[successor.slot - 1]
            predecessor, slot.worker, self._successor = slot.worker, successor, None
            if predecessor is not None:
                self._restarts["asked"] += 1
                predecessor.leave(self._grace)
        while self._to_replace and self._successor is None:
            slot = self._to_replace.popleft()
            if slot.worker is not None:  # otherwise _fill() starts a new one in any case
                self._successor = self._start(slot)

    def _start(self, slot: _Slot) -> WorkerProcess | None:
        try:
            worker = WorkerProcess(
                slot.number,
                self._command,
                self._keeper,
                with_input=len(self._slots) == 1,
                name=self._name,
                restarts=slot.started,
            )
        except OSError as error:
            slot.trouble = f"it cannot be started: {error}"
            self._back_off(slot, f"{self._name} {slot.number} cannot be started: {error}", 0.0)
            return None
        slot.started += 1
        self._logger.info("%s started", worker)
        self._workers.append(worker)
        return worker

    def _back_off(
        self,
        slot: _Slot,
        what: str,
        lived: float,
        *,
        is_error: bool = False,
        has_lost: bool = False,
    ) -> None:
        restarts = slot.restarts
        wait = restarts.died_with_messages(lived) if has_lost else restarts.died(lived)
        slot.due = time.monotonic() + wait
        if restarts.looping and not has_lost:
            what = f"{what} ({restarts.in_a_row} in a row)"
            is_error = True
        level = logging.ERROR if is_error else logging.WARNING
        self._logger.log(level, "%s; starting another in %.1f s", what, wait)

    def _stop(self) -> None:
        self._stopping = True
        self._stopping_since = time.monotonic()
        for worker in self._workers:
            worker.terminate(self._grace)

    def _wait(self) -> None:
        """Wait for a signal, a worker's report or end, or the next time that something is due."""
        now = time.monotonic()
        times = [worker.kill_at for worker in self._workers if worker.kill_at is not None]
        if self._leaving and not self._stopping:
            times.append(self._leave_by)
        if not self._ending:
            slots = self._slots if self._proven else self._slots[:1]
            times += [slot.due for slot in slots if slot.worker is None]
        at_most = _SHOW_EVERY if self._faces else _CHECK_EVERY
        pause = min([at_most, *(moment - now for moment in times)])
        statuses = [worker.status for worker in self._workers if worker.status is not None]
        select.select([self._signals.fileno(), *statuses], [], [], max(0.0, pause))
        self._signals.clear_wake_up()


def _describe(code: int) -> str:
    """Describe ``code`` as a predicate, to follow the name of a process."""
    if code < 0:
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"was killed by signal {-code}"
    meanings = {
        exit_codes.USAGE: "ended with exit code 2 (wrong usage)",
        exit_codes.RECYCLED: "asked to be replaced",
    }
    return meanings.get(code, f"ended with exit code {code}")
