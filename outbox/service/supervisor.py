"""The parent of worker or relay processes: starts, replaces and stops them, and does nothing else.

It doesn't import the application or open connections: whatever kills a worker can't kill it.
"""

from __future__ import annotations

import logging
import math
import signal
import time
from collections import Counter, deque
from collections.abc import Sequence

from outbox import exit_codes
from outbox.service.health.policy import Policy
from outbox.service.readable import wait_readable
from outbox.service.signal_queue import SignalQueue
from outbox.service.slot import Slot
from outbox.service.state import Face, Phase, ServiceState
from outbox.service.supervised import MARGIN
from outbox.service.worker_process import Keeper, WorkerProcess
from outbox.system.signals import BURST
from outbox.telemetry import metrics

__all__ = ["Supervisor"]

_CHECK_EVERY = 5.0
"""Seconds, at most, between checks of the workers, even if nothing wakes it."""
_SHOW_EVERY = 0.2
"""Seconds, at most, between two turns of the faces."""
_JUDGE_EVERY = 1.0
"""Seconds, at most, between two looks at whether a worker is stuck."""
_STACKS_WITHIN = 4.0
"""Seconds for the stacks of a stuck worker to be written, before it is killed."""
_LOAD_LIMIT = 300.0
"""Seconds for a successor to import the application: enough for one that loads large models."""
_NAMED = 10
"""Messages, at most, that the log names when a worker has died."""
_END_TIMEOUT = 5.0
"""Seconds to wait for the exit of a killed process."""


