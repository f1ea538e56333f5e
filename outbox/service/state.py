"""The state of a service, as its parent shows it to its faces."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, Protocol, TypeAlias

from outbox import exit_codes

__all__ = ["Face", "Phase", "Service", "ServiceState", "WorkerPhase", "WorkerState"]

WorkerPhase: TypeAlias = Literal["starting", "ready", "leaving", "stuck"]
Phase: TypeAlias = Literal["starting", "ready", "quiet", "leaving", "stopping", "given up"]

_NONE: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class WorkerState:
    """A worker or relay process, as its parent sees it.

    Attributes:
        slot: the number of its slot, from 1; while a process leaves, its successor has the same.
        pid: its process id.
        phase: ``starting`` until it consumes, ``ready``, ``leaving`` once it only finishes what it
            has begun, or ``stuck`` while it doesn't react.
        age: the seconds since it was started.
        restarts: the processes that have been started in the slot after the first.
        report: what it has reported last, at most about a second ago unless it is stuck; None if it
            has reported nothing. See ``outbox.service.supervised.Supervised``.
        report_age: the seconds since that report has arrived; None if there is none.
        cpu: its CPU time in percent of one core, in the last interval of 10 s; None if it isn't
            limited.
    """

    slot: int
    pid: int
    phase: WorkerPhase
    age: float
    restarts: int = 0
    report: Mapping[str, Any] | None = None
    report_age: float | None = None
    cpu: float | None = None


@dataclass(frozen=True, slots=True)
class ServiceState:
    """A service at one moment; immutable, so that any thread may read it.

    Attributes:
        workers: the processes, those that leave included.
        ready: whether as many processes as asked for consume, all their links are up, and nothing
            has asked it to end.
        phase: ``starting`` until it is ready for the first time and while too few consume,
            ``ready``, ``quiet`` when it begins nothing more and stays, ``leaving`` when it ends as
            soon as what runs has ended, ``stopping``, or ``given up`` when none of its processes
            was ever ready and it starts no more, or tries again in minutes.
        reasons: why it isn't ready, one phrase each; empty if it is.
        restarts: how often processes were started again, by the reason.
        base: the sum of the last counts of the processes that have ended; None if there is none.
        slots: the number of processes asked for.
        mends: whether it can still mend what breaks: it is not given up, and not in every slot the
            last three processes were stuck or could not be started.
        reloads: how often it was asked to replace all its processes.
        reloading: whether it is still doing so.
    """

    workers: tuple[WorkerState, ...] = ()
    ready: bool = False
    phase: Phase = "starting"
    reasons: tuple[str, ...] = ()
    restarts: Mapping[str, int] = field(default_factory=lambda: _NONE)
    base: Any = None
    slots: int = 1
    mends: bool = True
    reloads: int = 0
    reloading: bool = False


class Service(Protocol):
    """The parent, as its faces see it. Its methods must be called on its thread."""

    @property
    def state(self) -> ServiceState:
        """The state of this turn; any thread may read it."""

    def leave(self, timeout: float | None = None) -> None:
        """Begin nothing more, and end when what runs has ended; see ``Supervisor.leave``."""

    def stop(self, code: int = exit_codes.SUCCESS) -> None:
        """Stop all processes within the shutdown timeout, and end with ``code``."""

    def quiet(self) -> None:
        """Begin nothing more and start no process, but stay until a signal."""

    def dump(self) -> None:
        """Have each process write its stacks, which appear in the log of this one."""


class Face(Protocol):
    """Something that shows a service to the outside: its pid file, its probes, systemd.

    Both methods are called on the parent's thread, and must be quick.
    """

    def turn(self, service: Service) -> None:
        """Act on the state; called several times a second, and after each change."""

    def close(self) -> None:
        """Withdraw what is shown; called once, when all processes have ended."""
