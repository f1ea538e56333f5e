"""The table of begun messages, in memory that a parent shares with its worker processes.

A message that was begun and whose process died has lost an attempt of its own; what was only sent
ahead to that process has lost nothing. A broker can't tell them apart, the table can: a worker
writes each message into a *place* when it begins, and marks the place when it ends. Whatever kills
a process, its places stay as they were, and its siblings read them there as soon as the broker
redelivers the messages to them. The parent then moves them to the *graves*, which outlive the
process's successor.

No process waits for another. A region is written by its own process until that dies, then by the
parent; graves are written by the parent, and cleared by a worker in which the message has ended.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections import deque
from hashlib import blake2b
from typing import NamedTuple

__all__ = ["BegunTable", "Layout", "Loss", "Memory", "key_of", "message_of"]

_VARIABLE = "_OUTBOX_BEGUN"

_HEAD = struct.Struct("=II56x")
"""How many graves and how many owners have been written since the start."""
_REGION = struct.Struct("=BB32s30x")
"""Whether it is in use, whether the parent has killed its process, and who leases rows for it."""
_PLACE = struct.Struct("=BBBxh122s")
"""The length of the key, 0 if there is none; earlier losses; whether the message has ended; an exit
code (of a grave); the key."""
_ENDED = 2
_KEY = 122
_OWNER = 32
_OWNERS = 64


class Loss(NamedTuple):
    """What is known of the processes in which a message was lost.

    Attributes:
        times: how often it was lost; 0 if it only had ended before its ack was written.
        code: the exit code of the last process, negative for a signal; None if the parent hasn't
            noted it yet.
    """

    times: int
    code: int | None


class Noted(NamedTuple):
    """A place or a grave, as it is read.

    Attributes:
        key: the key of the message.
        losses: in a place the losses before this attempt, in a grave all of them.
        has_ended: whether the message has ended.
        code: in a grave the exit code of the process.
    """

    key: bytes
    losses: int
    has_ended: bool
    code: int


class Layout(NamedTuple):
    """The sizes of a table, from which both sides compute where everything is.

    Attributes:
        regions: the number of processes that may live at a time.
        places: the number of messages that may run in a process at a time.
        graves: the number of lost messages that are remembered; then the oldest is forgotten.
    """

    regions: int
    places: int
    graves: int

    @property
    def size(self) -> int:
        """The size in bytes."""
        return self.region(self.regions)

    def owner(self, number: int) -> int:
        """Return the offset of the owner that was written as the ``number``-th, from 0."""
        return _HEAD.size + number % _OWNERS * _OWNER

    def grave(self, number: int) -> int:
        """Return the offset of the grave that was written as the ``number``-th, from 0."""
        return _HEAD.size + _OWNERS * _OWNER + number % self.graves * _PLACE.size

    def region(self, number: int) -> int:
        """Return the offset of a process's region."""
        graves = _HEAD.size + _OWNERS * _OWNER + self.graves * _PLACE.size
        return graves + number * (_REGION.size + self.places * _PLACE.size)

    def place(self, region: int, number: int) -> int:
        """Return the offset of a place in a region."""
        return self.region(region) + _REGION.size + number * _PLACE.size


def key_of(queue: str, message_id: str) -> bytes:
    """Return what stands for a message in the table; a long one is cut to its digest."""
    key = f"{queue}\0{message_id}".encode(errors="surrogatepass")
    return key if len(key) <= _KEY else blake2b(key, digest_size=32).hexdigest().encode()


def message_of(key: bytes) -> str:
    """Return ``key`` for people to read."""
    queue, found, message_id = key.decode(errors="replace").partition("\0")
    return f"{message_id!r} of {queue!r}" if found else "one with a long id"


class Memory:
    """The shared memory, as both sides read and write it."""

    def __init__(self, descriptor: int, layout: Layout) -> None:
        """Map the memory; the descriptor stays open, for its locks."""
        self.descriptor = descriptor
        self.layout = layout
        self._bytes = mmap.mmap(descriptor, layout.size)

    def read(self, offset: int) -> Noted | None:
        """Return what is noted in a place or grave; None if it is empty."""
        length, losses, has_ended, code, key = _PLACE.unpack_from(self._bytes, offset)
        return Noted(key[:length], losses, bool(has_ended), code) if length else None

    def write(self, offset: int, key: bytes, losses: int, code: int = 0) -> None:
        """Write a place, or a grave."""
        _PLACE.pack_into(self._bytes, offset, len(key), losses, False, code, key)

    def end(self, offset: int) -> None:
        """Note in a place that its message has ended."""
        self._bytes[offset + _ENDED] = 1

    def clear(self, offset: int) -> None:
        """Empty a place or a grave."""
        self._bytes[offset] = 0

    def clear_region(self, region: int, *, in_use: bool) -> None:
        """Free all places of a region, and forget its process."""
        begin, end = self.layout.region(region), self.layout.region(region + 1)
        self._bytes[begin:end] = bytes([in_use]).ljust(end - begin, b"\0")

    def is_in_use(self, region: int) -> bool:
        """Return whether the region belongs to a process, which may be dead."""
        return bool(self._bytes[self.layout.region(region)])

    def is_spared(self, region: int) -> bool:
        """Return whether the parent has killed the region's process."""
        return bool(self._bytes[self.layout.region(region) + 1])

    def spare(self, region: int) -> None:
        """Note that the parent kills the region's process: no message has lost anything."""
        self._bytes[self.layout.region(region) + 1] = 1

    def owner_of(self, region: int) -> str:
        """Return who leases rows for the region's process."""
        owner = _REGION.unpack_from(self._bytes, self.layout.region(region))[2]
        return _text(owner)

    def set_owner_of(self, region: int, owner: str) -> None:
        """Write what :meth:`owner_of` returns."""
        offset = self.layout.region(region)
        in_use, spared, _ = _REGION.unpack_from(self._bytes, offset)
        _REGION.pack_into(self._bytes, offset, in_use, spared, owner.encode())

    def counts(self) -> tuple[int, int]:
        """Return the number of graves and of owners that have been written."""
        graves, owners = _HEAD.unpack_from(self._bytes, 0)
        return graves, owners

    def set_counts(self, graves: int, owners: int) -> None:
        """Write what :meth:`counts` returns."""
        _HEAD.pack_into(self._bytes, 0, graves, owners)

    def grave_of(self, key: bytes) -> int | None:
        """Return the offset of the grave with this key, if there is one."""
        begin = self.layout.grave(0)
        end = begin + min(self.counts()[0], self.layout.graves) * _PLACE.size
        found = self._bytes.find(key, begin, end)
        while found >= 0:
            offset = found - (found - begin) % _PLACE.size
            grave = self.read(offset)
            if grave is not None and grave.key == key:
                return offset
            found = self._bytes.find(key, found + 1, end)
        return None

    def owner(self, number: int) -> str:
        """Return the ``number``-th owner that was written."""
        offset = self.layout.owner(number)
        return _text(self._bytes[offset : offset + _OWNER])

    def set_owner(self, number: int, owner: str) -> None:
        """Write the ``number``-th owner."""
        offset = self.layout.owner(number)
        self._bytes[offset : offset + _OWNER] = owner.encode().ljust(_OWNER, b"\0")

    def close(self) -> None:
        """Unmap the memory and close the descriptor."""
        self._bytes.close()
        os.close(self.descriptor)


