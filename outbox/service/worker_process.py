"""A worker process, as seen by its supervisor."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from outbox.service.health.cpu import CPUWatch
from outbox.service.health.judge import Judge
from outbox.service.health.policy import Policy
from outbox.service.health.stacks import StackFile, signal_held_back
from outbox.service.lines import LineReader
from outbox.service.state import WorkerPhase, WorkerState
from outbox.service.supervised import (
    DUMP,
    FIRST,
    LEAVE,
    LEAVING,
    LOADED,
    QUIET,
    READY,
    STOPPING,
)
from outbox.system.child_process import ChildProcess

__all__ = ["Keeper", "WorkerProcess"]


_ANSWERS_WITHIN = 2.0
"""Seconds in which a process whose interpreter runs begins to write its stacks."""
_SLOW = 60.0
"""Seconds between two warnings that a process is still importing the application."""


class Keeper(Protocol):
    """Keeps what worker processes note about the messages they have begun, beyond their death."""

    @property
    def descriptor(self) -> int:
        """The descriptor that each process inherits."""

    def take(self) -> int | None:
        """Return a free region for a new process; None if there is none."""

    def variables(self, region: int) -> Mapping[str, str]:
        """Return the environment with which the process finds its region."""

    def spare(self, region: int) -> None:
        """Note that the parent is about to kill the process: its messages lose nothing by it."""

    def free(self, region: int, code: int) -> list[str]:
        """Take the region back; return the messages that have lost an attempt, for people."""

    def close(self) -> None:
        """Give up the parent's side."""


