"""When a worker process has done enough, and is to be replaced by a new one."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from outbox.system.resident_memory import resident_bytes

__all__ = ["Limits", "Recycling"]

_LOOK_EVERY = 1.0
"""Seconds between two looks at the memory."""

_JITTER = 0.1


@dataclass(frozen=True, slots=True)
class Limits:
    """What a process may do before it is replaced; None for no limit.

    Attributes:
        messages: how many it processes, 1 or more.
        memory: bytes of resident size.
        age: seconds that it lives. Each process stops up to a tenth earlier, at random, so that
            those that were started together do not stop together.
    """

    messages: int | None = None
    memory: int | None = None
    age: float | None = None

    def __bool__(self) -> bool:
        return (self.messages, self.memory, self.age) != (None, None, None)


class Recycling:
    """Says when one process has reached its age, or its memory. Without a clock of its own.

    Messages the worker counts itself: not one more than allowed may begin.
    """

    def __init__(
        self,
        limits: Limits,
        now: float,
        *,
        resident: Callable[[], int] | None = None,
        fraction: float | None = None,
    ) -> None:
        """Begin to watch at ``now``.

        Args:
            limits: the limits.
            now: seconds of any clock that does not go back.
            resident: returns the resident size in bytes; the default is this process's.
            fraction: of the age's jitter, 0 to 1; by default at random.
        """
        self._limits = limits
        self._resident = resident or resident_bytes
        self._look_at = now
        jitter = random.random() if fraction is None else fraction
        self._until = None if limits.age is None else now + limits.age * (1 - _JITTER * jitter)

    def reason(self, now: float, *, has_worked: bool) -> str | None:
        """Return why the process is to stop, or None.

        Args:
            now: the present.
            has_worked: whether a message was begun. Before that a process is not replaced for its
                memory: its successor would need as much, and none would ever work.
        """
        if self._until is not None and now >= self._until:
            return "it has reached its age"
        limit = self._limits.memory
        if limit is not None and has_worked and now >= self._look_at:
            self._look_at = now + _LOOK_EVERY
            size = self._resident()
            if size > limit:
                return f"it takes {size / 2**20:.0f} MiB of memory"
        return None
