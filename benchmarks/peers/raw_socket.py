"""A raw socket that sends chunks of pre-encoded frames, and waits for their acks.

No client can be much faster: it encodes nothing while it is timed, and tracks only delivery tags.
"""

from __future__ import annotations

import socket
import struct
import time
from urllib.parse import urlsplit

from benchmarks.peers import BODY, EXCHANGE, TARGET
from outbox import Event
from outbox.transports.rabbitmq.amqp.encoder import Encoder

_METHOD = 1
_ACK = (60, 80)


class RawSocket:
    name = "raw socket, pre-encoded"
    chunks = (10, 100, 1000)
    queue = None

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        self._socket = socket.create_connection((parts.hostname, parts.port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""
        self._sent = 0
        self._frames: dict[int, bytes] = {}
        plain = f"\0{parts.username}\0{parts.password}".encode()
        self._socket.sendall(b"AMQP\x00\x00\x09\x01")
        self._method()
        start_ok = struct.pack(">I", 0) + b"\x05PLAIN" + struct.pack(">I", len(plain)) + plain
        self._send(0, 10, 11, start_ok + b"\x05en_US")
        self._method()
        self._send(0, 10, 31, struct.pack(">HIH", 2047, 131_072, 0))  # Connection.Tune-Ok
        for channel, class_id, method_id, arguments in (
            (0, 10, 40, b"\x01/\0\0"),  # Connection.Open
            (1, 20, 10, b"\0"),  # Channel.Open
            (1, 85, 10, b"\0"),  # Confirm.Select
        ):
            self._send(channel, class_id, method_id, arguments)
            self._method()

    def publish(self, chunk: int, times: int) -> float:
        if chunk not in self._frames:
            encode = Encoder().encode
            self._frames[chunk] = b"".join(
                encode(Event(id=f"01900000-0000-7000-8000-{n:012}", target=TARGET,
                             exchange=EXCHANGE, body=BODY))
                for n in range(chunk)
            )  # fmt: skip
        frames = self._frames[chunk]
        begin = time.perf_counter()
        for _ in range(times):
            self._socket.sendall(frames)
            self._sent += chunk
            self._wait_for_acks(chunk)
        return time.perf_counter() - begin

    def send(self, frames: list[bytes]) -> None:
        """Send encoded events as one chunk, and wait for their acks."""
        self._socket.sendall(b"".join(frames))
        self._sent += len(frames)
        self._wait_for_acks(len(frames))

    def close(self) -> None:
        self._socket.close()

    def _wait_for_acks(self, chunk: int) -> None:
        low = self._sent - chunk  # all tags up to this one are acked
        single: set[int] = set()
        while self._sent - low > len(single):
            class_id, method_id, tag, multiple = struct.unpack(">HHQB", self._method())
            if (class_id, method_id) != _ACK:
                raise RuntimeError(f"not an ack: {class_id}, {method_id}")
            if multiple:
                low = max(low, tag)
                single = {one for one in single if one > low}
            else:
                single.add(tag)

    def _send(self, channel: int, class_id: int, method_id: int, arguments: bytes) -> None:
        payload = struct.pack(">HH", class_id, method_id) + arguments
        head = struct.pack(">BHI", _METHOD, channel, len(payload))
        self._socket.sendall(head + payload + b"\xce")

    def _method(self) -> bytes:
        """Return the payload of the next method frame."""
        while True:
            if len(self._buffer) >= 7:
                kind, _channel, size = struct.unpack_from(">BHI", self._buffer)
                if len(self._buffer) >= size + 8:
                    payload = self._buffer[7 : 7 + size]
                    self._buffer = self._buffer[size + 8 :]
                    if kind == _METHOD:
                        return payload
                    continue
            self._buffer += self._socket.recv(65536)
