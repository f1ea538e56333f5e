"""How much may be written before the disk is full.

Claiming and deleting a message need room on the disk, too: SQLite writes each changed page to the
log first, and into the file later. If publishers filled the disk to the last byte, no worker could
ever make room again. So they stop earlier, as RabbitMQ does with ``disk_free_limit``. What replaces
messages, such as the copies for retries, stops later: or messages that all fail would stay forever.
"""

from __future__ import annotations

import contextlib
import os

from outbox.transports.database.database import Room

__all__ = ["room_at"]

_RESERVE = 16 * 1024 * 1024
_SMALLEST_SHARE = 10  # of a small disk, the reserve is one tenth

_COPIES = 3
"""The bytes written for each byte of an event: to the log, into the file, for pages and indexes."""


def room_at(path: str) -> Room:
    """Return the room for events in the file at ``path``.

    Raises:
        OSError: the disk can't be asked.
    """
    disk = os.statvfs(os.path.dirname(path) or ".")
    reserve = min(_RESERVE, disk.f_blocks * disk.f_frsize // _SMALLEST_SHARE)
    log = 0
    with contextlib.suppress(FileNotFoundError):
        log = os.stat(f"{path}-wal").st_size  # all of it may still have to be copied into the file
    free = disk.f_bavail * disk.f_frsize - log
    return Room((free - reserve) // _COPIES, (free - reserve // 2) // _COPIES)
