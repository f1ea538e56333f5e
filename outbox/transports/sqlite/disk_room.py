"""How much may be published before the disk is full.

Claiming and deleting a message need room on the disk, too: SQLite writes each changed page to the
log first, and into the file later. If publishers filled the disk to the last byte, no worker could
ever make room again. So they stop earlier, as RabbitMQ does with ``disk_free_limit``.
"""

from __future__ import annotations

import contextlib
import os

__all__ = ["room_for_events"]

_RESERVE = 16 * 1024 * 1024
_SMALLEST_SHARE = 10  # of a small disk, the reserve is one tenth

_COPIES = 3
"""The bytes written for each byte of an event: to the log, into the file, for pages and indexes."""


def room_for_events(path: str) -> int:
    """Return the number of bytes of events that may be written to the file at ``path`` now.

    It is 0 or less if only the workers' reserve is left.

    Raises:
        OSError: the disk can't be asked.
    """
    disk = os.statvfs(os.path.dirname(path) or ".")
    reserve = min(_RESERVE, disk.f_blocks * disk.f_frsize // _SMALLEST_SHARE)
    log = 0
    with contextlib.suppress(FileNotFoundError):
        log = os.stat(f"{path}-wal").st_size  # all of it may still have to be copied into the file
    return (disk.f_bavail * disk.f_frsize - reserve - log) // _COPIES
