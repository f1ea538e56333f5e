"""Event ids: UUIDv7 for new events, UUIDv5 for those that follow from a message."""

from __future__ import annotations

import hashlib
import os
import random
import threading
import time
import uuid

from outbox.system import process

__all__ = ["follow_on_id", "new_id"]

# uuid5(NAMESPACE_URL, "outbox:follow-on"); part of the wire format, never changed.
_NAMESPACE = uuid.UUID("e5774d90-3923-58da-b073-bf72e018463f")
_NAMESPACE_HASH = hashlib.sha1(_NAMESPACE.bytes, usedforsecurity=False)

_VARIANT = 1 << 63


class _Generator:
    """A generator of UUIDv7 by RFC 9562, section 6.2, method 2 (monotonic random).

    The ids of a process ascend: within a millisecond, or when the clock goes back, the random part
    grows by a random step instead of being redrawn. The source is separate from :mod:`random`'s and
    seeded by the operating system, so that ``random.seed()`` in the application cannot make two
    processes draw the same ids.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Draw a new seed; called in a forked child before anything else."""
        self._lock = threading.Lock()
        self._bits = random.Random(os.urandom(32)).getrandbits
        self._millisecond = 0
        self._prefix = ""
        self._low = 0

    def new(self) -> str:
        now = time.time_ns() // 1_000_000
        with self._lock:
            if now > self._millisecond:
                # 48 bits of time, version 7, 12 random bits; then the variant and 62 bits, drawn
                # from the lower half, so that the steps never reach the end (section 5.7).
                self._millisecond = now
                digits = f"{now:012x}7{self._bits(12):03x}"
                self._prefix = f"{digits[:8]}-{digits[8:12]}-{digits[12:]}-"
                self._low = _VARIANT | self._bits(61)
            else:
                self._low += 1 + self._bits(32)
            low = f"{self._low:x}"
            return f"{self._prefix}{low[:4]}-{low[4:]}"


_generator = _Generator()
process.after_fork(_generator.reset)


def new_id() -> str:
    """Return a new UUIDv7 string (36 characters, lower case), ascending within the process.

    Thread-safe and fork-safe.
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
