"""Probes and metrics of a service, over HTTP from its parent, which handlers can't keep busy."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from werkzeug.serving import ThreadedWSGIServer, WSGIRequestHandler

from outbox.errors import UsageError
from outbox.service.readable import wait_readable
from outbox.service.state import Service, ServiceState
from outbox.telemetry import metrics
from outbox.telemetry.wsgi import ServiceApp

__all__ = ["Address", "HTTPFace", "ServiceSource", "listening", "parse_address"]

logger = logging.getLogger("outbox.http")

_TIMEOUT = 5.0
"""Seconds for a connection, from its beginning to its end."""
_MOST_CONNECTIONS = 16
_LONGEST_TURN = 10.0
"""Seconds after which a parent's loop that has not turned is not live."""
_RETRY = 0.05
"""Seconds between two attempts to have an address that the predecessor still has."""
_LATE = 5.0
"""Seconds after which that is logged."""
_OUT_OF_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_LOOPBACK = ("127.0.0.1", "::1")
_PHASES = ("starting", "ready", "leaving", "stuck")
_IN_STATUS = ("in_flight", "late", "oldest", "pulses", "links", "resident", "limits", "error")
"""What ``/status`` shows of a worker's report."""


class Address(NamedTuple):
    """Where to listen.

    Attributes:
        host: a name, an address, or empty for all addresses.
        port: the port; 0 for any that is free.
    """

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_address(text: str) -> Address:
    """Return the address that ``HOST:PORT`` names; see ``--http``.

    Raises:
        ValueError: it isn't an address; the message says what one looks like.
    """
    host, colon, port = text.strip().rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        is_valid = ":" in host
    else:
        is_valid = ":" not in host
    is_port = port.isascii() and port.isdigit() and int(port) <= 65535
    if not colon or not is_valid or not is_port or any(map(str.isspace, host)):
        raise ValueError(
            f"{text!r} is not an address; use HOST:PORT, for example 127.0.0.1:9100, or "
            ":9100 or [::]:9100 for all addresses"
        )
    return Address(host, int(port))


def listening(address: Address) -> list[socket.socket]:
    """Return sockets that listen on ``address``: one for each address that a name has.

    ``::``, and no host, stand for all addresses of both families.

    Raises:
        OSError: it can't be used.
    """
    if address.host in ("", "::"):
        with contextlib.suppress(OSError):  # there is no IPv6, or the port is used
            return [_bound(socket.AF_INET6, ("::", address.port, 0, 0), both=True)]
        if address.host == "":
            return [_bound(socket.AF_INET, ("0.0.0.0", address.port))]
        return [_bound(socket.AF_INET6, ("::", address.port, 0, 0), both=True)]  # its error
    # Some machines know localhost by one of its addresses, and their clients by the other.
    hosts = _LOOPBACK if address.host == "localhost" else (address.host,)
    try:
        found = [
            each
            for host in hosts
            for each in socket.getaddrinfo(
                host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        ]
    except UnicodeError:  # a label that is empty or too long
        raise OSError(errno.EINVAL, "that can't be a host's name") from None
    sockets: list[socket.socket] = []
    problem: OSError | None = None
    for family, _, _, _, where in dict.fromkeys(found):
        place: tuple[Any, ...] = where
        if sockets and not address.port:  # all have the port that the first one got
            place = (where[0], sockets[0].getsockname()[1], *where[2:])
        try:
            sockets.append(_bound(family, place))
        except OSError as error:  # localhost may have an IPv6 address that the machine lacks
            problem = problem or error
            if error.errno == errno.EADDRINUSE and address.port:
                for each in sockets:
                    each.close()
                raise
    if not sockets:
        raise problem or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))
    return sockets


def _bound(family: int, where: tuple[Any, ...], *, both: bool = False) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if both else 1)
        sock.bind(where)
        sock.listen(128)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


