"""Event ids: UUIDv7 for new events, UUIDv5 for those that follow from a message."""

from __future__ import annotations

import os
import random
import threading
import time
import uuid

__all__ = ["follow_on_id", "new_id"]

# uuid5(NAMESPACE_URL, "outbox:follow-on"); part of the wire format, never changed.
_FOLLOW_ONS = uuid.UUID("e5774d90-3923-58da-b073-bf72e018463f")

_MILLISECOND = 1 << 74
_RANDOM_BITS = _MILLISECOND - 1


class _Generator:
    """UUIDv7 by RFC 9562, section 6.2, method 2 (monotonic random).

    Ids made in one process ascend: within a millisecond, or when the clock goes back, the
    last id's random part grows by a random step instead of being drawn anew. The source is its
    own generator, seeded by the operating system, so that ``random.seed()`` in the application
    cannot make two processes draw the same ids.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Draw a new seed; in a forked child, before anything else."""
        self._lock = threading.Lock()
        self._bits = random.Random(os.urandom(32)).getrandbits
        self._last = 0

    def new(self) -> str:
        now = time.time_ns() // 1_000_000 * _MILLISECOND
        with self._lock:
            if now > self._last | _RANDOM_BITS:
                value = now | self._bits(74)
            else:
                value = self._last + 1 + self._bits(32)
            self._last = value
        # 48 bits of time, version 7, 12 bits, variant 10, 62 bits (RFC 9562, section 5.7)
        high = f"{value >> 62:015x}"
        low = f"{value & 0x3FFFFFFFFFFFFFFF | 0x8000000000000000:x}"
        return f"{high[:8]}-{high[8:12]}-7{high[12:]}-{low[:4]}-{low[4:]}"


_generator = _Generator()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_generator.reset)


def new_id() -> str:
    """Return a new UUIDv7 string (36 characters, lower case), ascending within the process.

    Thread-safe and fork-safe.
    """
    return _generator.new()


def follow_on_id(*parts: str) -> str:
    """Return the UUIDv5 string of ``parts``: the same parts give the same id, in any process."""
    # Length-prefixed, so that ("a", "bc") and ("ab", "c") differ.
    return str(uuid.uuid5(_FOLLOW_ONS, "".join(f"{len(part)}:{part}" for part in parts)))
