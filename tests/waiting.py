"""Waiting for what has no event to wait for."""

from __future__ import annotations

import time
from collections.abc import Callable


def wait_until(condition: Callable[[], object], timeout: float = 10.0) -> float:
    """Wait until it is true, and return the seconds that took."""
    begin = time.monotonic()
    while not condition():
        assert time.monotonic() - begin < timeout
        time.sleep(0.002)
    return time.monotonic() - begin