class ServiceSource:
    """Shows a service, from the state that its parent makes several times a second."""

    def __init__(self) -> None:
        self._state = ServiceState(reasons=("starting",))
        self._turned_at = time.monotonic()

    def update(self, state: ServiceState) -> None:
        """Show this state from now on; called in each turn of the parent's loop."""
        self._state = state
        self._turned_at = time.monotonic()

    def live(self) -> Sequence[str]:
        """Return why the parent can't mend what breaks; handlers, brokers and databases can't.

        It can't while its own loop doesn't turn, and once it starts no more workers.
        """
        state = self._state
        reasons = []
        idle = time.monotonic() - self._turned_at
        if idle > _LONGEST_TURN:
            reasons.append(f"the parent process has not reacted for {idle:.0f} s")
        if state.phase == "given up":
            reasons.append("given up: " + ("; ".join(state.reasons) or "workers end too often"))
        elif not state.mends:
            reasons.append("no process can be started, or all were stuck again and again")
        return reasons

    def ready(self) -> Sequence[str]:
        """Return which workers don't consume, or can't publish."""
        state = self._state
        if not state.ready:
            return state.reasons or [state.phase]
        return []

    def metrics(self) -> str:
        """Return the sums over all processes that there are and were."""
        state = self._state
        counts = [
            worker.report["counts"]
            for worker in state.workers
            if worker.report is not None and isinstance(worker.report.get("counts"), dict)
        ]
        total = metrics.merge(state.base or {}, counts)
        workers = dict.fromkeys(_PHASES, 0)
        for worker in state.workers:
            workers[worker.phase] = workers.get(worker.phase, 0) + 1
        total["outbox_workers"] = [[[phase], number] for phase, number in workers.items()]
        total["outbox_worker_restarts_total"] = [
            [[reason], number] for reason, number in state.restarts.items()
        ]
        total["outbox_build_info"] = [[[metrics.version()], 1]]
        return metrics.render(total)

    def status(self) -> Mapping[str, Any]:
        """Return the state of the parent and of each worker."""
        state = self._state
        return {
            "phase": state.phase,
            "live": not self.live(),
            "ready": not self.ready(),
            "reasons": [*self.live(), *self.ready()],
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "version": metrics.version(),
            "restarts": dict(state.restarts),
            "workers": [
                {
                    "slot": worker.slot,
                    "pid": worker.pid,
                    "phase": worker.phase,
                    "age": round(worker.age, 1),
                    "restarts": worker.restarts,
                    "report_age": worker.report_age,
                    **{
                        name: worker.report[name]
                        for name in _IN_STATUS
                        if worker.report is not None and name in worker.report
                    },
                }
                for worker in state.workers
            ],
        }


