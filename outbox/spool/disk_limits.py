"""How much a spool may hold: the limit that it was given, and what the disk has left."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["reserve_of", "why_full"]

_RESERVE = 256 * 1024 * 1024
_SMALLEST_SHARE = 20  # of a small disk, the reserve is 5 %


def reserve_of(disk: os.statvfs_result) -> int:
    """Return the bytes of a disk that are left to others: 256 MiB, or 5 % of a small one."""
    return min(_RESERVE, disk.f_blocks * disk.f_frsize // _SMALLEST_SHARE)


def why_full(folder: Path, size: int, max_bytes: int) -> str:
    """Return why no more may be promised; "" if there is room.

    Args:
        folder: the folder of the spool.
        size: the bytes of this process's events in it.
        max_bytes: the limit of those, ``spool_max_bytes``; 0 for none.
    """
    if max_bytes and size >= max_bytes:
        return f"the spool {folder} holds {size} bytes; the limit is spool_max_bytes={max_bytes}"
    try:
        disk = os.statvfs(folder)
    except OSError:  # the write will say what is wrong
        return ""
    free, reserve = disk.f_bavail * disk.f_frsize, reserve_of(disk)
    if free < reserve:
        return (
            f"the disk of the spool {folder} has {free} bytes left, and the last {reserve} are "
            "for others"
        )
    return ""
