"""Uses pika beyond its public interface, for speed and robustness.

pika's public ``basic_publish`` encodes a message and sends its three frames one by one; here a
whole window of events, encoded beforehand, is one write. pika reads 4 KiB at a time and creates
several objects per frame; here confirms and deliveries are decoded in one pass.

This takes seventeen private names, which no other module of outbox uses:

- of a connection ``_output_marshaled_frames``, ``_terminate_stream``, ``_proto_connection_made``,
  ``_adapter_emit_data``, ``_on_data_available``, ``_read_frame``, ``_frame_buffer`` and
  ``_transport``;
- of its transport ``_sock``, ``_MAX_RECV_BYTES`` and ``_MAX_CONSUME_BYTES``;
- of a blocking connection ``_impl``, and ``_impl_class``, an argument;
- of a loop ``_callbacks`` and ``_poller``, and of that ``_w_interrupt`` and
  ``_dispatch_fd_events``.

pika has no public equivalent, so it is pinned to the versions in which
``tests/unit/test_pika_names.py`` finds all of them.
"""

from __future__ import annotations

import _socket
import contextlib
import re
import socket
import struct
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

if sys.platform == "linux":
    import fcntl
    import termios

import pika
import pika.channel
import pika.exceptions
import pika.frame
import pika.spec
from pika.adapters.select_connection import IOLoop
from pika.adapters.utils import nbio_interface
from pika.adapters.utils.selector_ioloop_adapter import SelectorIOServicesAdapter

from outbox.backlog.chunk import Entry
from outbox.errors import ConnectionLost
from outbox.messages.delivery import Delivery
from outbox.system import process, threads
from outbox.system.fork_pause import Pause
from outbox.transports.rabbitmq.amqp import decoder

__all__ = [
    "UNREADABLE",
    "BlockingConnection",
    "Connection",
    "Forked",
    "IOServices",
    "Loop",
    "abort",
    "content_header",
    "publish",
    "write",
]


def publish(channel: pika.channel.Channel, entries: Sequence[Entry]) -> None:
    """Send ``entries`` on ``channel``; their frames must contain its number."""
    write(channel, b"".join([entry.frames for entry in entries]))


def write(channel: pika.channel.Channel, frames: bytes) -> None:
    """Send ``frames``, which must contain the number of ``channel``."""
    connection: Any = channel.connection
    connection._output_marshaled_frames([frames])


def abort(connection: pika.SelectConnection, error: Exception) -> None:
    """End ``connection`` at once, without the closing handshake that a dead peer never answers."""
    with contextlib.suppress(Exception):  # it may be in any state, and is given up anyway
        connection._terminate_stream(error)