class HTTPFace:
    """Answers ``/livez``, ``/readyz``, ``/metrics`` and ``/status`` for a service.

    It answers on threads of the parent, at most 16 connections at a time: a further one ends the
    oldest. A connection has 5 s. When the service leaves, the address is free for its successor.

    Attributes:
        urls: where it answers; empty while it doesn't.
    """

    def __init__(
        self, address: Address, *, with_status: bool = False, may_wait: bool = False
    ) -> None:
        """Listen on ``address``, and answer from now on.

        Args:
            address: where to listen.
            with_status: whether ``/status`` is shown although others than this machine can connect.
            may_wait: whether a predecessor may have the address, and will leave it; then it is
                taken as soon as it is free.

        Raises:
            UsageError: the address can't be used.
        """
        self.urls: tuple[str, ...] = ()
        self._address = address
        self._with_status = with_status
        self._source = ServiceSource()
        self._ending = threading.Event()
        self._servers: list[_Server] = []
        self._waking, self._wake = os.pipe()
        try:
            self._open()
        except OSError as error:
            if not may_wait or error.errno != errno.EADDRINUSE:
                self._close_pipe()
                raise UsageError(f"cannot listen on {address}: {error.strerror}") from error
        self._thread = threading.Thread(target=self._serve, name="outbox-http", daemon=True)
        self._thread.start()

    def turn(self, service: Service) -> None:
        """Show the service's state; leave the address to a successor if it leaves."""
        state = service.state
        self._source.update(state)
        if state.phase == "leaving" and not self._ending.is_set():
            self.close()

    def close(self) -> None:
        """Stop answering; connections that are open are answered still."""
        if self._ending.is_set():
            return
        self._ending.set()
        os.write(self._wake, b"x")
        self._thread.join(_TIMEOUT)
        self._close_pipe()

    def _open(self) -> None:
        sockets = listening(self._address)
        is_local = all(ipaddress.ip_address(each.getsockname()[0]).is_loopback for each in sockets)
        app = ServiceApp(self._source, status=is_local or self._with_status)
        connections = _Connections()
        try:
            self._servers = [_Server(each, app, connections) for each in sockets]
        finally:
            for each in sockets:  # the servers have copies
                each.close()
        self._connections = connections
        self.urls = tuple(server.url for server in self._servers)
        logger.info("listening on %s", " and ".join(self.urls))

    def _serve(self) -> None:
        try:
            if not self._servers:
                self._wait_for_address()
            waiting = {server.fileno(): server for server in self._servers}
            while not self._ending.is_set():
                pause = 1.0 if self._connections.open else None
                readable = wait_readable((self._waking, *waiting), pause)
                self._connections.end_old()
                for descriptor in readable:
                    if descriptor in waiting:
                        waiting[descriptor].handle_request()
        except Exception:
            logger.exception("the probes and metrics have failed")
        finally:
            self.urls = ()
            for server in self._servers:
                server.server_close()

    def _wait_for_address(self) -> None:
        began = time.monotonic()
        is_logged = False
        while not self._ending.wait(_RETRY):
            try:
                self._open()
            except OSError as error:
                if not is_logged and time.monotonic() - began >= _LATE:
                    is_logged = True
                    logger.warning("still waiting to listen on %s: %s", self._address, error)
            else:
                return

    def _close_pipe(self) -> None:
        os.close(self._waking)
        os.close(self._wake)


class _Connections:
    """The connections that are open, the oldest first. Thread-safe."""

    def __init__(self) -> None:
        self.open: dict[socket.socket, float] = {}
        self._lock = threading.Lock()

    def add(self, connection: socket.socket) -> None:
        """Note a new one, and end the oldest if there are too many."""
        with self._lock:
            self.open[connection] = time.monotonic()
            while len(self.open) > _MOST_CONNECTIONS:
                self._end(next(iter(self.open)))

    def remove(self, connection: socket.socket) -> None:
        """Note that one has ended."""
        with self._lock:
            self.open.pop(connection, None)

    def end_old(self) -> None:
        """End those that have had their time."""
        with self._lock:
            oldest = time.monotonic() - _TIMEOUT
            for connection in [each for each, began in self.open.items() if began < oldest]:
                self._end(connection)

    def _end(self, connection: socket.socket) -> None:
        del self.open[connection]
        with contextlib.suppress(OSError):  # its thread wakes up, and closes it
            connection.shutdown(socket.SHUT_RDWR)


class _Handler(WSGIRequestHandler):
    timeout = _TIMEOUT
    protocol_version = "HTTP/1.1"
    server_version = "outbox"

    def version_string(self) -> str:
        return "outbox"

    def log(self, type: str, message: str, *args: Any) -> None:
        """Log no request: a probe comes every few seconds."""


class _Server(ThreadedWSGIServer):
    """A server for one socket, which another thread calls for each connection."""

    daemon_threads = True
    timeout = 0  # of handle_request()

    def __init__(self, sock: socket.socket, app: ServiceApp, connections: _Connections) -> None:
        host, port = sock.getsockname()[:2]
        super().__init__(host, port, app, _Handler, fd=sock.fileno())
        self.socket.setblocking(False)
        self._connections = connections

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://{Address(*self.socket.getsockname()[:2])}"

    def get_request(self) -> tuple[Any, Any]:
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in _OUT_OF_FILES:
                time.sleep(_RETRY)  # else the next wait would return at once, again and again
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        self._connections.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._connections.remove(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("a request from %s failed", client_address, exc_info=True)

    def log(self, type: str, message: str, *args: Any) -> None:
        logger.error(message, *args)