class Supervisor:
    """Keeps a number of worker processes running until a signal stops them.

    - A worker that dies is replaced, after a back-off that grows while its successors die early.
    - A worker that leaves, because it has reached a limit, is replaced at once. It exits when what
      runs has ended, however long that takes; but only one at a time leaves each slot.
    - A worker that is stuck is killed and replaced; the messages that run in it count a loss.
    - Of a worker whose successors die again and again the log has a line each minute.
    - A service none of whose workers was ever ready since its code was last replaced is given up
      when enough of them have died. One that was ready is never given up.
    - A worker that exits with ``USAGE`` before any has consumed stops all: a successor would fail
      in the same way. Later, something outside has changed, and is expected to change again.
    - Until a worker has consumed, only one is started at a time.
    - SIGTERM and SIGINT stop all workers gracefully; a second one, a second or more later, kills
      them. SIGHUP replaces them one by one, each once its successor consumes, or, if it means that
      the terminal was closed, stops all. A further SIGHUP begins anew, with the code of that time;
      a successor that hangs while it imports the application is killed, and the others stay.
    - SIGTSTP, unless it comes from a terminal, has all workers begin nothing more, and stay.
      SIGUSR1 has them dump their stacks.
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
        folder: str | None = None,
        margin: float = MARGIN,
        load_limit: float = _LOAD_LIMIT,
        policy: Policy | None = None,
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
            folder: the working directory of the workers, by a link that may lead elsewhere when a
                later one is started; by default the parent's.
            margin: the seconds after that until a worker is killed.
            load_limit: the seconds that a worker's successor has to import the application.
            policy: what to put up with from the workers.
            keeper: keeps what the workers have begun beyond their death; closed at the end.
            faces: what shows the service to the outside.
            logger: the log; the default is ``outbox.processes``.
            name: what the log calls a process.
        """
        self._command = list(command)
        self._folder = folder
        self._grace = shutdown_timeout + margin
        self._load_limit = load_limit
        self._slots = [Slot(number) for number in range(1, processes + 1)]
        self._workers: list[WorkerProcess] = []
        self._proven = False  # whether a worker has consumed: only then start all of them
        self._stopping = False
        self._stopping_since = 0.0
        self._code = exit_codes.SUCCESS
        self._to_replace: deque[Slot] = deque()
        self._successor: WorkerProcess | None = None
        self._signals = SignalQueue()
        self._policy = policy or Policy()
        self._retries = self._policy.retries
        self._given_up = False
        self._retry_at = 0.0
        self._quiet = False
        self._reloads = 0
        self._turned_at = time.monotonic()
        self._keeper = keeper
        self._faces = list(faces)
        self._logger = logger or logging.getLogger("outbox.processes")
        self._name = name
        self._leaving = False
        self._leave_by = math.inf
        self._restarts: Counter[str] = Counter()
        self._base: metrics.Snapshot | None = None
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

    def quiet(self) -> None:
        """Begin nothing more and start no process, but stay until a signal; it can't be undone.

        What runs goes on. Only on the thread of ``run``, so from a face.
        """
        if not (self._quiet or self._starts_none):
            self._quiet = True
            for worker in self._workers:
                worker.be_quiet(self._grace)

    def dump(self) -> None:
        """Have each process write its stacks, which appear in the log of this one.

        Only on the thread of ``run``, so from a face.
        """
        for worker in self._workers:
            worker.ask_for_stacks(time.monotonic())

    def _turn(self) -> bool:
        """Act on what has happened; return whether to go on."""
        now = time.monotonic()
        step, self._turned_at = now - self._turned_at, now
        for number in self._signals.take():
            self._on_signal(number)
        for worker in list(self._workers):
            was_ready = worker.ready
            code = worker.code()  # before it is listened to: then nothing comes after that
            worker.listen(self._grace)
            if worker.ready and not was_ready:
                self._on_ready(worker)
            self._log_stacks(worker, now)
            if code is not None:
                self._workers.remove(worker)
                self._log_stacks(worker, math.inf)
                worker.close()
                counts = (worker.report or {}).get("counts")
                if isinstance(counts, dict):
                    self._base = metrics.merge(self._base or {}, [counts])
                self._on_end(worker, code, worker.take_messages(code))
            elif worker.kill_at is not None:
                if time.monotonic() >= worker.kill_at:
                    self._on_overdue(worker)
            elif not worker.loaded:
                self._check_loading(worker)
            else:
                worker.judge.step(step)
                self._check_stuck(worker, now)
                self._check_cpu(worker, now)
        if self._leaving and not self._stopping and now >= self._leave_by:
            self._logger.warning("what runs has not ended in time; stopping")
            self._stop()
        if not self._starts_none:
            self._relieve()
            self._fill()
            self._replace()
        for slot in self._slots:
            slot.look()
        self._show()
        ends = self._stopping or self._leaving
        return self._code != exit_codes.KILLED and bool(self._workers or not ends)

    @property
    def _starts_none(self) -> bool:
        """Whether no process is started any more."""
        return self._stopping or self._leaving or self._quiet

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
        phase: Phase = "ready" if all(slot.is_ready for slot in self._slots) else "starting"
        if self._stopping:
            phase, reasons = "stopping", ("stopping",)
        elif self._leaving:
            phase, reasons = "leaving", ("leaving",)
        elif self._quiet:
            phase, reasons = "quiet", ("quiet",)
        elif self._given_up:
            phase = "given up"
        return ServiceState(
            workers=tuple(worker.shown() for worker in self._workers),
            ready=not reasons,
            phase=phase,
            reasons=reasons,
            restarts=dict(self._restarts),
            base=self._base,
            slots=len(self._slots),
            mends=not self._given_up and not all(slot.is_beyond_mending for slot in self._slots),
            reloads=self._reloads,
            reloading=bool(self._to_replace or self._successor) and not self._starts_none,
        )

    def _reason(self, slot: Slot) -> str:
        """Return why a slot is not ready, or nothing."""
        worker = slot.worker
        where = f"{self._name} {slot.number}"
        trouble = f" ({slot.trouble})" if slot.trouble else ""
        if worker is None:
            return f"{where} is down{trouble}"
        if worker.stuck:
            return f"{where} is stuck: {worker.stuck}"
        if worker.leaving:
            return f"{where} is leaving"
        if not worker.ready:
            return f"{where} is starting{trouble}"
        links = (worker.report or {}).get("links")
        down = [name for name, up in links.items() if not up] if isinstance(links, dict) else []
        return f"{where} has no connection: {', '.join(down)}" if down else ""

    def _on_signal(self, number: int) -> None:
        name = signal.Signals(number).name
        if number == signal.SIGUSR1:
            self._logger.warning("received %s; dumping the stacks of all processes", name)
            self.dump()
        elif number == signal.SIGTSTP:
            if not (self._quiet or self._starts_none):
                self._logger.info("received %s; beginning no more messages", name)
                self.quiet()
        elif number == signal.SIGHUP:
            if self._quiet:
                self._reloads += 1  # so that systemd doesn't wait for it
                self._logger.warning("received %s, but a quiet service starts no process", name)
            elif not self._starts_none:
                self._logger.info("received %s; replacing all workers, one by one", name)
                self._begin_to_replace()
        elif not self._stopping:
            self._logger.info("received %s; stopping", name)
            self._stop()
        elif time.monotonic() - self._stopping_since >= BURST:
            self._logger.warning("received %s while stopping; killing the workers", name)
            self._code = exit_codes.KILLED

    def _on_ready(self, worker: WorkerProcess) -> None:
        self._proven = True
        self._slots[worker.slot - 1].became_ready()
        if self._given_up:
            self._logger.warning("%s is ready: the service is not given up any more", worker)
            self._given_up = False
            self._retries = self._policy.retries

    def _log_stacks(self, worker: WorkerProcess, now: float) -> None:
        stacks = worker.take_stacks(now)
        if stacks:
            self._logger.warning("stacks of %s:\n%s", worker, stacks)

    def _check_stuck(self, worker: WorkerProcess, now: float) -> None:
        """Kill a worker that stays stuck while its stacks are written."""
        reason = worker.judge.verdict() if worker.ready else ""
        if not reason:
            if worker.stuck and not worker.condemned:
                self._logger.warning("%s goes on", worker)
                worker.stuck = ""
            return
        if not worker.stuck:
            self._logger.error("%s is stuck: %s; killing it", worker, reason)
            worker.stuck = reason
            worker.stuck_at = now
            worker.ask_for_stacks(now)
        elif not worker.condemned and now - worker.stuck_at >= _STACKS_WITHIN:
            self._log_stacks(worker, math.inf)
            self._slots[worker.slot - 1].was_stuck(worker.age)
            worker.condemn()

    def _check_cpu(self, worker: WorkerProcess, now: float) -> None:
        """Replace a worker that uses too much CPU time, and kill it if it doesn't stop that."""
        watch = worker.cpu
        if watch is None or not worker.ready or not watch.look(now):
            return
        patience = self._policy.stuck_after
        if worker.burns_since is None:
            if not self._starts_none:
                self._logger.info("%s has exceeded its CPU limit (%.0f %%)", worker, watch.percent)
                worker.burns_since = now
                worker.leave(self._grace)
        elif patience and now - worker.burns_since >= patience and not worker.condemned:
            self._logger.error("%s still exceeds its CPU limit; killing it", worker)
            worker.stuck = "it exceeds its CPU limit"
            worker.condemn()

    def _give_up(self, slot: Slot) -> None:
        """End a service that never works, or try again much later."""
        self._logger.error(
            "giving up: %s %d has never been ready (%s)", self._name, slot.number, slot.trouble
        )
        self._given_up = True
        if self._retries > 0:
            self._retries -= 1
            self._retry_at = time.monotonic() + self._policy.retry_every
            for each in self._slots:
                each.due = self._retry_at
            self._logger.error("trying again in %.0f s", self._policy.retry_every)
        else:
            self._code = exit_codes.FLAPPING
            self._stop()

    def _on_end(self, worker: WorkerProcess, code: int, lost: list[str]) -> None:
        slot = self._slots[worker.slot - 1]
        if lost:
            names = ", ".join(lost[:_NAMED]) + (", ..." if len(lost) > _NAMED else "")
            is_hushed = not self._starts_none and slot.is_hushed(time.monotonic())
            level = logging.DEBUG if is_hushed else logging.WARNING
            self._logger.log(level, "%s died while %d message(s) ran: %s", worker, len(lost), names)
        if self._starts_none:
            if slot.worker is worker:
                slot.worker = None
            if code not in (exit_codes.SUCCESS, exit_codes.RECYCLED) and worker.ready:
                self._logger.warning("%s %s", worker, _describe(code))
                self._code = self._code or exit_codes.UNFINISHED
            return
        if worker is self._successor and not worker.ready:
            self._end_replacing(f"{worker} {_describe(code)}")
            return
        if slot.worker is not worker:
            if code not in (exit_codes.SUCCESS, exit_codes.RECYCLED):
                self._logger.warning("%s %s", worker, _describe(code))
            return
        slot.worker = None
        if code != exit_codes.RECYCLED:
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
            self._restarts["stuck" if worker.stuck else "died"] += 1
            self._back_off(slot, what, worker.age, is_error=is_error, has_lost=bool(lost))
            if not worker.ready and code != exit_codes.UNAVAILABLE:
                self._check_bound(slot)

    def _check_bound(self, slot: Slot) -> None:
        """Give the service up if none of its processes is ready, nor will be."""
        now = time.monotonic()
        is_hopeless = slot.never_ready(now, self._policy.bound)
        if now < self._retry_at and self._given_up:  # another slot's process has ended before
            slot.due = self._retry_at
        elif is_hopeless and not any(worker.ready for worker in self._workers):
            self._give_up(slot)

    def _on_overdue(self, worker: WorkerProcess) -> None:
        self._logger.error("%s did not exit in time; killing it", worker)
        worker.kill_at = None
        worker.kill()

    def _check_loading(self, worker: WorkerProcess) -> None:
        """Notice a worker whose import of the application hangs."""
        if worker is self._successor and worker.age >= self._load_limit:
            self._end_replacing(
                f"{worker} did not import the application within {self._load_limit:.0f} s; "
                "killing it"
            )
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
        self._reloads += 1
        self._to_replace = deque(self._slots)
        self._retry_at = 0.0
        for slot in self._slots:
            slot.code_replaced()

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
                try:
                    slot.worker = self._start(slot)
                except OSError as error:
                    slot.failed_starts += 1
                    slot.trouble = f"it cannot be started: {error}"
                    self._back_off(slot, f"{self._name} {slot.number} cannot be started: {error}")
                    self._check_bound(slot)

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
                try:
                    self._successor = self._start(slot)
                except OSError as error:
                    self._end_replacing(f"a successor of {slot.worker} cannot be started: {error}")

    def _end_replacing(self, why: str) -> None:
        """Leave the workers that are not replaced yet as they are."""
        self._successor = None
        self._to_replace.clear()
        self._logger.error("%s; the other workers are not replaced", why)

    def _start(self, slot: Slot) -> WorkerProcess:
        worker = WorkerProcess(
            slot.number,
            self._command,
            self._keeper,
            with_input=len(self._slots) == 1,
            name=self._name,
            restarts=slot.started,
            policy=self._policy,
            folder=self._folder,
        )
        slot.started += 1
        slot.failed_starts = 0
        self._logger.info("%s started", worker)
        self._workers.append(worker)
        return worker

    def _back_off(
        self,
        slot: Slot,
        what: str,
        lived: float = 0.0,
        *,
        is_error: bool = False,
        has_lost: bool = False,
    ) -> None:
        restarts = slot.restarts
        wait = restarts.died_with_messages(lived) if has_lost else restarts.died(lived)
        now = time.monotonic()
        slot.due = now + wait
        if restarts.looping and not has_lost:
            what = f"{what} ({restarts.in_a_row} in a row)"
            is_error = True
        level = logging.ERROR if is_error else logging.WARNING
        if slot.is_hushed(now):
            level = logging.DEBUG
        if unlogged := slot.note_death(now):
            what = f"{what}, as {unlogged} others since the last such line"
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
        if not self._starts_none:
            slots = self._slots if self._proven else self._slots[:1]
            times += [slot.due for slot in slots if slot.worker is None]
        at_most = _SHOW_EVERY if self._faces else _CHECK_EVERY
        if self._policy.stuck_after and any(worker.ready for worker in self._workers):
            at_most = min(at_most, _JUDGE_EVERY)
        pause = min([at_most, *(moment - now for moment in times)])
        statuses = [worker.status for worker in self._workers if worker.status is not None]
        wait_readable((self._signals.fileno(), *statuses), pause)
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
        exit_codes.UNAVAILABLE: "ended with exit code 7 (broker or database unavailable)",
    }
    return meanings.get(code, f"ended with exit code {code}")
