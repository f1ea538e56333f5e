"""The CPU time of a process and its children, and the limit on it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections import deque
from collections.abc import Callable

from outbox.service.health.policy import CPULimit

__all__ = ["INTERVAL", "CPUWatch", "cpu_seconds"]

INTERVAL = 10.0
"""Seconds between two looks at the CPU time."""


class CPUWatch:
    """The looks at one process. Reads no clock."""

    def __init__(
        self, limit: CPULimit, pid: int, read: Callable[[int], float | None] | None = None
    ) -> None:
        """Watch the process ``pid``; ``read(pid)`` returns its CPU time in seconds."""
        self._limit = limit
        self._pid = pid
        self._read = read or cpu_seconds
        self._last: tuple[float, float] | None = None
        self._above: deque[float] = deque(maxlen=limit.checks)
        self.percent: float | None = None
        """Of one core, in the last interval; None before its end."""

    def look(self, now: float) -> bool:
        """Look, if an interval is over; return whether the limit is exceeded.

        Args:
            now: the time in seconds, on a clock that doesn't go back.
        """
        if self._last is not None and now - self._last[0] < INTERVAL:
            return self._exceeded
        used = self._read(self._pid)
        if used is None:
            return False
        if self._last is not None:
            began, before = self._last
            self.percent = max(0.0, 100 * (used - before) / (now - began))
            if self.burns:
                self._above.append(self.percent)
            else:
                self._above.clear()
        self._last = now, used
        return self._exceeded

    @property
    def burns(self) -> bool:
        """Whether the last interval was above the limit."""
        return self.percent is not None and self.percent > self._limit.percent

    @property
    def _exceeded(self) -> bool:
        return len(self._above) >= self._limit.checks


def cpu_seconds(pid: int) -> float | None:
    """Return the CPU time of a process, its children and theirs; None if it can't be read."""
    return _from_proc(pid) if os.path.isdir("/proc/self/task") else _from_ps(pid)


def _from_proc(pid: int) -> float | None:
    ticks = _ticks(pid)
    if ticks is None:
        return None
    ticks += sum(_ticks(child) or 0 for child in _children(pid))
    return ticks / os.sysconf("SC_CLK_TCK")


def _ticks(pid: int) -> int | None:
    """Return the ticks that a process and those children that it has waited for have used."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        return sum(map(int, fields[11:15]))
    except (OSError, ValueError, IndexError):
        return None


def _children(pid: int) -> list[int]:
    """Return the processes that a process has started, and those that they have."""
    found: list[int] = []
    to_ask = [pid]
    while to_ask:
        parent = to_ask.pop()
        children: list[int] = []
        with contextlib.suppress(OSError, ValueError):
            for task in os.listdir(f"/proc/{parent}/task"):
                with open(f"/proc/{parent}/task/{task}/children", "rb") as file:
                    children += map(int, file.read().split())
        found += children
        to_ask += children
    return found


def _from_ps(pid: int) -> float | None:
    try:
        output = subprocess.run(
            ["ps", "-o", "time=", "-p", str(pid)], capture_output=True, text=True, check=True
        ).stdout
        return _seconds(output.strip())
    except (OSError, ValueError, subprocess.CalledProcessError):
        return None


def _seconds(text: str) -> float:
    """Parse ``[days-][hours:]minutes:seconds``, as ps writes a time."""
    days, _, time = text.rpartition("-")
    seconds = 0.0
    for part in time.split(":"):
        seconds = 60 * seconds + float(part)
    return seconds + 86400 * int(days or 0)
