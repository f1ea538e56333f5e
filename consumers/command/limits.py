"""The limits of a worker process: on reaching one, it is replaced."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from outbox.system.resident_memory import resident_bytes

__all__ = ["Limits", "MemoryLimit", "Recycling"]

_CHECK_EVERY = 1.0
"""Seconds between looks at the memory, where one decides."""
_LOOK_EVERY = 10.0
"""Seconds between looks at the memory, where several decide."""

_JITTER = 0.1


@dataclass(frozen=True, slots=True)
class MemoryLimit:
    """A limit of the memory, which a process has to exceed in ``times`` of ``looks`` looks.

    Attributes:
        size: the resident size in bytes.
        times: 1 or more.
        looks: the number of looks that count, the latest ones, ``times`` or more.
    """

    size: int
    times: int = 1
    looks: int = 1


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits at which a process is replaced; None for no limit.

    Attributes:
        messages: the number of messages that it processes, 1 or more.
        memory: the resident size.
        age: the seconds that it lives. Each process stops up to a tenth earlier, at random, so that
            processes started together don't stop together.
    """

    messages: int | None = None
    memory: MemoryLimit | None = None
    age: float | None = None

    def __bool__(self) -> bool:
        return (self.messages, self.memory, self.age) != (None, None, None)


class Recycling:
    """The check of one process against its limits of age and memory. Reads no clock.

    The worker itself counts messages, since it must not begin one too many.

    Attributes:
        size: the resident size in bytes, as of the last look; None before it.
    """

    def __init__(
        self,
        limits: Limits,
        now: float,
        *,
        resident: Callable[[], int] | None = None,
        fraction: float | None = None,
    ) -> None:
        """Start the age at ``now``.

        Args:
            limits: the limits.
            now: the time in seconds, on any clock that doesn't go back.
            resident: the function that returns the resident size in bytes; the default returns this
                process's.
            fraction: the fraction of the jitter to apply, 0 to 1; the default is random.
        """
        self._limits = limits
        self._resident = resident or resident_bytes
        self._began = now
        self._check_at = now
        self._exceeded: deque[bool] = deque(maxlen=limits.memory.looks if limits.memory else 1)
        self.size: int | None = None
        jitter = random.random() if fraction is None else fraction
        self._until = None if limits.age is None else now + limits.age * (1 - _JITTER * jitter)

    def reason(self, now: float, *, has_worked: bool) -> str | None:
        """Return the reason why the process must stop, or None.

        Args:
            now: the time, on the same clock.
            has_worked: whether a message has begun. Until then memory doesn't count: a successor
                would use as much, and no process would ever begin a message.
        """
        if self._until is not None and now >= self._until:
            return "maximum age reached"
        limit = self._limits.memory
        if limit is not None and has_worked and now >= self._check_at:
            self._check_at = now + (_CHECK_EVERY if limit.looks == 1 else _LOOK_EVERY)
            size = self.size = self._resident()
            self._exceeded.append(size > limit.size)
            if sum(self._exceeded) >= limit.times:
                return f"memory limit exceeded ({size / 2**20:.0f} MiB)"
        return None

    def values(self, now: float) -> dict[str, tuple[float | None, float]]:
        """Return the present value and the limit, for each limit of age and memory.

        Args:
            now: the time, on the same clock.
        """
        values: dict[str, tuple[float | None, float]] = {}
        if self._limits.age is not None:
            values["age"] = now - self._began, self._limits.age
        if self._limits.memory is not None:
            values["memory"] = self.size, self._limits.memory.size
        return values
