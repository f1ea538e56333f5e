"""A row that waits to be written, and those who wait for that."""

from __future__ import annotations

import threading
from collections.abc import Callable

__all__ = ["PendingWrite"]


class PendingWrite:
    """A write that may not be over yet. Thread-safe.

    Attributes:
        is_over: whether it is over.
        refusal: why a task may not begin; empty if it may: see ``ResultsStore.write``.
        error: what made the write fail, or None.
        rejection: why the database refuses this row each time; empty if it doesn't.
    """

    __slots__ = ("_callbacks", "error", "is_over", "refusal", "rejection")

    def __init__(self) -> None:
        """Begin to wait."""
        self.is_over = False
        self.refusal = ""
        self.error: Exception | None = None
        self.rejection = ""
        self._callbacks: list[Callable[[], object]] = []

    def end(self, refusal: str = "", error: Exception | None = None) -> None:
        """Note that the write is over, and call what has waited for that."""
        self.refusal, self.error = refusal, error
        self.is_over = True
        if self._callbacks:
            self._call()

    def reject(self, reason: str) -> None:
        """Note that the write is over, since the database will never take the row."""
        self.rejection = reason
        self.end()

    def when_over(self, callback: Callable[[], object]) -> None:
        """Have ``callback`` called when it is over, on the thread that writes; or here, if it is.

        It must not block, nor raise an exception. Only one can be set.
        """
        self._callbacks.append(callback)
        if self.is_over:
            self._call()

    def _call(self) -> None:
        # Both threads may come here. Without a lock: only one of them gets the callback.
        try:
            callback = self._callbacks.pop()
        except IndexError:
            return
        callback()

    def wait(self) -> None:
        """Wait until it is over."""
        if not self.is_over:
            over = threading.Event()
            self.when_over(over.set)
            over.wait()
