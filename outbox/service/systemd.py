"""Says to systemd when a service is ready, reloads and stops, and that it is alive.

It needs no library: a message is one datagram of lines. See sd_notify(3) and, for reloading,
``Type=notify-reload`` in systemd.service(5).
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections import deque

from outbox.service.state import Service, ServiceState

__all__ = ["SystemdFace"]

logger = logging.getLogger("outbox.service")

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")
_STATUS_EVERY = 1.0
"""Seconds, at least, between two versions of the status line."""
_LONGEST_STATUS = 500


class SystemdFace:
    """Shows a service to systemd, which has started it. Used by one thread.

    It says READY=1 once all processes are ready, RELOADING=1 and then READY=1 when they are
    replaced, STOPPING=1, and WATCHDOG=1 while the parent's loop turns and can mend what breaks.
    """

    def __init__(self, address: str, watchdog: float | None = None) -> None:
        """Show it at ``address``.

        Args:
            address: a path, or ``@`` and a name that has no file.
            watchdog: the seconds after which systemd restarts a service that it hasn't heard of;
                None if it doesn't watch.
        """
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._alive_every = None if watchdog is None else watchdog / 3
        self._alive_at = 0.0
        self._is_ready = False
        self._is_stopping = False
        self._reloads = 0
        self._is_reloading = False
        self._status = ""
        self._status_at = 0.0
        self._has_failed = False
        self._pending: deque[bytes] = deque()

    @classmethod
    def inherited(cls) -> SystemdFace | None:
        """Return the face for the systemd that has started this process; None if none has.

        The variables are removed from the environment: programs that handlers start must not speak
        for the service.
        """
        address, microseconds, pid = (os.environ.pop(name, "") for name in _VARIABLES)
        if not address.startswith(("/", "@")):
            return None
        is_watched = microseconds.isdecimal() and pid in ("", str(os.getpid()))
        seconds = int(microseconds) / 1e6 if is_watched else 0.0
        return cls(address, seconds or None)

    def turn(self, service: Service) -> None:
        """Say what has changed, and that the service is alive."""
        state = service.state
        now = time.monotonic()
        self._send()
        if state.reloads != self._reloads:
            self._reloads = state.reloads
            self._is_reloading = True
            self._say("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")
        if self._is_reloading and not state.reloading and self._is_ready:
            self._is_reloading = False
            self._say("READY=1")
        if state.ready and not self._is_ready:
            self._is_ready = True
            self._is_reloading &= state.reloading
            self._say("READY=1")
        if state.phase in ("leaving", "stopping") and not self._is_stopping:
            self._is_stopping = True
            self._say("STOPPING=1")
        self._show_status(state, now)
        is_alive = state.mends and not self._pending
        if self._alive_every is not None and is_alive and now >= self._alive_at:
            self._alive_at = now + self._alive_every
            self._say("WATCHDOG=1")

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _show_status(self, state: ServiceState, now: float) -> None:
        consuming = sum(worker.phase == "ready" for worker in state.workers)
        status = f"{state.phase}: {consuming} of {state.slots} processes are ready"
        reasons = "; ".join(reason for reason in state.reasons if reason != state.phase)
        if reasons:
            status = f"{status} ({reasons})"
        status = " ".join(status.split())[:_LONGEST_STATUS]
        is_due = now - self._status_at >= _STATUS_EVERY and not self._pending
        if status != self._status and is_due:
            self._status, self._status_at = status, now
            self._say(f"STATUS={status}")

    def _say(self, *lines: str) -> None:
        self._pending.append("\n".join(lines).encode())
        self._send()

    def _send(self) -> None:
        """Send what is pending, in its order; what systemd has no room for waits for a turn."""
        while self._pending:
            try:
                self._socket.sendto(self._pending[0], self._address)
            except BlockingIOError:
                return
            except OSError as error:
                if not self._has_failed:
                    self._has_failed = True
                    logger.warning("cannot notify systemd: %s", error)
            self._pending.popleft()
