"""A wait for descriptors, whatever their numbers."""

from __future__ import annotations

import math
import select
from collections.abc import Iterable

__all__ = ["wait_readable"]


def wait_readable(descriptors: Iterable[int], seconds: float | None = None) -> set[int]:
    """Return those of ``descriptors`` that are readable, or closed at the other end.

    Waits for one, at most for ``seconds``; None waits without a limit. ``select()`` has no room for
    descriptors above 1,023.
    """
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    pause = None if seconds is None else math.ceil(max(0.0, seconds) * 1000)
    return {descriptor for descriptor, _ in poll.poll(pause)}
