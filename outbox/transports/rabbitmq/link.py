"""Keeps a connection to a broker open, on a daemon thread.

Only that thread uses the connection, since pika isn't thread-safe. A failure may be reported twice:
by the code that noticed it, and some turns of the loop later by pika's callbacks. So a connection
that is given up is detached from the link first, and callbacks of a detached one are ignored.
"""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol

import pika

from outbox.credentials import CredentialsProvider
from outbox.errors import BrokerError, ConnectFailed, ConnectionLost
from outbox.system.background_thread import BackgroundThread
from outbox.system.backoff import backoff
from outbox.transports.outages import outages
from outbox.transports.rabbitmq import pika_connection, pika_errors
from outbox.transports.rabbitmq.login import Login

__all__ = ["Link", "Session", "quiet_pika"]

logger = logging.getLogger("outbox.link")

_CLOSE_TIMEOUT = 2.0
_CLOSING_TURNS = 50
_CHECKS = 4  # for each heartbeat


class Session(Protocol):
    """The user of a link's connections. All methods are called on the link's thread."""

    def opened(self, connection: pika_connection.Connection) -> None:
        """Start using a new connection; call ``link.ready()`` once it does its work."""
        ...

    def closed(self, error: BrokerError) -> None:
        """Forget the connection: it was lost, or could not be opened."""
        ...


def _nothing() -> None: ...


