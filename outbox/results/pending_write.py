"""A row that waits to be written, and those who wait for that."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["PendingWrite"]

_lock = threading.Lock()
"""Held for a moment: one for all takes less time to make than one for each."""


class PendingWrite:
    """A write that may not be over yet. Thread-safe.

    Attributes:
        is_over: whether it is over.
        refusal: why a task may not begin; empty if it may: see ``ResultsStore.write``.
        error: what made the write fail, or None.
    """

    __slots__ = ("_callback", "error", "is_over", "refusal")

    def __init__(self) -> None:
        """Begin to wait."""
        self.is_over = False
        self.refusal = ""
        self.error: Exception | None = None
        self._callback: Callable[[], object] | None = None

    def end(self, refusal: str = "", error: Exception | None = None) -> None:
        """Note that the write is over, and call what has waited for that."""
        self.refusal, self.error = refusal, error
        with _lock:
            self.is_over = True
            callback = self._callback
        if callback is not None:
            callback()

    def when_over(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called when it is over, on the thread that writes; or here, if it is.

        It must not block, nor raise an exception. Only one can be set.
        """
        with _lock:
            if not self.is_over:
                self._callback = callback
                return
        callback()

    def wait(self) -> None:
        """Wait until it is over."""
        if not self.is_over:
            over = threading.Event()
            self.when_over(over.set)
            over.wait()
