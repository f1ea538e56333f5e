"""Polling for conditions that signal nothing."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], timeout: float = 10.0) -> float:
    """Wait until ``condition()`` is true; return the seconds that it took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout
        time.sleep(0.002)
    return time.monotonic() - begin
