"""The two line protocols between a parent and its process.

The process writes JSON objects to its status pipe, one a line; the parent writes words to the
lifeline. Neither side ever waits for the other: a parent that is stopped by a debugger doesn't stop
its workers, and a worker whose interpreter hangs doesn't stop its parent.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Mapping
from typing import Any

__all__ = ["LONGEST_LINE", "LineReader", "LineWriter"]

LONGEST_LINE = 2**20
"""Bytes of the longest line; a longer one is dropped."""

_CHUNK = 65536
_READS = 32
"""Chunks, at most, that one call reads, so that a process that writes on and on doesn't stop the
others."""


class LineWriter:
    """Writes JSON lines to a pipe, and never blocks. Thread-safe, but not for signal handlers."""

    def __init__(self, descriptor: int) -> None:
        """Write to ``descriptor``, which becomes non-blocking; the caller closes it."""
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._lock = threading.Lock()
        self._pending = b""

    def say(self, line: Mapping[str, Any]) -> None:
        """Write a line that must arrive: while the pipe is full, it is kept."""
        with self._lock:
            self._pending += _encoded(line)
            self._flush()

    def report(self, line: Mapping[str, Any]) -> bool:
        """Write a line that the next one replaces, or drop it while the pipe is full.

        Returns:
            Whether it was written or, once begun, will be.
        """
        with self._lock:
            self._flush()
            if self._pending:
                return False
            encoded = _encoded(line)
            if len(encoded) > LONGEST_LINE:
                return False
            self._pending = encoded
            self._flush()
            if len(self._pending) == len(encoded):
                self._pending = b""
                return False
            return True

    def _flush(self) -> None:
        try:
            while self._pending:
                self._pending = self._pending[os.write(self._descriptor, self._pending) :]
        except BlockingIOError:
            pass
        except OSError:  # the parent is dead: the lifeline says so
            self._pending = b""


class LineReader:
    """Reads JSON lines from a pipe, and never blocks. Used by one thread."""

    def __init__(self, descriptor: int) -> None:
        """Read from ``descriptor``, which becomes non-blocking; ``close()`` closes it."""
        os.set_blocking(descriptor, False)
        self._descriptor = descriptor
        self._begun = b""
        self._skipping = False

    @property
    def descriptor(self) -> int | None:
        """The descriptor that becomes readable with the next line; None once none can come."""
        return self._descriptor if self._descriptor >= 0 else None

    def read(self) -> list[dict[str, Any]]:
        """Return the lines that have arrived; anything but a JSON object is dropped."""
        lines: list[bytes] = []
        for _ in range(_READS):
            if self._descriptor < 0:
                break
            try:
                chunk = os.read(self._descriptor, _CHUNK)
            except BlockingIOError:
                break
            if not chunk:
                self.close()
                break
            lines += self._split(chunk)
        return [decoded for line in lines if (decoded := _decoded(line)) is not None]

    def close(self) -> None:
        """Close the descriptor."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def _split(self, chunk: bytes) -> list[bytes]:
        *lines, rest = (self._begun + chunk).split(b"\n")
        if self._skipping and lines:  # the end of a line that was too long
            del lines[0]
            self._skipping = False
        if len(rest) > LONGEST_LINE or self._skipping:
            rest, self._skipping = b"", True
        self._begun = rest
        return lines


def _encoded(line: Mapping[str, Any]) -> bytes:
    return json.dumps(line, separators=(",", ":"), default=str).encode() + b"\n"


def _decoded(line: bytes) -> dict[str, Any] | None:
    try:
        decoded = json.loads(line)
    except ValueError:
        return None
    return decoded if isinstance(decoded, dict) else None
