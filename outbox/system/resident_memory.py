"""The resident memory of a process."""

from __future__ import annotations

import os
import sys

__all__ = ["resident_bytes"]


def resident_bytes(pid: int | None = None) -> int:
    """Return the resident size of a process in bytes, by default of this one.

    Without ``/proc``, return the peak of this process, or 0 for another.
    """
    try:
        with open(f"/proc/{pid or 'self'}/statm", "rb") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, IndexError):
        if pid is not None:
            return 0
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
