"""Listens for notifications, and makes sure that they arrive."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import random
import select
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import Engine

from outbox.storage.failures import reason_of
from outbox.storage.notifications.channels import connected
from outbox.system.background_thread import BackgroundThread
from outbox.system.backoff import backoff
from outbox.telemetry import tracing

__all__ = ["Listener"]

_PROBE = 1.0
"""The seconds in which a notification to oneself must arrive."""

_QUIET = 15.0
"""The seconds without any notification after which another one to oneself is sent."""

_LOOK = 1.0
"""The seconds between two looks at whether a listener is still needed, if that can end."""

_SPREAD = 0.02
"""The seconds over which those are spread that have found nothing after the last notification."""


class _NotNotified(Exception):
    """LISTEN was accepted, but notifications don't arrive."""


class Listener:
    """Listens on channels, on a background thread and over a connection apart.

    A connection that doesn't fail may yet deliver nothing: a pooler in transaction mode accepts
    LISTEN, and after a failover the other end may be gone. So the listener sends a
    notification to itself, at first and whenever it has heard nothing for 15 s, and takes another
    connection if it doesn't arrive within a second. Between two attempts are up to 30 s.

    Attributes:
        is_proven: whether notifications arrive; else look for rows without them.
        has_found: to be set to True when a look has found rows. Who has found none since the last
            notification is woken up to 20 ms later than others: they may take what there is.
    """

    def __init__(
        self,
        engine: Engine,
        channels: Sequence[str],
        wake: Callable[[], None],
        *,
        logger: logging.Logger,
        remedy: str,
        notifying: Engine | None = None,
        is_needed: Callable[[], bool] | None = None,
    ) -> None:
        """Prepare to listen, without connecting yet.

        Args:
            engine: the engine to connect with, for a PostgreSQL database; see ``can_listen``.
            channels: the channels to listen on.
            wake: called on the thread after notifications, and whenever :attr:`is_proven` changes:
                look for rows then, since what was committed before LISTEN took effect is not
                announced.
            logger: gets a warning when notifications don't arrive, once until they do.
            remedy: what is done without notifications, and how they could arrive, for the warning.
            notifying: the engine through which others notify, for probes; by default ``engine``.
            is_needed: called on the thread every second; once it returns False, the listener
                ends without :meth:`stop`. None to listen until then.
        """
        self._engine = engine
        self._notifying = notifying or engine
        self._channels = channels
        self._wake = wake
        self._logger = logger
        self._remedy = remedy
        self._is_needed = is_needed
        self._is_unneeded = False
        # The same at every attempt, since poolers keep connections that listen.
        self._probe_channel = f"outbox_probe_{uuid.uuid4().hex}"
        self._thread = BackgroundThread(self._prepare, self._run, name="outbox-listen")
        self._stopping = False
        self._stop_pipe = (-1, -1)
        self.is_proven = False
        self.has_found = True

    def start(self) -> None:
        """Start listening.

        Raises:
            UsageError: a thread can't work in this process, or must not be started yet.
            RuntimeError: the system has no more threads.
            OSError: the system has no more file descriptors.
        """
        self._thread.start_now()

    def stop(self, timeout: float = 2.0) -> None:
        """Stop listening, and wait at most ``timeout`` seconds until the thread has ended."""
        if self._thread.cancel() or self._stopping:
            return
        self._stopping = True
        os.close(self._stop_pipe[1])
        self._thread.join(timeout)

    def _prepare(self) -> None:
        self._stop_pipe = os.pipe()

    # ------------------------------------------------------------------------------ on the thread

    def _run(self) -> None:
        failures = 0
        is_warned = False
        while not self._is_over():
            connection: Any = None
            try:
                with tracing.hidden():
                    connection = connected(self._engine)
                    self._begin(connection)
                    if is_warned:
                        self._logger.info("notifications arrive again")
                    failures, is_warned = 0, False
                    self._note(is_proven=True)
                    self._listen(connection)
            except Exception as error:
                self._note(is_proven=False)
                # Once: with a pooler in transaction mode LISTEN never works.
                level = logging.DEBUG if is_warned else logging.WARNING
                self._logger.log(level, "LISTEN failed: %s; %s", reason_of(error), self._remedy)
                is_warned = True
            finally:
                with contextlib.suppress(Exception):
                    if connection is not None:
                        connection.close()
            self._rest(backoff(failures))
            failures += 1
        os.close(self._stop_pipe[0])
        if self._is_unneeded and not self._stopping:
            self._stopping = True
            os.close(self._stop_pipe[1])

    def _rest(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._is_over() and (remaining := until - time.monotonic()) > 0:
            self._wait((), remaining if self._is_needed is None else min(remaining, _LOOK))

    def _is_over(self) -> bool:
        # Once is enough: by the next time, another listener may be needed.
        if self._is_needed is not None and not self._is_unneeded:
            self._is_unneeded = not self._is_needed()
        return self._stopping or self._is_unneeded

    def _note(self, *, is_proven: bool) -> None:
        if self.is_proven or is_proven:
            self.is_proven = is_proven
            self._wake()

    def _begin(self, connection: Any) -> None:
        """Prove that notifications arrive, and listen.

        Raises:
            _NotNotified: they don't.
        """
        # First on a channel that is never used otherwise: the connections of a pooler that listen
        # go on doing so, and it has no use for notifications.
        self._execute(connection, f'LISTEN "{self._probe_channel}"')
        payload = self._send_probe()
        deadline = time.monotonic() + _PROBE
        awaited = self._probe_channel, payload
        while awaited not in _received(connection) and not self._stopping:
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise _NotNotified("notifications do not arrive")
            self._wait((connection.fileno(),), remaining)
        for channel in self._channels:
            self._execute(connection, f'LISTEN "{channel}"')

    def _listen(self, connection: Any) -> None:
        """Listen until it is time to stop.

        Raises:
            _NotNotified: notifications don't arrive any more.
        """
        sent, due = "", time.monotonic() + _QUIET
        while not self._is_over():
            received = _received(connection)
            if received:
                sent, due = "", time.monotonic() + _QUIET
            if any(channel != self._probe_channel for channel, _ in received):
                if not self.has_found:
                    self._wait((), random.uniform(0, _SPREAD))
                self.has_found = False
                self._wake()
            if time.monotonic() >= due:
                if sent:
                    raise _NotNotified("notifications do not arrive any more")
                sent, due = self._send_probe(), time.monotonic() + _PROBE
            pause = due - time.monotonic()
            if self._is_needed is not None:
                pause = min(pause, _LOOK)
            self._wait((connection.fileno(),), pause)

    def _send_probe(self) -> str:
        """Send a notification to this listener, over another connection; return its payload.

        Over the same one it would prove nothing: then it comes with the statement's answer.
        """
        payload = uuid.uuid4().hex
        connection = connected(self._notifying)
        with contextlib.closing(connection), contextlib.closing(connection.cursor()) as cursor:
            cursor.execute("SELECT pg_notify(%s, %s)", (self._probe_channel, payload))
        return payload

    def _execute(self, connection: Any, statement: str) -> None:
        with contextlib.closing(connection.cursor()) as cursor:
            cursor.execute(statement)

    def _wait(self, descriptors: tuple[int, ...], seconds: float) -> None:
        """Wait until a descriptor is readable, it is time to stop, or ``seconds`` are over."""
        if self._stopping:
            return
        poll = select.poll()  # select() has no room for descriptors above 1,023
        for descriptor in (*descriptors, self._stop_pipe[0]):
            poll.register(descriptor, select.POLLIN)
        with self._thread.pause:
            poll.poll(math.ceil(max(0.0, seconds) * 1000))


def _received(connection: Any) -> set[tuple[str, str]]:
    """Return channel and payload of the notifications that have arrived, without waiting.

    Raises:
        Exception: the driver's, if the connection is lost.
    """
    protocol = getattr(connection, "pgconn", None)
    if protocol is None:  # psycopg2
        connection.poll()
        received = {(each.channel, each.payload) for each in connection.notifies}
        connection.notifies.clear()
        return received
    # Not Connection.notifies(), which waits, before psycopg 3.2 without a limit.
    protocol.consume_input()
    received = set()
    while notification := protocol.notifies():
        received.add((notification.relname.decode(), notification.extra.decode()))
    return received