class WorkerProcess(ChildProcess):
    """One process, from start to exit. Used by one thread.

    Attributes:
        slot: the number of its slot, from 1; its successors have the same.
        loaded: whether it has reported that it has imported the application, or waits for changes.
        ready: whether it has reported that it consumes.
        leaving: whether it has reported that it begins nothing more, and needs a successor.
        restarts: the processes that were started in its slot before it.
        report: what it has reported last; None if it has reported nothing.
        judge: decides whether it is stuck.
        stuck: why it is stuck; empty if it isn't.
        stuck_at: since when, on the monotonic clock.
        condemned: whether it was killed for that.
        cpu: the watch over its CPU time; None without a limit.
        burns_since: when it was asked to leave because of that; None if it wasn't.
        kill_at: the time on the monotonic clock at which to kill it; None unless it is stopping.
    """

    def __init__(
        self,
        slot: int,
        command: Sequence[str],
        keeper: Keeper | None,
        *,
        with_input: bool,
        name: str = "worker",
        restarts: int = 0,
        policy: Policy | None = None,
        folder: str | None = None,
    ) -> None:
        """Start ``command`` in the slot with this number.

        Args:
            slot: the number of the slot.
            command: the program and its arguments.
            keeper: keeps the table of begun messages; None if there is none.
            with_input: whether the process gets the parent's standard input.
            name: what the log calls it.
            restarts: the processes that were started in the slot before it.
            policy: what its parent puts up with.
            folder: its working directory, by a link that may lead elsewhere by now; by default the
                parent's.

        Raises:
            OSError: the command cannot be started.
        """
        self.slot = slot
        self.loaded = False
        self.ready = False
        self.leaving = False
        self.restarts = restarts
        self.report: Mapping[str, Any] | None = None
        policy = policy or Policy()
        self.judge = Judge(policy.stuck_after)
        self.stuck = ""
        self.stuck_at = 0.0
        self.condemned = False
        self.burns_since: float | None = None
        self._name = name
        self._asked_to_leave = False
        self._stacks_by = math.inf
        self._reported_at = 0.0
        self.kill_at: float | None = None
        self._began = time.monotonic()
        self._slow_at = _SLOW
        reader, status = os.pipe()
        self._lines = LineReader(reader)
        self._stacks = _stack_file()
        self._keeper = keeper
        self._region = None if keeper is None else keeper.take()
        shared: list[int] = []
        variables = {} if folder is None else {"PWD": folder}
        if slot == 1:
            variables[FIRST] = "yes"
        if keeper is not None and self._region is not None:
            shared.append(keeper.descriptor)
            variables.update(keeper.variables(self._region))
        if self._stacks is not None:
            shared.append(self._stacks.descriptor)
            variables.update(self._stacks.variables())
        try:
            with signal_held_back():
                super().__init__(
                    command,
                    status,
                    with_input=with_input,
                    shared=shared,
                    variables=variables,
                    folder=folder,
                )
        except BaseException:
            self._close_files()
            self.take_messages(0)
            raise
        self.cpu = None if policy.cpu is None else CPUWatch(policy.cpu, self.pid)

    @property
    def age(self) -> float:
        """The seconds since it was started."""
        return time.monotonic() - self._began

    @property
    def status(self) -> int | None:
        """The descriptor that becomes readable when it reports something; None once it can't."""
        return self._lines.descriptor

    def listen(self, grace: float) -> None:
        """Read its reports; once it has begun to stop, it has ``grace`` seconds."""
        for line in self._lines.read():
            word = line.get("word")
            if word is None:
                self.report = line
                self._reported_at = time.monotonic()
                self.judge.hear(line.get("pulses"))
            self.ready |= word == READY
            self.loaded |= word == LOADED or self.ready
            self.leaving |= word == LEAVING
            if word == STOPPING:
                self._set_deadline(grace)

    def shown(self) -> WorkerState:
        """Return its state."""
        phase: WorkerPhase = "ready" if self.ready else "starting"
        if self.stuck:
            phase = "stuck"
        elif self.leaving or self._asked_to_leave or self.kill_at is not None:
            phase = "leaving"
        return WorkerState(
            slot=self.slot,
            pid=self.pid,
            phase=phase,
            age=self.age,
            restarts=self.restarts,
            report=self.report,
            report_age=None if self.report is None else time.monotonic() - self._reported_at,
            cpu=None if self.cpu is None else self.cpu.percent,
        )

    def is_slow(self) -> bool:
        """Return whether another minute has gone by without the application being imported."""
        if self.loaded or self.age < self._slow_at:
            return False
        self._slow_at += _SLOW
        return True

    def leave(self, grace: float) -> None:
        """Ask it to begin nothing more, and to exit when what runs has ended.

        If it hasn't imported the application, nothing runs, and it has ``grace`` seconds to exit.
        """
        self._begin_no_more(LEAVE, grace)

    def be_quiet(self, grace: float) -> None:
        """Ask it to begin nothing more, and to stay; as for ``leave`` otherwise."""
        self._begin_no_more(QUIET, grace)

    def ask_for_stacks(self, now: float) -> None:
        """Ask it to write the stacks of its threads and tasks; see ``take_stacks``."""
        self.say(DUMP)
        self._stacks_by = now + (0.0 if self.judge.is_silent else _ANSWERS_WITHIN)

    def take_stacks(self, now: float) -> str:
        """Return the stacks that it has written, once they are complete; else nothing.

        If no thread of it answers, it gets the signal for them.
        """
        if self._stacks is None:
            return ""
        if self._stacks.has_begun:
            self._stacks_by = math.inf
        elif self._stacks_by <= now < math.inf:
            self._stacks_by = math.inf
            self._process.send_signal(signal.SIGUSR1)
        return self._stacks.take(now)

    def _begin_no_more(self, word: bytes, grace: float) -> None:
        self.listen(grace)
        self._asked_to_leave = True
        if self.loaded:
            self.say(word)
        else:
            self.terminate(grace)

    def terminate(self, grace: float) -> None:
        """Ask it to exit within ``grace`` seconds; only the first call has an effect."""
        if self.kill_at is None:
            self._set_deadline(grace)
            self._process.send_signal(signal.SIGTERM)

    def kill(self, *, spare: bool = True) -> None:
        """Kill it; the messages that run in it lose nothing by that, unless ``spare`` is False."""
        if spare and self._keeper is not None and self._region is not None:
            self._keeper.spare(self._region)
        super().kill()

    def condemn(self) -> None:
        """Kill it because it is stuck; its messages count a loss."""
        self.condemned = True
        self.kill(spare=False)

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
        self._close_files()
        super().close()

    def _close_files(self) -> None:
        self._lines.close()
        stacks, self._stacks = self._stacks, None
        if stacks is not None:
            stacks.close()

    def _set_deadline(self, grace: float) -> None:
        if self.kill_at is None:
            self.kill_at = time.monotonic() + grace

    def __str__(self) -> str:
        return f"{self._name} {self.slot} (process {self.pid})"


def _stack_file() -> StackFile | None:
    try:
        return StackFile()
    except OSError:  # its stacks go to standard error
        return None
