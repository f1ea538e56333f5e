"""The table of begun messages, seen from the parent that makes it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping

from outbox.consumers.losses.begun_table import BegunTable, Layout, Memory, message_of

__all__ = ["BegunKeeper"]

_GRAVES = 1024
_MOST_LOSSES = 255  # what a place can hold
_MORE_REGIONS = 8
"""Regions beyond two for each process: while workers are replaced, predecessors still end."""


class BegunKeeper:
    """Gives each worker process a region of the table, and keeps what the dead ones left there."""

    def __init__(self, processes: int, places: int) -> None:
        """Make a table for ``processes`` slots whose workers begin ``places`` messages at a time.

        Raises:
            OSError: there is no memory for it.
        """
        layout = Layout(2 * processes + _MORE_REGIONS, places, max(_GRAVES, 4 * places))
        self._memory = Memory(_shared_memory(layout.size), layout)
        self._free = list(range(layout.regions))

    @property
    def descriptor(self) -> int:
        """The descriptor that a worker process inherits."""
        return self._memory.descriptor

    def take(self) -> int | None:
        """Return a free region for a new process; None if there is none."""
        if not self._free:
            return None
        region = self._free.pop()
        self._memory.clear_region(region, in_use=True)
        return region

    def variables(self, region: int) -> Mapping[str, str]:
        """Return the environment with which the process finds its region."""
        return BegunTable.variables(self._memory, region)

    def spare(self, region: int) -> None:
        """Note that the parent is about to kill the process: its messages lose nothing by it."""
        self._memory.spare(region)

    def free(self, region: int, code: int) -> list[str]:
        """Take the region of a process that has ended with exit code ``code``.

        Returns:
            The messages that were running in it, for people to read; each has lost an attempt.
        """
        memory = self._memory
        lost = []
        if not memory.is_spared(region):
            places = range(memory.layout.places)
            noted = [memory.read(memory.layout.place(region, number)) for number in places]
            for ended in noted:
                if ended is not None and ended.has_ended:
                    self._bury(ended.key, ended.losses, code)
            for running in noted:  # last: it may have ended before, and begun once more
                if running is not None and not running.has_ended:
                    self._bury(running.key, min(running.losses + 1, _MOST_LOSSES), code)
                    lost.append(message_of(running.key))
        owner = memory.owner_of(region)
        if owner:
            graves, owners = memory.counts()
            memory.set_owner(owners, owner)
            memory.set_counts(graves, owners + 1)
        # The graves stand: only now may the places go.
        memory.clear_region(region, in_use=False)
        self._free.append(region)
        return lost

    def close(self) -> None:
        """Give up this side's memory."""
        self._memory.close()

    def _bury(self, key: bytes, losses: int, code: int) -> None:
        memory = self._memory
        grave = memory.grave_of(key)
        if grave is None:
            graves, owners = memory.counts()
            grave = memory.layout.grave(graves)
            memory.write(grave, key, losses, code)
            memory.set_counts(graves + 1, owners)
        else:
            memory.write(grave, key, losses, code)


def _shared_memory(size: int) -> int:
    """Return a descriptor of ``size`` bytes of memory that has no name."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("outbox-begun")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    # Written in full: on a disk without room, a page of a sparse file would kill who touches it.
    os.write(descriptor, bytes(size))
    return descriptor
