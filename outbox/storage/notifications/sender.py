"""Notifies those who listen, after commits and apart from them."""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import time
from collections.abc import Iterable
from typing import Any

from sqlalchemy import Engine

from outbox.errors import UsageError
from outbox.storage.failures import reason_of
from outbox.storage.notifications.channels import connected
from outbox.system.background_thread import BackgroundThread
from outbox.system.backoff import backoff
from outbox.telemetry import tracing

__all__ = ["Sender"]

logger = logging.getLogger("outbox.sql")

_PACE = 0.02
"""The seconds between two notifications: one is enough for all that is committed meanwhile."""

# The commit doesn't wait for the disk: meanwhile no other transaction that notifies, of whoever
# uses the server, could commit. What a power cut takes away here, no listener survives either.
_NOTIFY = (
    "SELECT set_config('synchronous_commit', 'off', true), pg_notify(channel, '') "
    "FROM unnest(%s::text[]) AS channel"
)


class Sender:
    """Sends notifications on a background thread, over a connection apart. Thread-safe.

    At once, and then at most one every 20 ms. The connection is opened when needed, and closed
    when it isn't used. A failure is logged and otherwise ignored: those who listen look for
    themselves, too.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        idle_timeout: float = 60.0,
        those: str = "workers or relays, which look for events",
    ) -> None:
        """Prepare to send; nothing is connected yet, and no thread runs.

        Args:
            engine: an engine for a PostgreSQL database, see ``can_listen``. It may be shared.
            idle_timeout: the seconds after which an unused connection is closed.
            those: who listens and does what otherwise, for the warning when nothing can be sent.
        """
        self._engine = engine
        self._those = those
        self._idle_timeout = idle_timeout
        self._requests: queue.SimpleQueue[Iterable[str] | None] = queue.SimpleQueue()
        self._thread = BackgroundThread(lambda: None, self._run, name="outbox-notify")
        # Of the thread alone; kept here so that a forked child doesn't close the connection.
        self._connection: Any = None
        self._failures = 0
        self._retry_at = 0.0

    def make_ready(self) -> None:
        """Start the thread now, since Python may refuse that later, while it exits.

        Raises:
            UsageError: a thread can't work in this process, or must not be started yet.
            RuntimeError: the system has no more threads.
        """
        self._thread.start_now()

    def notify(self, channels: Iterable[str]) -> None:
        """Notify ``channels`` soon, of what has been committed; never wait or raise."""
        self._requests.put(channels)
        # Without a thread, those who listen find it when they look.
        with contextlib.suppress(UsageError, RuntimeError):
            self._thread.start()

    def close(self, timeout: float = 1.0) -> None:
        """Send what was asked for, for at most ``timeout`` seconds, and disconnect."""
        if not self._requests.empty():
            with contextlib.suppress(UsageError, RuntimeError):
                self._thread.start_now()
        if not self._thread.cancel():
            self._requests.put(None)
            self._thread.join(timeout)

    # ------------------------------------------------------------------------------ on the thread

    def _run(self) -> None:
        sent_at = -math.inf
        while True:
            channels, is_last = self._next(sent_at)
            if channels and time.monotonic() >= self._retry_at:
                self._try_to_send(sorted(channels))
                sent_at = time.monotonic()
            if is_last:
                break
        self._disconnect()

    def _next(self, sent_at: float) -> tuple[set[str], bool]:
        """Wait for requests; return the channels of all, and whether to end."""
        try:
            with self._thread.pause:
                request = self._requests.get(
                    timeout=None if self._connection is None else self._idle_timeout
                )
                time.sleep(max(0.0, sent_at + _PACE - time.monotonic()))
        except queue.Empty:
            self._disconnect()
            return set(), False
        channels: set[str] = set()
        with contextlib.suppress(queue.Empty):
            while request is not None:
                channels.update(request)
                request = self._requests.get_nowait()
            return channels, True
        return channels, False

    def _try_to_send(self, channels: list[str]) -> None:
        try:
            if self._connection is not None:
                # It may have been closed since it was used.
                with contextlib.suppress(Exception):
                    self._send(channels)
                    return
                self._disconnect()
            self._send(channels)
        except Exception as error:
            self._disconnect()
            if not self._failures:
                logger.warning(
                    "cannot notify %s without that, too: %s",
                    self._those,
                    reason_of(error),
                )
            self._retry_at = time.monotonic() + backoff(self._failures)
            self._failures += 1

    def _send(self, channels: list[str]) -> None:
        with tracing.hidden():
            if self._connection is None:
                self._connection = connected(self._engine)
            with contextlib.closing(self._connection.cursor()) as cursor:
                cursor.execute(_NOTIFY, (channels,))
        self._failures = 0

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with contextlib.suppress(Exception):
                connection.close()
