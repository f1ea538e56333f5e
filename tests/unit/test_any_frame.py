"""Any bytes on the wire are read as pika reads them, or end the connection soon."""

from __future__ import annotations

import dataclasses
import struct
import tracemalloc
from typing import Any

import pika
import pika.exceptions
import pika.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import Publisher
from outbox.consumers import consumer
from outbox.consumers.message.copies import dead_letter
from outbox.consumers.outcome import Ack, Dead
from outbox.messages.delivery import Delivery, QueueSpec
from outbox.messages.received_event import ReceivedEvent, decode
from outbox.settings import Settings
from outbox.testing.recorded_delivery import processed
from outbox.transports.rabbitmq import pika_connection
from outbox.transports.rabbitmq.amqp.encoder import Encoder
from outbox.transports.rabbitmq.subscription import RabbitMQSubscription
from outbox.url import BrokerURL

QUEUES = {b"ctag1": "orders"}
FIELDS = [one.name for one in dataclasses.fields(Delivery)]
FLAGS_OF_STRINGS = (0x8000, 0x4000, 0x0400, 0x0200, 0x0100, 0x0080, 0x0020, 0x0010, 0x0008, 0x0004)


def sized(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack(">I", len(data)) + data


def short(data: bytes) -> bytes:
    return bytes([len(data)]) + data


def entry(name: bytes, value: bytes) -> bytes:
    return short(name) + value


def frame(kind: int, payload: bytes, channel: int = 1) -> bytes:
    return struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce"


def nested(depth: int, kind: bytes) -> bytes:
    value = b"V"
    for _ in range(depth):
        value = sized(kind, value if kind == b"A" else b"\x01a" + value)
    return value


SIZES = {b"V": 0, b"bBt?": 1, b"sUu": 2, b"Iif": 4, b"D": 5, b"lLdT": 8}
# Every type of field there is, and some that are not, with values that no calendar has.
fixed = st.sampled_from([(bytes([kind]), size) for kinds, size in SIZES.items() for kind in kinds])
names = st.binary(max_size=10) | st.sampled_from(
    [b"outbox-attempt", b"outbox-occurred-at-us", b"outbox-key", b"x-death", b"CC"]
)
fields = st.recursive(
    fixed.flatmap(lambda kind: st.binary(min_size=kind[1], max_size=kind[1]).map(kind[0].__add__))
    | st.builds(sized, st.sampled_from([b"S", b"x"]), st.binary(max_size=30)),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: sized(b"A", b"".join(items)))
        | st.lists(
            st.builds(lambda name, value: short(name) + value, names, inner), max_size=4
        ).map(lambda items: sized(b"F", b"".join(items)))
    ),
    max_leaves=8,
)
# Some that pika still reads, and outbox does not; and some that nobody can read by recursion.
deep = st.just(nested(600, b"A")) | st.builds(
    nested, st.sampled_from([1, 33, 300, 2_000]), st.sampled_from([b"A", b"F"])
)
tables = st.lists(st.builds(entry, names, fields | fields | deep), max_size=4).map(
    lambda entries: struct.pack(">I", len(b"".join(entries))) + b"".join(entries)
)
strings = (
    st.text(max_size=20).map(str.encode)
    | st.binary(max_size=255)
    | st.sampled_from([b"\xff" * 255, b"\xff" * 86, b"a" * 255])
).map(short)


@st.composite
def properties(draw: st.DrawFn) -> bytes:
    """Flags, and what they announce, in the order of AMQP."""
    flags = draw(st.integers(0, 0xFFFF)) & 0xFFFC
    if draw(st.booleans()):
        flags &= ~0xC000  # so that it counts as JSON
    parts = []
    for bit in range(15, 1, -1):
        flag = 1 << bit
        if not flags & flag:
            continue
        if flag in FLAGS_OF_STRINGS:
            parts.append(draw(strings))
        elif flag == 0x2000:
            parts.append(draw(tables))
        else:
            size = 8 if flag == 0x0040 else 1
            parts.append(draw(st.binary(min_size=size, max_size=size)))
    return struct.pack(">H", flags) + b"".join(parts)


@st.composite
def messages(draw: st.DrawFn) -> bytes:
    """The frames of a delivery, each well formed; what is in them is any client's."""
    method = struct.pack(">HH", 60, 60) + short(b"ctag1") + struct.pack(">QB", 7, 0)
    method += draw(strings) + draw(strings)
    body = draw(st.sampled_from([b"{}", b"", b"[1]"]) | st.binary(max_size=30))
    header = struct.pack(">HHQ", 60, 0, len(body)) + draw(properties())
    return frame(1, method) + frame(2, header) + (frame(3, body) if body else b"")


class Stream(pika_connection.Connection):
    """A connection without a socket, and the messages a subscription reads from it."""

    def __init__(self, *, swift: bool = True) -> None:
        """Read deliveries from the bytes if ``swift``, else all with pika."""
        self._frame_buffer = b""
        self.bytes_received = 0
        self.deliveries: list[Delivery] = []
        self._method: Any = None
        self._header: Any = None
        url = BrokerURL.parse("amqp://127.0.0.1:1")
        self._subscription = RabbitMQSubscription(
            url, Settings(), [QueueSpec("orders", (), "outbox")], 1
        )
        self._subscription._deliver = self.deliveries.append
        if swift:
            self.read_deliveries(1, 0, QUEUES, self._subscription._hand_out)

    def _process_frame(self, frame_value: Any) -> None:
        """Put messages of one body frame together, as pika's channels do."""
        if isinstance(frame_value, pika.frame.Method):
            self._method = frame_value.method
        elif isinstance(frame_value, pika.frame.Header):
            self._header = frame_value
        fragment = getattr(frame_value, "fragment", b"")
        if self._header is not None and self._header.body_size == len(fragment):
            receive = self._subscription._consumers["orders"].receiver(0)
            receive(None, self._method, self._header.properties, fragment)
            self._header = None


