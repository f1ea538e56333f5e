"""All that outbox needs of pika beyond its public interface.

pika's public ``basic_publish`` encodes a message and sends its three frames one by one; here a
whole window of events that were encoded beforehand goes out as one write. pika reads 4 KiB at a
time and makes several objects of every frame; here confirms and deliveries are read in one pass.

That takes fifteen private names. No other module of outbox uses one:

- of a connection ``_output_marshaled_frames``, ``_terminate_stream``, ``_proto_connection_made``,
  ``_adapter_emit_data``, ``_on_data_available``, ``_read_frame``, ``_frame_buffer`` and
  ``_transport``;
- of its transport ``_sock``, ``_MAX_RECV_BYTES`` and ``_MAX_CONSUME_BYTES``;
- of a blocking connection ``_impl``, and ``_impl_class``, an argument;
- of a loop ``_poller``, and of that ``_dispatch_fd_events``.

There is no way around them, so pika is pinned to the versions in which
``tests/unit/test_pika_names.py`` finds them all.
"""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
]


def publish(channel: pika.channel.Channel, entries: Sequence[Entry]) -> None:
    """Send ``entries`` on ``channel``, whose number is the one in their frames."""
    connection: Any = channel.connection
    connection._output_marshaled_frames([b"".join([entry.frames for entry in entries])])


def abort(connection: pika.SelectConnection, error: Exception) -> None:
    """End ``connection`` at once, without the closing handshake that a dead peer never answers."""
    with contextlib.suppress(Exception):  # it is given up whatever its state
        connection._terminate_stream(error)


class Connection(pika.SelectConnection):
    """A connection that reads masses of frames by itself, and survives some that pika does not.

    Any client may send a timestamp beyond the year 9999, or tables nested a thousand deep. pika
    raises while it reads such a frame, and gives the connection up: the broker would deliver the
    message again over the next one, for ever. Here it arrives with no properties but a content
    encoding that nobody knows, so that it goes to the dead letters.

    What is to be sent goes to the socket at once, as far as it takes it; pika would first wait for
    a turn of the loop. What is there is read in one go, not 4 KiB at a time until a read fails.

    Confirms and deliveries of one channel can be read without pika (:mod:`decoder`); the others'
    frames, and all other frames of that channel, take pika's way, in order.
    """

    _plain = False
    _swift_channel = 0  # none: channel 0 is the connection's own
    _on_confirms: Callable[[Sequence[tuple[int, int]]], None] | None = None
    _on_delivery: Callable[[Delivery], None] | None = None
    _generation = 0
    _queues: Mapping[bytes, str] = {}

    def read_confirms(
        self, channel: int, on_confirms: Callable[[Sequence[tuple[int, int]]], None]
    ) -> None:
        """Have the Basic.Acks of ``channel`` read here, and given on by the bunch.

        Args:
            channel: its number.
            on_confirms: called with (delivery tag, multiple) of each, in order.
        """
        self._swift_channel = channel
        self._on_confirms = on_confirms

    def read_deliveries(
        self,
        channel: int,
        generation: int,
        queues: Mapping[bytes, str],
        on_delivery: Callable[[Delivery], None],
    ) -> None:
        """Have the deliveries of ``channel`` to the consumer tags in ``queues`` read here."""
        self._swift_channel = channel
        self._generation = generation
        self._queues = queues
        self._on_delivery = on_delivery

    @property
    def version(self) -> tuple[int, ...]:
        """The broker's major and minor version, or nothing where it does not tell."""
        return _version_of(self)

    def read_all_with_pika(self) -> None:
        """Read nothing here any more."""
        self._swift_channel = 0

    def _proto_connection_made(self, transport: Any) -> None:
        self._plain = type(getattr(transport, "_sock", None)) is socket.socket
        if self._plain:  # TLS may hold back what the loop knows nothing of: it is read as pika does
            transport._MAX_RECV_BYTES = _READ
            transport._MAX_CONSUME_BYTES = 1
        super()._proto_connection_made(transport)

    def _adapter_emit_data(self, data: bytes) -> None:
        transport: Any = self._transport
        if self._plain and transport is not None and not transport.get_write_buffer_size():
            with contextlib.suppress(OSError):  # pika meets it again, and knows what to do
                sent = transport._sock.send(data)
                if sent == len(data):
                    return
                data = data[sent:]
        super()._adapter_emit_data(data)

    def _on_data_available(self, data_in: bytes) -> None:
        if not self._swift_channel:
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
            if channel and channel == self._swift_channel and kind == pika.spec.FRAME_METHOD:
                [method] = _METHOD.unpack_from(buffer, offset + _FRAME_START.size)
            if method == decoder.BASIC_ACK and self._on_confirms is not None:
                confirms.append(_CONFIRM.unpack_from(buffer, offset + _FRAME_START.size + 4))
                self.bytes_received += behind - offset  # the heartbeat's sign of life
                offset = behind
                continue
            if confirms and self._on_confirms is not None:
                self._on_confirms(confirms)
                confirms = []
            if method == decoder.BASIC_DELIVER and self._on_delivery is not None:
                behind_all, delivery = decoder.delivery_at(
                    buffer, offset, self._generation, self._queues
                )
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
            return super()._read_frame()
        except pika.exceptions.InvalidFrameError:  # of the stream, not of what is in it
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
    """A blocking connection that survives the same, and tells the broker's version."""

    def __init__(self, parameters: pika.ConnectionParameters) -> None:
        """Connect; ``content_header`` takes the properties of what is delivered over it."""
        super().__init__(parameters, _impl_class=_VerbatimConnection)  # type: ignore[arg-type]

    @property
    def version(self) -> tuple[int, ...]:
        """The broker's major and minor version, or nothing where it does not tell."""
        return _version_of(self._impl)

    def abandon(self) -> None:
        """End it at once, whatever an interrupted call has left it in."""
        abort(self._impl, ConnectionLost("the connection was abandoned"))
        for _ in range(3):  # pika closes the socket some turns of its loop later
            with contextlib.suppress(Exception):
                self.process_data_events(0)


