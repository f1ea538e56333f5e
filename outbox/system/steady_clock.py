"""The monotonic clock, which runs on in tests that freeze the time.

Such tools replace ``time.monotonic`` wherever they find it, and a wait measured by it never ends.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

__all__ = ["monotonic"]

monotonic: Callable[[], float] = functools.partial(time.clock_gettime, time.CLOCK_MONOTONIC)
"""Return seconds since some instant; comparable only with each other."""
