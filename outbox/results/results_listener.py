"""Wakes those in this process who wait for results, when a worker has written some."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
from collections.abc import Callable, Iterator

from sqlalchemy import Engine

from outbox.errors import UsageError
from outbox.storage.notifications import RESULTS_CHANNEL, Listener, can_listen

__all__ = ["ResultsListener"]

logger = logging.getLogger("outbox")

_IDLE = 2.0
"""The seconds for which the connection is kept that listens, once the last one has waited."""
_LATER = 600.0
"""The seconds until it is tried again after a listener that heard nothing."""

_REMEDY = (
    "looking for results forty times a second instead. Behind a pooler in transaction mode, where "
    "notifications don't arrive, name a URL that leads to PostgreSQL itself with ?listen= in the "
    "URL of the results, or ?listen=no"
)


class ResultsListener:
    """One listener for all who wait, while any do. Thread-safe."""

    def __init__(self, listening: Engine | None, notifying: Engine) -> None:
        """Prepare, without connecting.

        Args:
            listening: the engine to listen with; None for never.
            notifying: the engine through which workers notify.
        """
        self._engine = listening if listening is not None and can_listen(listening) else None
        self._notifying = notifying
        self._lock = threading.Lock()
        self._wakes: list[Callable[[], object]] = []
        self._listener: Listener | None = None
        self._until = 0.0
        self._not_before = -math.inf

    @property
    def is_proven(self) -> bool:
        """Whether notifications are known to arrive; else look without them."""
        listener = self._listener
        return listener is not None and listener.is_proven

    @contextlib.contextmanager
    def calling(self, wake: Callable[[], object]) -> Iterator[None]:
        """Call ``wake`` in the block, on another thread, when there may be new results.

        And whenever :attr:`is_proven` changes. It must not block. See :meth:`listen`.
        """
        with self._lock:
            self._wakes.append(wake)
        try:
            yield
        finally:
            with self._lock:
                self._wakes.remove(wake)
                self._until = time.monotonic() + _IDLE

    def listen(self) -> None:
        """Begin to listen, unless that was done, for as long as there are calls to make."""
        if self._listener is not None or self._engine is None:
            return
        with self._lock:
            if self._listener is not None or time.monotonic() < self._not_before:
                return
            listener = self._listener = Listener(
                self._engine,
                [RESULTS_CHANNEL],
                self._wake,
                logger=logger,
                remedy=_REMEDY,
                notifying=self._notifying,
                is_needed=self._is_needed,
            )
        try:
            listener.start()
        except (UsageError, RuntimeError, OSError):  # those who wait look for themselves
            with self._lock:
                self._listener = None
                self._not_before = time.monotonic() + _LATER

    def _wake(self) -> None:
        listener = self._listener
        if listener is not None:
            listener.has_found = True  # no one else takes what is announced
        for wake in list(self._wakes):
            with contextlib.suppress(RuntimeError):  # an event loop has been closed
                wake()

    def _is_needed(self) -> bool:
        with self._lock:
            if self._wakes or time.monotonic() < self._until:
                return True
            if not self.is_proven:
                self._not_before = time.monotonic() + _LATER
            self._listener = None
            return False