class Connection(pika.SelectConnection):
    """A connection that decodes frequent frames quickly, and survives some that pika doesn't.

    Any client may send a timestamp beyond the year 9999, or tables nested a thousand deep. pika
    raises while it decodes such a frame, and gives up the connection: the broker would redeliver
    the message over the next one, forever. Here the message arrives without properties except an
    unknown content encoding, so that it is dead-lettered.

    Data is sent to the socket at once, as far as the socket accepts it; pika would wait for a turn
    of the loop. Available data is read at once, not 4 KiB at a time until a read fails.

    Confirms and deliveries of one channel can be decoded without pika (:mod:`decoder`); all other
    frames go to pika, in order.
    """

    _plain = False
    _swift: Mapping[int, tuple[int, Mapping[bytes, str]]] = {}
    """By the number of a channel decoded here: its generation, and its queues by consumer tag."""
    _on_confirms: Callable[[Sequence[tuple[int, int]]], None] | None = None
    _on_delivery: Callable[[Delivery], None] | None = None

    def read_confirms(
        self, channel: int, on_confirms: Callable[[Sequence[tuple[int, int]]], None]
    ) -> None:
        """Decode the Basic.Acks of ``channel`` here, and pass them on in groups.

        Args:
            channel: the number of the channel.
            on_confirms: the callback for a group: (delivery tag, multiple) of each, in order.
        """
        self._swift = {channel: (0, {})}
        self._on_confirms = on_confirms

    def read_deliveries(
        self,
        channel: int,
        generation: int,
        queues: Mapping[bytes, str],
        on_delivery: Callable[[Delivery], None],
    ) -> None:
        """Decode the deliveries of ``channel`` to the consumer tags in ``queues`` here.

        Any number of channels, with the same ``on_delivery``.
        """
        self._swift = {**self._swift, channel: (generation, queues)}
        self._on_delivery = on_delivery
        _consuming.add(self)

    def leave_to_parent(self) -> None:
        """Let go of the socket in a forked child, or the parent's messages would stay with it."""
        transport: Any = self._transport
        if transport is not None:
            with contextlib.suppress(OSError, ValueError):
                process.vacate(transport._sock.fileno())

    @property
    def version(self) -> tuple[int, ...]:
        """The broker's major and minor version; empty if unknown."""
        return _version_of(self)

    @property
    def bytes_taken(self) -> int:
        """The bytes that the broker's machine has acknowledged, or the kernel has taken.

        The kernel may hold megabytes for a slow peer; only Linux says how many (tcp(7), SIOCOUTQ).
        """
        transport: Any = self._transport
        if transport is None:
            return 0
        waiting: int = transport.get_write_buffer_size()
        if sys.platform == "linux":
            answer = bytearray(4)
            with contextlib.suppress(OSError, ValueError):  # gone, or closed
                fcntl.ioctl(transport._sock, termios.TIOCOUTQ, answer)
            waiting += int.from_bytes(answer, sys.byteorder)
        return int(self.bytes_sent) - waiting

    def read_all_with_pika(self) -> None:
        """Leave all frames to pika again."""
        self._swift = {}

    def read_with_pika(self, channel: int) -> None:
        """Leave the frames of ``channel`` to pika again."""
        self._swift = {number: rest for number, rest in self._swift.items() if number != channel}

    def _proto_connection_made(self, transport: Any) -> None:
        self._plain = type(getattr(transport, "_sock", None)) is socket.socket
        if self._plain:  # TLS may buffer data that the loop doesn't see: there, read as pika does
            transport._MAX_RECV_BYTES = _READ
            transport._MAX_CONSUME_BYTES = 1
        super()._proto_connection_made(transport)

    def _adapter_emit_data(self, data: bytes) -> None:
        transport: Any = self._transport
        if self._plain and transport is not None and not transport.get_write_buffer_size():
            with contextlib.suppress(OSError):  # pika gets the same error, and handles it
                sent = transport._sock.send(data)
                if sent == len(data):
                    return
                data = data[sent:]
        super()._adapter_emit_data(data)

    def _on_data_available(self, data_in: bytes) -> None:
        if not self._swift:
            super()._on_data_available(data_in)
            return
        buffer = self._frame_buffer + data_in if self._frame_buffer else data_in
        self._frame_buffer = b""
        offset, end = 0, len(buffer)
        confirms: list[tuple[int, int]] = []
        while end - offset > _FRAME_START.size:
            kind, channel, size = _FRAME_START.unpack_from(buffer, offset)
            behind = offset + size + _FRAME_START.size + 1
            if behind > end:
                break
            method = 0
            if kind == pika.spec.FRAME_METHOD and channel in self._swift:
                [method] = _METHOD.unpack_from(buffer, offset + _FRAME_START.size)
            if method == decoder.BASIC_ACK and self._on_confirms is not None:
                confirms.append(_CONFIRM.unpack_from(buffer, offset + _FRAME_START.size + 4))
                self.bytes_received += behind - offset  # pika's heartbeat check counts these
                offset = behind
                continue
            if confirms and self._on_confirms is not None:  # before any later frame is handled
                self._on_confirms(confirms)
                confirms = []
            if method == decoder.BASIC_DELIVER and self._on_delivery is not None:
                behind_all, delivery = decoder.delivery_at(buffer, offset, *self._swift[channel])
                if delivery is not None:
                    self._on_delivery(delivery)
                    self.bytes_received += behind_all - offset
                    offset = behind_all
                    continue
                if behind_all == decoder.WAIT:
                    break
            super()._on_data_available(buffer[offset:behind])
            offset = behind
        self._frame_buffer = buffer[offset:]
        if confirms and self._on_confirms is not None:
            self._on_confirms(confirms)

    def _read_frame(self) -> Any:
        try:
            end, frame = super()._read_frame()
            if isinstance(frame, pika.frame.Header) and frame.properties.headers:
                payload = self._frame_buffer[_FRAME_START.size : end - 1]
                with contextlib.suppress(Exception):  # malformed; pika has made something of it
                    frame.properties.headers = decoder.headers_in(payload)
            return end, frame
        except pika.exceptions.InvalidFrameError:  # the framing is broken, not a frame's content
            raise
        except Exception:
            kind, channel, size = _FRAME_START.unpack_from(self._frame_buffer)
            if kind != pika.spec.FRAME_HEADER:
                raise
            [body_size] = _BODY_SIZE.unpack_from(self._frame_buffer, _FRAME_START.size + 4)
            properties = pika.BasicProperties(content_encoding=UNREADABLE)  # type: ignore[no-untyped-call]
            header = pika.frame.Header(channel, body_size, properties)
            return _FRAME_START.size + size + 1, header