def _text(padded: bytes) -> str:
    return padded.rstrip(b"\0").decode()


class BegunTable:
    """The table, seen from a worker process. Thread-safe."""

    def __init__(self, memory: Memory, region: int) -> None:
        """Write into ``region``, and hold its lock until this process ends."""
        import fcntl  # not on Windows, where no process has a parent of this kind

        self._memory = memory
        self._region = region
        places = range(memory.layout.places)
        self._free = deque(memory.layout.place(region, place) for place in places)
        self._owners_seen = max(0, memory.counts()[1] - _OWNERS)
        fcntl.lockf(memory.descriptor, fcntl.LOCK_EX, 1, region)

    @classmethod
    def inherited(cls) -> BegunTable | None:
        """Return the table that the parent shares with this process, if any; only once."""
        numbers = os.environ.pop(_VARIABLE, "")
        if not numbers:
            return None
        descriptor, region, *sizes = map(int, numbers.split(":"))
        os.set_inheritable(descriptor, False)
        return cls(Memory(descriptor, Layout(*sizes)), region)

    @staticmethod
    def variables(memory: Memory, region: int) -> dict[str, str]:
        """Return the environment with which a child finds the table and its region."""
        numbers = (memory.descriptor, region, *memory.layout)
        return {_VARIABLE: ":".join(map(str, numbers))}

    def begin(self, key: bytes, losses: int = 0) -> int:
        """Note that a message begins; return its place.

        A message that finds none isn't noted, and its place is -1: if it kills the process, it is
        redelivered like one that was never begun.
        """
        try:
            place = self._free.popleft()
        except IndexError:
            return -1
        self._memory.write(place, key, losses)
        return place

    def end(self, place: int) -> None:
        """Note that the message in this place has ended.

        It can be read there until the place is taken again, after all others: its ack may not have
        been written yet.
        """
        if place >= 0:
            self._memory.end(place)
            self._free.append(place)

    def loss_of(self, key: bytes) -> Loss | None:
        """Return what is known of a message that was lost with its process, else None."""
        memory = self._memory
        losses: list[int] = []
        for region in range(memory.layout.regions):
            if region == self._region or not memory.is_in_use(region):
                continue
            if memory.is_spared(region) or not self._is_dead(region):
                continue
            for number in range(memory.layout.places):
                noted = memory.read(memory.layout.place(region, number))
                if noted is not None and noted.key == key:
                    losses.append(noted.losses + (not noted.has_ended))
        if losses:
            return Loss(max(losses), None)
        # Looked up last: the parent writes a grave before it clears the place.
        offset = memory.grave_of(key)
        grave = None if offset is None else memory.read(offset)
        return None if grave is None else Loss(grave.losses, grave.code)

    def forget(self, key: bytes) -> None:
        """Forget the losses of a message that has ended."""
        offset = self._memory.grave_of(key)
        if offset is not None:
            self._memory.clear(offset)

    def own(self, owner: str) -> None:
        """Note who leases rows for this process: at most 32 ASCII characters."""
        self._memory.set_owner_of(self._region, owner)

    def dead_owners(self) -> list[str]:
        """Return the owners of processes that have ended since the last call, at most 64.

        The first call returns those that had ended before this process started.
        """
        seen, written = self._owners_seen, self._memory.counts()[1]
        if seen == written:
            return []
        self._owners_seen = written
        return [self._memory.owner(number) for number in range(seen, written)[-_OWNERS:]]

    def close(self) -> None:
        """Clear all places: from now on, no end of this process is a message's doing."""
        for place in range(self._memory.layout.places):
            self._memory.clear(self._memory.layout.place(self._region, place))

    def _is_dead(self, region: int) -> bool:
        """Return whether the region's process has died.

        A process holds a lock of its region for as long as it lives. Not so its number: it is taken
        until the parent has noticed the death, which may be after the broker.
        """
        import fcntl

        descriptor = self._memory.descriptor
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, region)
        except OSError:
            return False
        fcntl.lockf(descriptor, fcntl.LOCK_UN, 1, region)
        return True
