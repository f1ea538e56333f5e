"""The back-off: a pause before the next attempt that grows with each failure."""

from __future__ import annotations

import random

__all__ = ["backoff"]

_FIRST_DELAY, _LONGEST_DELAY = 0.5, 30.0


def backoff(attempt: int) -> float:
    """Return the seconds to wait after the ``attempt``-th failure (from 0): 0.5 doubling to 30.

    Jittered between half of that and all of it, so that many processes don't retry in step.
    """
    delay: float = min(_LONGEST_DELAY, _FIRST_DELAY * 2 ** min(attempt, 16))
    return delay * random.uniform(0.5, 1.0)