class BlockingConnection(pika.BlockingConnection):
    """A blocking connection that survives the same frames, and knows the broker's version."""

    def __init__(self, parameters: pika.ConnectionParameters) -> None:
        """Connect; ``content_header`` works with the properties of its deliveries."""
        super().__init__(parameters, _impl_class=_VerbatimConnection)  # type: ignore[arg-type]

    @property
    def version(self) -> tuple[int, ...]:
        """The broker's major and minor version; empty if unknown."""
        return _version_of(self._impl)

    @property
    def server_properties(self) -> Mapping[str, Any]:
        """What the broker says of itself: ``product``, ``version``, ``cluster_name`` and others."""
        return self._impl.server_properties or {}

    @property
    def tuned(self) -> tuple[int, int]:
        """The heartbeat in seconds and the largest frame in bytes, as negotiated."""
        parameters: Any = self._impl.params
        return int(parameters.heartbeat or 0), int(parameters.frame_max or 0)

    def abandon(self) -> None:
        """End the connection at once, whatever state an interrupted call has left it in."""
        abort(self._impl, ConnectionLost("the connection was abandoned"))
        for _ in range(3):  # pika closes the socket some turns of its loop later
            with contextlib.suppress(Exception):
                self.process_data_events(0)


class _VerbatimConnection(Connection):
    """A connection that adds to a message's properties the bytes they were decoded from."""

    def _read_frame(self) -> Any:
        end, frame = super()._read_frame()
        if isinstance(frame, pika.frame.Header):
            payload = self._frame_buffer[_FRAME_START.size : end - 1]
            setattr(frame.properties, _PAYLOAD, payload)
        return end, frame


def _version_of(connection: Any) -> tuple[int, ...]:
    version = (connection.server_properties or {}).get("version", "")
    numbers = re.match(r"(\d+)\.(\d+)", version) if isinstance(version, str) else None
    return tuple(map(int, numbers.groups())) if numbers else ()


def content_header(properties: pika.BasicProperties) -> bytes:
    """Return the payload of the header frame from which ``properties`` were decoded."""
    return bytes(getattr(properties, _PAYLOAD, b""))


UNREADABLE = "unreadable-properties"
_READ = 64 * 1024
_PAYLOAD = "outbox_payload"
_FRAME_START = struct.Struct(">BHI")  # AMQP 0-9-1, section 2.3.5: type, channel, size
_METHOD = struct.Struct(">I")  # class and method
_CONFIRM = struct.Struct(">QB")  # Basic.Ack: delivery tag, multiple
_BODY_SIZE = struct.Struct(">Q")  # after class and weight, section 2.3.5.2


class Forked(BaseException):
    """Raised by a loop in a forked child that has inherited it together with its greenlet."""


_consuming: weakref.WeakSet[Connection] = weakref.WeakSet()


def _leave_all_to_parent() -> None:
    for connection in list(_consuming):
        connection.leave_to_parent()
    _consuming.clear()


process.after_fork(_leave_all_to_parent)


