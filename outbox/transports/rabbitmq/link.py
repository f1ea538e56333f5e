"""Keeps one connection to a broker open, on one daemon thread of its own."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from typing import Protocol

import pika

from outbox.errors import BrokerError, ConnectionLost
from outbox.system import threads
from outbox.system.backoff import backoff
from outbox.transports.rabbitmq import pika_connection, pika_errors

__all__ = ["Link", "Session", "quiet_pika"]

logger = logging.getLogger("outbox.link")

_CLOSE_TIMEOUT = 2.0
_CLOSING_TURNS = 50


class Session(Protocol):
    """What a link serves. All methods are called on the link's thread."""

    def opened(self, connection: pika_connection.Connection) -> None:
        """Begin to use a new connection; call ``link.ready()`` once it serves its purpose."""
        ...

    def closed(self, error: BrokerError) -> None:
        """Forget the connection: it ended, or an attempt to open one failed."""
        ...


class Link:
    """One connection at a time, reopened with back-off for as long as the link is not stopped.

    ``start``, ``call`` and ``stop`` may be called from any thread; everything else only on the
    link's own.
    """

    def __init__(
        self, hosts: Sequence[pika.ConnectionParameters], session: Session, *, name: str
    ) -> None:
        self._hosts = hosts
        self._session = session
        self._name = name
        self._loop: pika_connection.Loop  # made at the start: it holds sockets
        self._services: pika_connection.IOServices
        self._thread: threading.Thread | None = None  # likewise: threads may yet be patched
        self._start_lock = threading.Lock()
        self._connection: pika_connection.Connection | None = None
        self._host = 0
        self._failures = 0
        self._reconnect: object | None = None
        self._stopping = False

    @property
    def on_thread(self) -> bool:
        """Whether the caller runs on the link's thread."""
        return threading.current_thread() is self._thread

    @property
    def address(self) -> str:
        """The host and port in use, or tried next."""
        parameters = self._hosts[self._host % len(self._hosts)]
        return f"{parameters.host}:{parameters.port}"

    def start(self) -> None:
        """Start the thread and begin to connect, unless that has been done.

        Raises:
            UsageError: the threads that there are by now would not do.
        """
        if self._thread is None:
            with self._start_lock:
                if self._thread is None and not self._stopping:
                    threads.check_start()
                    quiet_pika()
                    self._loop = pika_connection.Loop()
                    self._services = pika_connection.IOServices(self._loop)
                    self._loop.add_callback_threadsafe(self._connect)
                    self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                    try:
                        self._thread.start()
                    except RuntimeError:  # there can be no more threads; the next caller tries
                        self._thread = None
                        self._loop.close()
                        raise

    def call(self, function: Callable[[], None]) -> None:
        """Have ``function`` called on the link's thread, soon; never, if it was not started."""
        if self._thread is not None:
            self._loop.add_callback_threadsafe(function)

    def later(self, delay: float, function: Callable[[], None]) -> None:
        """Have ``function`` called in ``delay`` seconds, whatever becomes of the connection."""
        self._loop.call_later(delay, function)

    def ready(self) -> None:
        """Note that the connection serves its purpose: the back-off starts anew."""
        self._failures = 0

    def fail(self, error: BrokerError) -> None:
        """Give the connection up and open another one after the back-off."""
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed:
            pika_connection.abort(connection, error)
        self._lost(error)

    def hurry(self) -> None:
        """Connect now rather than at the end of the back-off."""
        if self._reconnect is not None:
            self._loop.remove_timeout(self._reconnect)  # type: ignore[arg-type]
            self._connect()

    def stop(self, *, graceful: bool = True) -> None:
        """Close the connection and end the thread, within about 2 seconds."""
        with self._start_lock:
            self._stopping = True
            thread = self._thread
        if thread is not None and thread.is_alive():
            self.call(self._close if graceful else self._end)
            if not self.on_thread:
                thread.join(_CLOSE_TIMEOUT + 1)

    def _run(self) -> None:
        while True:
            try:
                self._loop.start()
            except pika_connection.Forked:
                # All that is open is the parent's. Nor can it end: threading, which has forgotten
                # it at the fork, would complain.
                threading.Event().wait()
            except BaseException as error:  # a bug, ours or pika's, must not end publishing
                logger.exception("the connection to %s is given up", self.address)
                self.fail(pika_errors.connection_lost(error, self.address))
            else:
                break
        self._loop.close()

    def _connect(self) -> None:
        self._reconnect = None
        if self._stopping or self._connection is not None:
            return
        logger.debug("connecting to %s", self.address)
        self._connection = pika_connection.Connection(
            self._hosts[self._host % len(self._hosts)],
            on_open_callback=self._on_open,
            on_open_error_callback=self._on_open_error,
            on_close_callback=self._on_close,
            custom_ioloop=self._services,
        )

    def _on_open(self, connection: pika_connection.Connection) -> None:
        if connection is self._connection:
            logger.info("connected to %s", self.address)
            self._session.opened(connection)

    def _on_open_error(self, connection: pika.SelectConnection, error: BaseException) -> None:
        if connection is self._connection:
            self._connection = None
            self._lost(pika_errors.connect_failed(error, self.address))

    def _on_close(self, connection: pika.SelectConnection, error: BaseException) -> None:
        if connection is self._connection:
            self._connection = None
            if self._stopping:
                self._end()
            else:
                self._lost(pika_errors.connection_lost(error, self.address))

    def _lost(self, error: BrokerError) -> None:
        if self._stopping:
            self._end()
            return
        self._host += 1
        round_trips, position = divmod(self._failures, len(self._hosts))
        delay = backoff(round_trips) if position == len(self._hosts) - 1 else 0.0
        self._failures += 1
        level = logging.WARNING if self._failures == 1 else logging.DEBUG
        logger.log(level, "%s; the next attempt is in %.1f s", error, delay)
        self._session.closed(error)
        if self._reconnect is None:
            self._reconnect = self._loop.call_later(delay, self._connect)

    def _close(self) -> None:
        connection = self._connection
        if connection is None or not connection.is_open:
            self._end()
            return
        self._loop.call_later(_CLOSE_TIMEOUT, self._end)
        connection.close()

    def _end(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed:
            pika_connection.abort(connection, ConnectionLost("the link was stopped"))
        self._finish(connection, _CLOSING_TURNS)

    def _finish(self, connection: pika.SelectConnection | None, turns: int) -> None:
        """End the loop, once pika has closed what it has opened: that takes some turns of it."""
        if connection is None or connection.is_closed or not turns:
            self._loop.stop()
        else:
            self._loop.call_later(0.005, lambda: self._finish(connection, turns - 1))


def quiet_pika() -> None:
    """Keep pika's own log quiet, unless the application has set its level.

    pika writes several lines and tracebacks at ERROR for each attempt to connect; what matters of
    them is in ours.
    """
    driver = logging.getLogger("pika")
    if driver.level == logging.NOTSET:
        driver.setLevel(logging.CRITICAL)
