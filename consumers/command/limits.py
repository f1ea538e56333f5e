"""The limits of a worker process: on reaching one, it is replaced."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from outbox.system.resident_memory import resident_bytes

__all__ = ["Limits", "Recycling"]

_CHECK_EVERY = 1.0
"""Seconds between checks of the memory."""

_JITTER = 0.1


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits at which a process is replaced; None for no limit.

    Attributes:
        messages: the number of messages that it processes, 1 or more.
        memory: the resident size in bytes.
        age: the seconds that it lives. Each process stops up to a tenth earlier, at random, so that
            processes started together don't stop together.
    """

    messages: int | None = None
    memory: int | None = None
    age: float | None = None

    def __bool__(self) -> bool:
        return (self.messages, self.memory, self.age) != (None, None, None)


class Recycling:
    """The check of one process against its limits of age and memory. Reads no clock.

    The worker itself counts messages, since it must not begin one too many.
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
        self._check_at = now
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
            self._check_at = now + _CHECK_EVERY
            size = self._resident()
            if size > limit:
                return f"memory limit exceeded ({size / 2**20:.0f} MiB)"
        return None