class _Waker(_socket.socket):
    """A second socket that wakes a loop, and is closed with the last reference to it.

    So it is never closed while another thread writes to it. The class beneath Python's, since that
    one warns that it wasn't closed, and gevent and eventlet replace it.
    """

    def __init__(self, waking: socket.socket) -> None:
        number = _socket.dup(waking.fileno())
        super().__init__(waking.family, waking.type, waking.proto, fileno=number)
        self.settimeout(0)

    def __del__(self) -> None:
        self.close()


class Loop(IOLoop):
    """pika's loop, made safe for callers that are interrupted, and for forks.

    pika wakes a loop under a lock, for which a signal handler or a finalizer that publishes would
    wait forever if it interrupts just that. Here waking takes no lock.

    While the process forks, the loop's thread is idle (:mod:`outbox.system.fork_pause`). A child
    doesn't inherit threads, but it does inherit the greenlets that gevent or eventlet use for them.
    Such a greenlet would read the broker's data for the parent, such as confirms, and the parent's
    wake-ups. It is stopped between waiting and dispatching, where pika has only private names.

    Attributes:
        pause: where the loop's thread pauses for forks; set before the loop is started.
    """

    pause: Pause

    def __init__(self) -> None:
        super().__init__()
        poller: Any = self._poller
        self._waker = _Waker(poller._w_interrupt)
        self._pid = process.pid
        self._forks = threads.greenlets_of(sys.modules) is not None
        self._poll = poller.poll
        self._dispatch = poller._dispatch_fd_events
        poller.poll = self._poll_idle
        poller._dispatch_fd_events = self._dispatch_working

    def add_callback_threadsafe(self, callback: Callable[[], None]) -> None:
        """Call ``callback`` soon in the loop. Safe in signal handlers and finalizers."""
        self._callbacks.append(callback)
        with contextlib.suppress(OSError):  # full: it is about to wake; broken: it was closed
            self._waker.send(b"X")

    add_callback = add_callback_threadsafe

    def _poll_idle(self) -> None:
        self.pause.busy = False
        self._poll()

    def _dispatch_working(self, events: dict[int, int]) -> None:
        # pika calls this in each turn, even without events, and before it runs timers.
        if self._forks and process.pid != self._pid:
            raise Forked
        self.pause.busy = True
        if Pause.forking:
            self.pause.wait()
        self._dispatch(events)


class IOServices(SelectorIOServicesAdapter):
    """pika's I/O services, with three changes.

    Host names are resolved on the calling thread. pika starts a thread for each lookup, which
    Python 3.12 and later refuse while the interpreter shuts down: kept events could no longer be
    sent at exit. The calling thread has nothing else to do without a connection.

    A socket that can't be connected is closed, not left to the garbage collector. One that was
    connected, and reset before pika has looked at it, counts as such, not as a bug of its caller.
    """

    def connect_socket(
        self,
        sock: socket.socket,
        resolved_addr: Any,
        on_done: Callable[[BaseException | None], None],
    ) -> nbio_interface.AbstractIOReference:
        """Connect, and close the socket if that fails."""

        def done(error: BaseException | None) -> None:
            if error is None:
                try:
                    sock.getpeername()
                except OSError as reset:
                    error = reset
            if error is not None:
                sock.close()
            on_done(error)

        return super().connect_socket(sock, resolved_addr, done)

    def getaddrinfo(
        self,
        host: str,
        port: int,
        on_done: Callable[..., None],
        family: int = 0,
        socktype: int = 0,
        proto: int = 0,
        flags: int = 0,
    ) -> nbio_interface.AbstractIOReference:
        """Resolve now, and report in the loop's next turn."""
        try:
            result: Any = socket.getaddrinfo(host, port, family, socktype, proto, flags)
        except Exception as error:
            result = error
        lookup = _Lookup()
        self.get_native_ioloop().add_callback(lambda: lookup.report(on_done, result))
        return lookup


class _Lookup(nbio_interface.AbstractIOReference):
    def __init__(self) -> None:
        self._cancelled = False

    def cancel(self) -> bool:
        was_cancelled = self._cancelled
        self._cancelled = True
        return not was_cancelled

    def report(self, on_done: Callable[..., None], result: Any) -> None:
        if not self._cancelled:
            self._cancelled = True
            on_done(result)