class Link:
    """One connection at a time, reopened with back-off until the link is stopped.

    ``start``, ``call`` and ``stop`` may be called from any thread, and from signal handlers and
    finalizers, all else only on the link's thread.
    """

    def __init__(
        self,
        hosts: Sequence[pika.ConnectionParameters],
        session: Session,
        *,
        name: str,
        on_started: Callable[[], None] = _nothing,
        on_ended: Callable[[], None] = _nothing,
        kept: Callable[[], int] = lambda: 0,
        credentials: CredentialsProvider | None = None,
    ) -> None:
        """Create a link, without starting it.

        Args:
            hosts: the hosts of the broker, in the order in which they are tried.
            session: the user of the connections.
            name: the name of the thread.
            on_started: a function called on the thread before the first connection.
            on_ended: a function called on the thread when the link was stopped.
            kept: returns the number of events that wait for the connection, for the log.
            credentials: asked before each attempt to connect; None to use those of ``hosts``.
        """
        self._hosts = hosts
        self._login = None if credentials is None else Login(credentials)
        self._broker = tuple((host.host, host.port) for host in hosts)
        self._kept = kept
        self._session = session
        self._on_started = on_started
        self._on_ended = on_ended
        self._loop: pika_connection.Loop  # made at the start: it opens sockets
        self._services: pika_connection.IOServices
        self._thread = BackgroundThread(self._prepare, self._run, name=name)
        self._connection: pika_connection.Connection | None = None
        self._apart: set[ConnectionApart] = set()
        self._host = 0
        self._failures = 0
        self._reconnect: object | None = None
        self._wanted = False
        self._stopping = False
        self._ending = False
        self._ended = False

    @property
    def on_thread(self) -> bool:
        """Whether the caller runs on the link's thread."""
        return threading.get_ident() == self._thread.ident

    @property
    def address(self) -> str:
        """The host and port in use, or tried next."""
        parameters = self._hosts[self._host % len(self._hosts)]
        return f"{parameters.host}:{parameters.port}"

    def start(self) -> None:
        """Have the thread started, which connects, unless that has been done.

        Raises:
            UsageError: a thread can't work in this process, or must not be started yet.
        """
        if not self._wanted:
            self._wanted = True
            self.call(self._connect)
        if not self._thread.started:
            self._thread.start()

    def start_now(self, *, connect: bool = True) -> None:
        """Start the thread and wait until it runs; it connects unless ``connect`` is False.

        Raises:
            UsageError: a thread can't work in this process, or must not be started yet.
        """
        self._wanted = self._wanted or connect
        self._thread.start_now()

    def cancel_start(self) -> bool:
        """Prevent a later start; return whether there was none yet."""
        return self._thread.cancel()

    def call(self, function: Callable[[], None]) -> None:
        """Call ``function`` soon on the link's thread; do nothing if it wasn't started."""
        loop: pika_connection.Loop | None = getattr(self, "_loop", None)
        if loop is not None:
            loop.add_callback_threadsafe(function)

    def ping(self, answer: Callable[[], None]) -> bool:
        """Have ``answer`` called soon on the link's thread; return False if it doesn't run."""
        if not self._thread.started or self._ended:
            return False
        self.call(answer)
        return True

    def later(self, delay: float, function: Callable[[], None]) -> None:
        """Call ``function`` in ``delay`` seconds, even if the connection is lost meanwhile."""
        self._loop.call_later(delay, function)

    def connect_apart(
        self,
        opened: Callable[[pika_connection.Connection], None],
        ended: Callable[[int, str], None],
    ) -> ConnectionApart:
        """Open another connection to the broker in use.

        Args:
            opened: the callback for the open connection.
            ended: the callback when it could not be opened, or has ended without being closed here:
                the code with which the broker ended it because of an error, else 0; and why.
        """
        host = self._hosts[self._host % len(self._hosts)]
        apart = ConnectionApart(host, self._services, self._apart, opened, ended)
        if self._login is None:
            apart.connect()
        else:
            self._login.prepare_beside(host, self._loop, apart.connect)
        return apart

    def ready(self) -> None:
        """Reset the back-off, because the connection does its work.

        An open connection alone isn't enough: if each one failed right after it was opened, the
        link would never back off.
        """
        self._failures = 0
        seconds = outages.ended(self._broker)
        if seconds >= 1:
            logger.warning("%s works again, after %.0f s", self.address, seconds)

    def fail(self, error: BrokerError) -> None:
        """Give up the connection, and open another one after the back-off."""
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed:
            pika_connection.abort(connection, error)
        self._lost(error)

    def hurry(self) -> None:
        """Connect now, not at the end of the back-off."""
        if self._reconnect is not None:
            self._loop.remove_timeout(self._reconnect)  # type: ignore[arg-type]
            self._connect()

    def stop(self, *, graceful: bool = True) -> bool:
        """Close the connection and end the thread; return whether it has ended, within 3 seconds.

        True also if it was never started, and from now on won't be.
        """
        self._stopping = True
        if self._thread.cancel():
            return True
        self.call(self._close if graceful else self._end)
        return not self.on_thread and self._thread.join(_CLOSE_TIMEOUT + 1)

    def _prepare(self) -> None:
        quiet_pika()
        loop = pika_connection.Loop()
        self._services = pika_connection.IOServices(loop)
        loop.add_callback_threadsafe(self._on_started)
        loop.add_callback_threadsafe(self._connect)
        self._loop = loop

    def _run(self) -> None:
        self._loop.pause = self._thread.pause
        while not self._ended:
            try:
                self._loop.start()
            except pika_connection.Forked:
                # All open sockets are the parent's. The greenlet can't even end: threading, which
                # forgot it at the fork, would raise.
                threading.Event().wait()
            except BaseException as error:  # a bug in outbox or pika must not end publishing
                logger.exception("unexpected error with %s; reconnecting", self.address)
                self.fail(pika_errors.connection_lost(error, self.address))
        self._on_ended()
        self._loop.close()

    def _connect(self) -> None:
        self._reconnect = None
        if self._stopping or self._connection is not None or not self._wanted:
            return
        logger.debug("connecting to %s", self.address)
        host = self._hosts[self._host % len(self._hosts)]
        if self._login is not None:
            try:
                self._login.prepare(host, self.address)
            except ConnectFailed as error:
                self._lost(error)
                return
        self._connection = pika_connection.Connection(
            host,
            on_open_callback=self._on_open,
            on_open_error_callback=self._on_open_error,
            on_close_callback=self._on_close,
            custom_ioloop=self._services,
        )

    def _on_open(self, connection: pika_connection.Connection) -> None:
        if connection is self._connection:
            logger.info("connected to %s", self.address)
            heartbeat = connection.params.heartbeat
            if isinstance(heartbeat, int) and heartbeat:  # as negotiated
                self._watch_silence(connection, heartbeat, -1, 0)
            if self._login is not None:
                self._login.keep_valid(connection, self._loop, self.address)
            self._session.opened(connection)

    def _watch_silence(
        self, connection: pika_connection.Connection, heartbeat: int, received: int, silent: int
    ) -> None:
        """Give the connection up when not even a heartbeat has arrived for the agreed time.

        The broker sends one twice in that time. pika would notice only after more than twice of
        it. Checks are counted, not seconds: after a pause of this process, data may wait unread.
        """
        if connection is not self._connection:
            return
        silent = silent + 1 if connection.bytes_received == received else 0
        if silent >= _CHECKS:
            error = f"nothing was received from {self.address} for {heartbeat} s, no heartbeat even"
            self.fail(ConnectionLost(error))
            return
        received = connection.bytes_received
        reference = weakref.ref(connection)  # or each timer would hold a closed connection

        def look_again() -> None:
            if (watched := reference()) is not None:
                self._watch_silence(watched, heartbeat, received, silent)

        self._loop.call_later(heartbeat / _CHECKS, look_again)

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
        address = self.address
        # Hosts are tried one after the other without a pause; the back-off follows the last one.
        self._host += 1
        rounds, position = divmod(self._failures, len(self._hosts))
        delay = backoff(rounds) if position == len(self._hosts) - 1 else 0.0
        self._failures += 1
        text = outages.failed(self._broker, address, str(error), self, self._kept)
        level = logging.WARNING if text else logging.DEBUG
        logger.log(level, "%s; retrying in %.1f s", text or error, delay)
        self._session.closed(error)
        if self._reconnect is None:
            self._reconnect = self._loop.call_later(delay, self._connect)

    def _close(self) -> None:
        connection = self._connection
        if connection is not None and connection.is_closing:
            return  # stopped before
        if connection is None or not connection.is_open:
            self._end()
            return
        self._loop.call_later(_CLOSE_TIMEOUT, self._end)  # the broker may never answer
        connection.close()

    def _end(self) -> None:
        if self._ending:
            return
        self._ending = True
        outages.left(self._broker, self)
        connections = [apart.connection for apart in self._apart]
        for apart in list(self._apart):
            apart.abort()
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_closed:
            pika_connection.abort(connection, ConnectionLost("the link was stopped"))
        self._finish([*connections, connection], _CLOSING_TURNS)

    def _finish(self, connections: Sequence[pika_connection.Connection | None], turns: int) -> None:
        """End the loop once pika has closed its sockets, which takes some turns of the loop."""
        if not turns or all(each is None or each.is_closed for each in connections):
            self._ended = True
            self._loop.stop()
        else:
            self._loop.call_later(0.005, lambda: self._finish(connections, turns - 1))


