"""A proxy on loopback that does to connections what networks do to them.

It forwards AMQP as whole frames (AMQP 0-9-1, section 2.3.5) in both directions, so that it can
insert a frame between two others, and cut a connection at a chosen frame. It forwards other
protocols, such as PostgreSQL's, in the pieces in which they arrive.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
import threading
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

__all__ = [
    "BLOCKED",
    "UNBLOCKED",
    "FaultProxy",
    "Frame",
    "Way",
    "channel_close",
    "connection_close",
    "method_frame",
]

_PROTOCOL_HEADER_SIZE = 8
_START = struct.Struct(">BHI")
_END = b"\xce"
_HELD = 64  # pieces that one direction buffers before it stops reading
_METHOD = 1
_START_OK = (10, 11)
_NAME_FIELD = b"\x0fconnection_nameS"


class Way(enum.Enum):
    """The direction of a frame."""

    UP = "up"  # client to broker
    DOWN = "down"  # broker to client


@dataclass(frozen=True, slots=True)
class Frame:
    """A frame, the protocol header that a client begins with, or a piece of another protocol.

    For the latter two ``kind`` is 0.

    Attributes:
        way: its direction.
        kind: 1 method, 2 content header, 3 body, 8 heartbeat.
        channel: the channel's number.
        data: all bytes of the frame.
    """

    way: Way
    kind: int
    channel: int
    data: bytes

    @property
    def method(self) -> tuple[int, int]:
        """The class and method ids, such as (60, 40) for Basic.Publish; (0, 0) for other frames."""
        if self.kind != _METHOD:
            return 0, 0
        ids: tuple[int, int] = struct.unpack_from(">HH", self.data, _START.size)
        return ids


def method_frame(channel: int, class_id: int, method_id: int, arguments: bytes = b"") -> bytes:
    """Return a method frame with the encoded ``arguments``."""
    payload = struct.pack(">HH", class_id, method_id) + arguments
    return _START.pack(_METHOD, channel, len(payload)) + payload + _END


def channel_close(code: int, text: str, channel: int = 1) -> bytes:
    """Return the frame with which a broker closes a channel."""
    reason = text.encode()
    arguments = struct.pack(">HB", code, len(reason)) + reason + bytes(4)
    return method_frame(channel, 20, 40, arguments)


def connection_close(code: int, text: str) -> bytes:
    """Return the frame with which a broker closes a connection."""
    reason = text.encode()
    return method_frame(0, 10, 50, struct.pack(">HB", code, len(reason)) + reason + bytes(4))


BLOCKED = method_frame(0, 10, 60, b"\x03low")
UNBLOCKED = method_frame(0, 10, 61)


def _connection_name(start_ok: Frame) -> str:
    """Return the name that a client gives its connection, or an empty string."""
    _, field, rest = start_ok.data.partition(_NAME_FIELD)
    if not field:
        return ""
    [size] = struct.unpack_from(">I", rest)
    return rest[4 : 4 + size].decode(errors="replace")


class FaultProxy:
    """A proxy in front of a broker. Thread-safe; runs a thread until it is closed.

    Example:
        with FaultProxy(broker.url) as proxy:
            publisher = Publisher(proxy.url)
            proxy.cut()
    """

    def __init__(self, url: str) -> None:
        """Make a proxy for the server at ``url``; its :attr:`url` differs in host and port."""
        self._parts = urlsplit(url)
        self._split = _Frames if self._parts.scheme == "amqp" else _Pieces
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-proxy")
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._open = {way: asyncio.Event() for way in Way}
        self._idle = asyncio.Event()
        self._idle.set()
        self._rule: Callable[[Frame], bool] | None = None
        self._cut = threading.Event()
        self.delay = 0.0
        """The seconds by which each frame is delayed, in both directions, from the next one on."""
        self.accepted = 0
        """The number of connections that clients have opened so far."""
        self.port = 0

    @property
    def url(self) -> str:
        """The broker's URL through the proxy."""
        user, at, _ = self._parts.netloc.rpartition("@")
        return urlunsplit(self._parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}"))

    def start(self) -> Self:
        """Start the thread, and listen."""
        self._thread.start()
        self.heal()
        return self

    def close(self) -> None:
        """Cut all connections, and end the thread."""
        self.cut()
        self._call(self._stop_listening())
        self._call(self._until_no_link())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(5)
        self._loop.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.close()

    def cut(self) -> None:
        """Reset every connection, on both sides."""
        self._call(self._cut_all())

    def cut_at(self, rule: Callable[[Frame], bool]) -> threading.Event:
        """Reset every connection instead of forwarding the first frame that matches ``rule``.

        Returns:
            An event that is set when that has happened.
        """
        self._cut = threading.Event()
        self._rule = rule
        return self._cut

    def refuse(self) -> None:
        """Cut all connections, and refuse new ones."""
        self._call(self._stop_listening())
        self.cut()

    def black_hole(self, *ways: Way) -> None:
        """Forward nothing in ``ways``, by default both: not even the end of a connection.

        Connections are still accepted. Data sent meanwhile is forwarded when the link is healed, as
        after a network failure that TCP survives, unless the sender has given up by then.
        """
        self._call(self._close_gates(ways or tuple(Way)))

    def inject(self, frame: bytes, *, to: str = "") -> None:
        """Send ``frame`` to clients, between two frames of the broker.

        Args:
            frame: all bytes of the frame.
            to: a text that the connection's name contains (``connection_name`` in
                Connection.Start-Ok); other connections don't get the frame.
        """
        self._call(self._inject(frame, to))

    def heal(self) -> None:
        """Forward everything again, without delay, and accept connections."""
        self.delay = 0.0
        self._rule = None
        self._call(self._heal())

    def _call(self, coroutine: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(10)

    async def _heal(self) -> None:
        for gate in self._open.values():
            gate.set()
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port)
            self.port = self._server.sockets[0].getsockname()[1]

    async def _stop_listening(self) -> None:
        if self._server is not None:
            self._server.close()
            self._server = None

    async def _cut_all(self) -> None:
        for link in list(self._links):
            link.reset()

    async def _close_gates(self, ways: tuple[Way, ...]) -> None:
        for way in ways:
            self._open[way].clear()

    async def _inject(self, frame: bytes, to: str) -> None:
        for link in list(self._links):
            if to in link.name:
                link.client.write(frame)

    async def _until_no_link(self) -> None:
        await asyncio.wait_for(self._idle.wait(), 5)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.accepted += 1
        link = _Link(writer)
        self._links.add(link)
        self._idle.clear()
        try:
            broker_reader, link.broker = await asyncio.open_connection(
                self._parts.hostname, self._parts.port
            )
            async with asyncio.TaskGroup() as tasks:
                link.tasks = [
                    tasks.create_task(self._forward(link, Way.UP, reader, link.broker)),
                    tasks.create_task(self._forward(link, Way.DOWN, broker_reader, writer)),
                ]
        except* OSError:
            pass  # one side is gone, so the other is closed too
        finally:
            link.reset()
            self._links.discard(link)
            if not self._links:
                self._idle.set()

    async def _forward(
        self,
        link: _Link,
        way: Way,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Forward one direction until it ends, each piece when its delay is over."""
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_HELD)
        given_up = False

        async def read() -> None:
            nonlocal given_up
            frames = self._split(way)
            while data := await reader.read(65536):
                whole = bytearray()
                for frame in frames.feed(data):
                    if frame.method == _START_OK:
                        link.name = _connection_name(frame)
                    if self._rule is not None and self._rule(frame):
                        self._rule = None
                        await self._cut_all()
                        self._cut.set()
                        return
                    whole += frame.data
                if whole:  # else the rest of the frame is still to come
                    await held.put((time.monotonic() + self.delay, bytes(whole)))
            given_up = not self._open[way].is_set()
            await held.put((0.0, b""))

        async def write() -> None:
            while True:
                due, data = await held.get()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                await self._open[way].wait()
                if given_up or not data:
                    break
                writer.write(data)
                await writer.drain()
            link.end()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(read())
            tasks.create_task(write())


class _Link:
    """A client's connection, and the proxy's connection to the broker for it."""

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.name = ""
        self.broker: asyncio.StreamWriter | None = None
        self.tasks: list[asyncio.Task[None]] = []

    def end(self) -> None:
        """Close both connections in order, so that forwarded data still arrives."""
        for writer in (self.client, self.broker):
            if writer is not None:
                writer.close()
        self._cancel()

    def reset(self) -> None:
        """Reset both connections."""
        for writer in (self.client, self.broker):
            if writer is not None and not writer.transport.is_closing():
                with contextlib.suppress(OSError):
                    sock: socket.socket = writer.get_extra_info("socket")
                    linger = struct.pack("ii", 1, 0)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                writer.transport.abort()
        self._cancel()

    def _cancel(self) -> None:
        for task in self.tasks:
            task.cancel()


class _Pieces:
    """The bytes of one direction, in the pieces in which they arrive."""

    def __init__(self, way: Way) -> None:
        self._way = way

    def feed(self, data: bytes) -> list[Frame]:
        """Return ``data`` as one frame."""
        return [Frame(self._way, 0, 0, data)]


class _Frames:
    """The bytes of one direction, split into frames."""

    def __init__(self, way: Way) -> None:
        self._way = way
        self._rest = bytearray()
        self._begun = way is Way.DOWN

    def feed(self, data: bytes) -> list[Frame]:
        """Return the frames that are complete now."""
        rest = self._rest
        rest += data
        frames = []
        start = 0
        while True:
            kind, channel, size = 0, 0, _PROTOCOL_HEADER_SIZE
            if self._begun:
                if len(rest) - start < _START.size:
                    break
                kind, channel, size = _START.unpack_from(rest, start)
                size += _START.size + len(_END)
            if len(rest) - start < size:
                break
            self._begun = True
            frames.append(Frame(self._way, kind, channel, bytes(rest[start : start + size])))
            start += size
        del rest[:start]
        return frames