def delivered(*pieces: bytes, swift: bool = True) -> list[Delivery]:
    stream = Stream(swift=swift)
    for piece in pieces:
        stream._on_data_available(piece)
    assert stream._frame_buffer == b""
    return stream.deliveries


def alike(found: list[Delivery], expected: list[Delivery]) -> bool:
    """Compare without recursion: headers may be nested deeper than Python compares."""
    left: list[tuple[Any, Any]] = [(found, expected)]
    while left:
        one, other = left.pop()
        if type(one) is not type(other):
            return False
        if isinstance(one, Delivery):
            left += [(getattr(one, name), getattr(other, name)) for name in FIELDS]
        elif isinstance(one, list | dict):
            if len(one) != len(other):
                return False
            left += zip(one, other, strict=True)
            if isinstance(one, dict):
                left += zip(one.values(), other.values(), strict=True)
        elif one != other:
            return False
    return True


@given(messages())
def test_any_message_arrives_the_same_through_either_reader(message: bytes) -> None:
    found = delivered(message)
    assert len(found) == 1
    assert alike(found, delivered(message, swift=False))


@given(st.lists(messages(), max_size=3), st.lists(st.integers(1, 200), max_size=20))
def test_messages_arrive_the_same_however_the_bytes_are_split(
    sent: list[bytes], sizes: list[int]
) -> None:
    data = b"".join(sent)
    pieces, at = [], 0
    for size in [*sizes, len(data)]:
        pieces.append(data[at : at + size])
        at += size
    assert alike(delivered(*pieces), delivered(data))


@consumer("orders")
def accept(event: ReceivedEvent) -> None:
    assert event.id
    assert event.headers is not None


@given(messages())
def test_any_message_is_processed_or_can_be_published_to_the_dead_letters(message: bytes) -> None:
    [delivery] = delivered(message)
    with Publisher("memory://") as publisher:
        outcome = processed(accept, delivery, publisher)
    assert isinstance(outcome, Ack | Dead)
    letter = dead_letter(delivery, outcome if isinstance(outcome, Dead) else Dead("why"))
    frames = Encoder("an-application").encode(letter)
    assert frames
    while frames:
        size, frame_value = pika.frame.decode_frame(frames)
        assert frame_value is not None
        frames = frames[size:]


@given(messages(), st.lists(st.tuples(st.integers(0, 2_000), st.integers(0, 255)), max_size=3))
def test_a_broken_stream_is_abandoned_or_read_to_its_end(
    message: bytes, changes: list[tuple[int, int]]
) -> None:
    broken = bytearray(message * 2)
    for at, byte in changes:
        broken[at % len(broken)] = byte
    stream = Stream()
    try:
        stream._on_data_available(bytes(broken))
    except Exception:  # pika ends the connection on any exception
        return
    assert len(stream._frame_buffer) <= len(broken)
    assert len(stream.deliveries) <= 2


@pytest.mark.parametrize("swift", [True, False])
def test_a_header_frame_without_its_end_mark_ends_the_connection(swift: bool) -> None:
    method = struct.pack(">HH", 60, 60) + short(b"ctag1") + struct.pack(">QB", 7, 0) + b"\0\0"
    header = frame(2, struct.pack(">HHQH", 60, 0, 0, 0))[:-1] + b"!"
    with pytest.raises(pika.exceptions.InvalidFrameError):
        Stream(swift=swift)._on_data_available(frame(1, method) + header)


@pytest.mark.parametrize("swift", [True, False])
def test_a_double_is_read_as_one_wherever_it_stands(swift: bool) -> None:
    half = b"d" + struct.pack(">d", 0.5)
    single = b"f" + struct.pack(">f", 2.25)
    table = b"".join(
        [
            entry(b"a", half),
            entry(b"b", single),
            entry(b"c", sized(b"A", half + sized(b"F", entry(b"d", half)))),
            entry(b"e", b"I" + struct.pack(">i", -3)),
        ]
    )
    method = struct.pack(">HH", 60, 60) + short(b"ctag1") + struct.pack(">QB", 7, 0) + b"\0\0"
    header = struct.pack(">HHQH", 60, 0, 2, 0xE000) + short(b"application/json") + short(b"utf8")
    header += struct.pack(">I", len(table)) + table
    message = frame(1, method) + frame(2, header) + frame(3, b"{}")
    [delivery] = delivered(message, swift=swift)
    expected = {"a": 0.5, "b": 2.25, "c": [0.5, {"d": 0.5}], "e": -3}
    assert delivery.headers == expected
    assert decode(delivery).headers == expected
    assert dead_letter(delivery, Dead("why")).headers.items() >= expected.items()


HUGE = struct.pack(">I", 0xFFFF_FFFF)


@pytest.mark.parametrize(
    "table",
    [HUGE, *(struct.pack(">I", 7) + b"\x01a" + kind + HUGE for kind in (b"S", b"x", b"A", b"F"))],
    ids=["table", "text", "bytes", "array", "table in a table"],
)
@pytest.mark.parametrize("swift", [True, False])
def test_a_false_size_allocates_no_memory(table: bytes, swift: bool) -> None:
    header = struct.pack(">HHQH", 60, 0, 2, 0x2000) + table
    method = struct.pack(">HH", 60, 60) + short(b"ctag1") + struct.pack(">QB", 7, 0) + b"\0\0"
    message = frame(1, method) + frame(2, header) + frame(3, b"{}")
    tracemalloc.start()
    try:
        [delivery] = delivered(message, swift=swift)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1_000_000
    assert delivery.body == b"{}"