class ConnectionApart:
    """A connection beside a link's, for what may end it. Only for the link's thread.

    Attributes:
        connection: pika's connection; None before it connects.
    """

    def __init__(
        self,
        host: pika.ConnectionParameters,
        services: pika_connection.IOServices,
        all_of_link: set[ConnectionApart],
        opened: Callable[[pika_connection.Connection], None],
        ended: Callable[[int, str], None],
    ) -> None:
        """Create it, without connecting yet; see ``Link.connect_apart``."""
        self._host = host
        self._services = services
        self._all_of_link = all_of_link
        self._opened = opened
        self._ended: Callable[[int, str], None] | None = ended
        self._address = f"{host.host}:{host.port}"
        self.connection: pika_connection.Connection | None = None
        all_of_link.add(self)

    def connect(self) -> None:
        """Start connecting, unless it was closed meanwhile."""
        if self._ended is not None:
            self.connection = pika_connection.Connection(
                self._host,
                on_open_callback=self._on_open,
                on_open_error_callback=self._on_ended,
                on_close_callback=self._on_ended,
                custom_ioloop=self._services,
            )

    def close(self) -> None:
        """Close it, whatever its state, without calling back."""
        self._ended = None
        if self.connection is not None and self.connection.is_open:
            self.connection.close()
        else:
            self.abort()

    def abort(self) -> None:
        """End it at once."""
        self._ended = None
        if self.connection is None:
            self._all_of_link.discard(self)
        elif not self.connection.is_closed:
            pika_connection.abort(self.connection, ConnectionLost("it is no longer needed"))

    def _on_open(self, connection: pika_connection.Connection) -> None:
        if self._ended is not None:
            self._opened(connection)

    def _on_ended(self, _connection: pika.SelectConnection, error: BaseException) -> None:
        self._all_of_link.discard(self)
        if self._ended is not None:
            lost = pika_errors.connection_lost(error, self._address)
            code = getattr(error, "reply_code", 0)
            self._ended(code if pika_errors.was_ended_for_an_error(lost) else 0, str(lost))


def quiet_pika() -> None:
    """Silence pika's logger, unless the application has set its level.

    pika logs several lines and tracebacks at ERROR for each attempt to connect; outbox logs the
    reason in one line.
    """
    driver = logging.getLogger("pika")
    if driver.level == logging.NOTSET:
        driver.setLevel(logging.CRITICAL)
