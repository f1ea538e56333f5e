"""Event ids: UUIDv7 for new events, UUIDv5 for those that follow from a message."""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import time
import uuid
from collections.abc import Callable

from outbox.system import process

__all__ = ["follow_on_id", "new_id"]

# uuid5(NAMESPACE_URL, "outbox:follow-on"); part of the wire format, never changed.
_NAMESPACE = uuid.UUID("e5774d90-3923-58da-b073-bf72e018463f")
_NAMESPACE_HASH = hashlib.sha1(_NAMESPACE.bytes, usedforsecurity=False)

_VARIANT = 1 << 63
_RECENT = 100  # milliseconds


class _Millisecond:
    """What the ids of one millisecond have in common, and the numbers that tell them apart.

    By RFC 9562, section 6.2, method 2 (monotonic random): 48 bits of time, the version, 12 random
    bits; then the variant and 62 bits that begin at random, in the lower half so that they never
    reach the end (section 5.7), and grow by a step drawn for the millisecond.
    """

    __slots__ = ("lows", "number", "prefix")

    def __init__(self, number: int, bits: Callable[[int], int]) -> None:
        digits = f"{number:012x}7{bits(12):03x}"
        self.number = number
        self.prefix = f"{digits[:8]}-{digits[8:12]}-{digits[12:]}-"
        self.lows = itertools.count(_VARIANT | bits(61), 1 + bits(32))


class _Generator:
    """A generator of UUIDv7 that ascend within the process.

    No lock: a signal handler or a finalizer may make an id while it interrupts the making of
    another. Each step that matters is a single instruction, so that of two threads that see a new
    millisecond both continue with the same one.

    The random source is separate from :mod:`random`'s and seeded by the operating system, so that
    ``random.seed()`` in the application cannot make two processes draw the same ids.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Draw a new seed; called in a forked child before anything else."""
        self._bits = random.Random(os.urandom(32)).getrandbits
        self._latest = _Millisecond(0, self._bits)
        self._recent: dict[int, _Millisecond] = {}

    def new(self) -> str:
        now = time.time_ns() // 1_000_000
        latest = self._latest
        if now > latest.number:  # else the clock stands still or has been set back
            if len(self._recent) > _RECENT:
                self._recent = {}
            latest = self._recent.setdefault(now, _Millisecond(now, self._bits))
            self._latest = latest
        low = f"{next(latest.lows):x}"
        return f"{latest.prefix}{low[:4]}-{low[4:]}"


_generator = _Generator()
process.after_fork(_generator.reset)


def new_id() -> str:
    """Return a new UUIDv7 string (36 characters, lower case), ascending within the process.

    Thread-safe and fork-safe; usable in signal handlers and finalizers.
    """
    return _generator.new()


def follow_on_id(*parts: str) -> str:
    """Return the UUIDv5 string of ``parts``: the same parts give the same id, in any process."""
    # Length-prefixed, so that ("a", "bc") and ("ab", "c") differ.
    name = "".join([f"{len(part)}:{part}" for part in parts])
    hashed = _NAMESPACE_HASH.copy()  # what uuid.uuid5() does, at a third of the cost
    hashed.update(name.encode())
    digits = hashed.hexdigest()
    variant = "89ab"[int(digits[16], 16) & 3]
    return f"{digits[:8]}-{digits[8:12]}-5{digits[13:16]}-{variant}{digits[17:20]}-{digits[20:32]}"
