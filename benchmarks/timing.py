"""Timing for the benchmarks."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable


def best(function: Callable[[], object], number: int, repeat: int = 7) -> float:
    """Return the microseconds per call, the best of ``repeat`` rounds of ``number`` calls."""
    times = []
    for _ in range(repeat):
        gc.collect()
        begin = time.perf_counter()
        for _ in range(number):
            function()
        times.append(time.perf_counter() - begin)
    return min(times) / number * 1e6


def side_by_side(functions: dict[str, Callable[[], object]], number: int) -> dict[str, float]:
    """Time several functions in turns, so that a drift of the machine affects all alike."""
    found = dict.fromkeys(functions, float("inf"))
    for _ in range(7):
        for name, function in functions.items():
            found[name] = min(found[name], best(function, number, 1))
    return found
