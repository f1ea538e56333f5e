"""Retries: how often a failed attempt is repeated, and after which delay."""

from __future__ import annotations

import datetime
import math
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from outbox import UsageError
from outbox.consumers.raised import leaves

__all__ = ["Delay", "Retry", "RetryPolicy", "exponential", "seconds_of"]

_LONGEST = 10 * 365 * 86_400.0  # seconds

Delay = float | datetime.timedelta | Callable[[int], float]
"""Seconds, a timedelta, or a function of the number of attempts so far (1 or more) to seconds."""


class Retry(Exception):
    """Raised by ``process()``: this attempt has failed; try again.

    It counts as an attempt of the consumer's :class:`RetryPolicy`, or of the default policy if the
    consumer has none: after the last one the message is dead-lettered.
    """

    def __init__(
        self, reason: str = "retry requested", *, delay: float | datetime.timedelta | None = None
    ) -> None:
        """Create the exception.

        Args:
            reason: the reason, for the log and the dead letters.
            delay: seconds, or a timedelta, instead of the policy's delay; 0 or more.

        Raises:
            UsageError: the delay is out of range.
        """
        super().__init__(reason)
        self.delay = None if delay is None else seconds_of(delay)


def exponential(
    first: float, *, factor: float = 2.0, max: float = 3600.0, jitter: bool = True
) -> Callable[[int], float]:
    """Return growing delays: ``first``, ``first * factor``, and so on up to ``max`` seconds.

    Args:
        first: seconds after the first failed attempt, more than 0.
        factor: 1 or more.
        max: seconds, ``first`` or more.
        jitter: True for a random time between half of each delay and all of it, so that messages
            that failed together are not retried together.

    Raises:
        UsageError: a number is out of range.
    """
    if not 0 < first < math.inf:
        raise UsageError(f"first is {first!r}; it must be more than 0 seconds")
    if not 1 <= factor < math.inf:
        raise UsageError(f"factor is {factor!r}, not 1 or more")
    if not first <= max <= _LONGEST:
        raise UsageError(f"max is {max!r}; it must be from {first!r} seconds to ten years")

    def delay(attempts: int) -> float:
        try:
            seconds = min(first * factor ** (attempts - 1), max)
        except OverflowError:
            seconds = max
        return seconds * random.uniform(0.5, 1) if jitter else seconds

    return delay


_DEFAULT_DELAY = exponential(1.0)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """A policy for failed attempts, timeouts included. Immutable; may be shared.

    A retried message waits in the transport, not in the worker; a header counts its attempts. A
    lost connection, or a worker that stops, doesn't count as an attempt.

    Attributes:
        max_attempts: the number of attempts, the first included; 1 or more.
        delay: the delay before the next attempt. Over RabbitMQ it is rounded up to whole seconds.
        on: the exceptions after which to try again. Of a group, all members must be among them.
        give_up_on: exceptions after which not to try again, even if ``on`` includes them. Of a
            group, one member is enough. A class of groups, named in either, counts as a whole.
    """

    max_attempts: int = 5
    delay: Delay = _DEFAULT_DELAY
    on: tuple[type[BaseException], ...] = (Exception, SystemExit)
    give_up_on: tuple[type[BaseException], ...] = ()

    def __post_init__(self) -> None:
        """Check the arguments.

        Raises:
            UsageError: an argument is invalid; the message names it.
        """
        if isinstance(self.max_attempts, bool) or not isinstance(self.max_attempts, int):
            raise UsageError(f"max_attempts is {self.max_attempts!r}, not an int")
        if self.max_attempts < 1:
            raise UsageError(f"max_attempts is {self.max_attempts}, not 1 or more")
        if not callable(self.delay):
            seconds_of(self.delay)
        for name in ("on", "give_up_on"):
            value = getattr(self, name)
            kinds = tuple(value) if isinstance(value, Iterable) else (value,)
            for kind in kinds:
                if not (isinstance(kind, type) and issubclass(kind, BaseException)):
                    raise UsageError(f"{name} has {kind!r}, which is not an exception class")
            object.__setattr__(self, name, kinds)

    def delay_after(self, error: BaseException, attempts: int) -> float | None:
        """Return the seconds until the next attempt, or None to give up.

        After a group that is the longest delay of its members, or None if one is given up on.

        Args:
            error: the exception of the last attempt.
            attempts: the number of attempts so far, 1 or more.

        Raises:
            Exception: a user-defined ``delay`` function raised it.
        """
        if attempts >= self.max_attempts:
            return None
        delays = []
        for member in [error] if self.names_group(error) else leaves(error):
            if isinstance(member, Retry):
                if member.delay is not None:
                    delays.append(member.delay)
                    continue
            elif isinstance(member, self.give_up_on) or not isinstance(member, self.on):
                return None
            delays.append(seconds_of(self.delay(attempts) if callable(self.delay) else self.delay))
        return max(delays)

    def names_group(self, error: BaseException) -> bool:
        """Return whether ``error`` is a group of a class that ``on`` or ``give_up_on`` names.

        Such a group counts as a whole, instead of its members.
        """
        return isinstance(error, BaseExceptionGroup) and any(
            issubclass(kind, BaseExceptionGroup) and isinstance(error, kind)
            for kind in (*self.on, *self.give_up_on)
        )


def seconds_of(delay: float | datetime.timedelta) -> float:
    """Return a delay in seconds.

    Raises:
        UsageError: it is not a number or timedelta, is negative, or is more than ten years.
    """
    seconds = delay.total_seconds() if isinstance(delay, datetime.timedelta) else delay
    if isinstance(seconds, bool) or not isinstance(seconds, int | float):
        raise UsageError(f"the delay {delay!r} is neither seconds nor a timedelta")
    if not 0 <= seconds <= _LONGEST:
        raise UsageError(f"the delay {delay!r} is not between 0 seconds and ten years")
    return float(seconds)
