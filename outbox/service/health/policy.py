"""What a parent puts up with from its processes."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CPULimit", "Policy", "RestartBound"]


@dataclass(frozen=True, slots=True)
class CPULimit:
    """The CPU time at which a process is replaced.

    Attributes:
        percent: of one core; a process with several threads in C code may use more than 100.
        checks: the number of intervals of 10 s in a row, each of which has to exceed it.
    """

    percent: float
    checks: int = 5


@dataclass(frozen=True, slots=True)
class RestartBound:
    """The number of processes after which a service is given up that never works.

    Attributes:
        deaths: the number of processes in a row that ended without ever being ready.
        seconds: the time that they must have taken, at least.
    """

    deaths: int = 10
    seconds: float = 120.0


@dataclass(frozen=True, slots=True)
class Policy:
    """What a parent puts up with from its processes.

    Attributes:
        stuck_after: the seconds of silence after which a process is killed; 0 for any number.
        bound: when a service that never becomes ready is given up; None for never.
        cpu: the CPU time at which a process is replaced; None for no limit.
        retries: how often a service that was given up is tried again before it ends.
        retry_every: the seconds between two such attempts.
    """

    stuck_after: float = 30.0
    bound: RestartBound | None = RestartBound()
    cpu: CPULimit | None = None
    retries: int = 0
    retry_every: float = 600.0