class _VerbatimConnection(Connection):
    """A connection that hands out, beside a message's properties, the bytes they were read from."""

    def _read_frame(self) -> Any:
        end, frame = super()._read_frame()
        if isinstance(frame, pika.frame.Header):
            payload = self._frame_buffer[_FRAME_START.size : end - 1]
            setattr(frame.properties, _PAYLOAD, payload)
        return end, frame


def _version_of(connection: Any) -> tuple[int, ...]:
    found = (connection.server_properties or {}).get("version", "")
    numbers = re.match(r"(\d+)\.(\d+)", found) if isinstance(found, str) else None
    return tuple(map(int, numbers.groups())) if numbers else ()


def content_header(properties: pika.BasicProperties) -> bytes:
    """Return the payload of the header frame that ``properties`` were read from."""
    return bytes(getattr(properties, _PAYLOAD, b""))


UNREADABLE = "unreadable-properties"
_READ = 64 * 1024
_PAYLOAD = "outbox_payload"
_FRAME_START = struct.Struct(">BHI")  # AMQP 0-9-1, section 2.3.5: type, channel, size
_METHOD = struct.Struct(">I")  # its class and method
_CONFIRM = struct.Struct(">QB")  # Basic.Ack: delivery tag, multiple
_BODY_SIZE = struct.Struct(">Q")  # behind the class and the weight, section 2.3.5.2


class Forked(BaseException):
    """Raised out of a loop in a forked child, which has inherited it together with its greenlet."""


class Loop(IOLoop):
    """pika's loop, which in a forked child ends without having touched anything.

    A thread is not there in a child; the greenlet that gevent or eventlet make of it is. It would
    read what the broker sends to the parent, confirms for instance, and take the parent's wake-up
    calls. It is stopped between waiting and dispatching, where pika has no public name.
    """

    def __init__(self) -> None:
        super().__init__()
        if threads.greenlets_of(sys.modules):
            self._pid = process.pid
            self._dispatch = self._poller._dispatch_fd_events
            setattr(self._poller, "_dispatch_fd_events", self._dispatch_unless_forked)  # noqa: B010

    def _dispatch_unless_forked(self, events: dict[int, int]) -> None:
        # In every turn, with or without events: timers come after it.
        if process.pid != self._pid:
            raise Forked
        self._dispatch(events)


class IOServices(SelectorIOServicesAdapter):
    """pika's I/O services, but for two things.

    Host names are resolved on the calling thread. pika starts a thread for each look-up, which
    Python 3.12 and later refuse once the interpreter is shutting down: kept events could no longer
    be sent at exit. The calling thread has nothing else to do while there is no connection.

    A socket that could not be connected is closed, rather than left to the garbage collector.
    """

    def connect_socket(
        self,
        sock: socket.socket,
        resolved_addr: Any,
        on_done: Callable[[BaseException | None], None],
    ) -> nbio_interface.AbstractIOReference:
        """Connect, and close the socket if that fails."""

        def done(error: BaseException | None) -> None:
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
        """Resolve now and report in the loop's next turn."""
        try:
            found: Any = socket.getaddrinfo(host, port, family, socktype, proto, flags)
        except Exception as error:
            found = error
        look_up = _LookUp()
        self.get_native_ioloop().add_callback(lambda: look_up.report(on_done, found))
        return look_up


class _LookUp(nbio_interface.AbstractIOReference):
    def __init__(self) -> None:
        self._cancelled = False

    def cancel(self) -> bool:
        was = self._cancelled
        self._cancelled = True
        return not was

    def report(self, on_done: Callable[..., None], found: Any) -> None:
        if not self._cancelled:
            self._cancelled = True
            on_done(found)
