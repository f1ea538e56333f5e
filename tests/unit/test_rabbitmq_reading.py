"""Deliveries and confirms are read from the bytes as pika would read them."""

from __future__ import annotations

import datetime
import random
from typing import Any

import pika
import pika.frame
import pika.spec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.messages.delivery import Delivery
from outbox.transports.rabbitmq import pika_connection
from outbox.transports.rabbitmq.amqp.decoder import LEAVE, WAIT, delivery_at

QUEUES = {b"ctag1": "orders"}


def message(
    body: bytes = b"{}",
    *,
    channel: int = 1,
    consumer_tag: str = "ctag1",
    exchange: str = "outbox",
    target: str = "order.placed",
    redelivered: bool = False,
    frame_max: int = 131_072,
    **properties: Any,
) -> bytes:
    """Return the frames of a delivery as pika encodes them."""
    method = pika.spec.Basic.Deliver(consumer_tag, 7, redelivered, exchange, target)  # type: ignore[no-untyped-call]
    props = pika.BasicProperties(**properties)  # type: ignore[no-untyped-call]
    frames = [pika.frame.Method(channel, method), pika.frame.Header(channel, len(body), props)]
    pieces = [body[at : at + frame_max - 8] for at in range(0, len(body), frame_max - 8)]
    return b"".join(
        frame.marshal() for frame in [*frames, *(pika.frame.Body(channel, one) for one in pieces)]
    )


def ack(tag: int, multiple: bool = False, channel: int = 1) -> bytes:
    return pika.frame.Method(channel, pika.spec.Basic.Ack(tag, multiple)).marshal()  # type: ignore[no-untyped-call]


def read(data: bytes) -> Delivery:
    behind, delivery = delivery_at(data, 0, 3, QUEUES)
    assert delivery is not None
    assert behind == len(data)
    return delivery


text = st.text(max_size=20)
headers = st.dictionaries(
    st.text(min_size=1, max_size=10),
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | text
    | st.lists(st.integers(0, 9), max_size=3)
    | st.dictionaries(st.text(max_size=5), text, max_size=3)
    | st.datetimes(
        min_value=datetime.datetime(1970, 1, 1), max_value=datetime.datetime(2100, 1, 1)
    ),
    max_size=5,
)


@given(
    body=st.binary(max_size=50),
    exchange=text,
    target=text,
    redelivered=st.booleans(),
    properties=st.fixed_dictionaries(
        {},
        optional={
            "content_type": text,
            "content_encoding": text,
            "headers": headers,
            "delivery_mode": st.sampled_from([1, 2]),
            "priority": st.integers(0, 255),
            "correlation_id": text,
            "reply_to": text,
            "expiration": text,
            "message_id": text,
            "timestamp": st.integers(0, 2**40),
            "type": text,
            "user_id": text,
            "app_id": text,
            "cluster_id": text,
        },
    ),
)
def test_a_delivery_is_read_as_pika_reads_it(
    body: bytes, exchange: str, target: str, redelivered: bool, properties: dict[str, Any]
) -> None:
    data = message(body, exchange=exchange, target=target, redelivered=redelivered, **properties)
    behind_method, _ = pika.frame.decode_frame(data)
    _, header = pika.frame.decode_frame(data[behind_method:])
    assert isinstance(header, pika.frame.Header)
    expected = header.properties
    found = read(data)
    assert (found.queue, found.tag, found.generation) == ("orders", 7, 3)
    assert (found.exchange, found.target, found.body) == (exchange, target, body)
    assert found.redelivered is redelivered
    for name in ("content_type", "content_encoding", "headers", "message_id", "priority"):
        assert getattr(found, name) == getattr(expected, name), name
    assert found.timestamp == expected.timestamp


def test_an_incomplete_frame_is_waited_for() -> None:
    data = message(b"x" * 100, message_id="id", headers={"a": 1})
    method_size, _ = pika.frame.decode_frame(data)
    for size in range(method_size, len(data)):
        assert delivery_at(data[:size], 0, 3, QUEUES) == (WAIT, None)


@pytest.mark.parametrize(
    "data",
    [
        message(consumer_tag="another"),
        message(b"x" * 200_000),  # of two body frames
        message(b"x" * 200_000)[:100_000],  # too large to wait for
        message(b"x" * 200, frame_max=108),
        message()[:-1] + b"!",
        message(target="caf\xe9")[:40].replace("\xe9".encode(), b"\xe9\xe9") + b"!" * 50,
    ],
)
def test_unusual_frames_are_left_to_pika(data: bytes) -> None:
    assert delivery_at(data, 0, 3, QUEUES) == (LEAVE, None)


def test_a_frame_of_another_channel_in_between_is_left_to_pika() -> None:
    data = message()
    method_size, _ = pika.frame.decode_frame(data)
    between = data[:method_size] + ack(1, channel=2) + data[method_size:]
    assert delivery_at(between, 0, 3, QUEUES) == (LEAVE, None)


class Stream(pika_connection.Connection):
    """A connection without a socket: what is left to pika is written down."""

    def __init__(self) -> None:
        self._frame_buffer = b""
        self.bytes_received = 0
        self.seen: list[Any] = []
        self.read_deliveries(1, 3, QUEUES, lambda delivery: self.seen.append(delivery.body))
        self._on_confirms = lambda acks: self.seen.extend(acks)

    def _process_frame(self, frame_value: Any) -> None:
        self.seen.append(type(frame_value).__name__)


@pytest.mark.parametrize("seed", range(20))
def test_frames_keep_their_order_however_the_bytes_are_split(seed: int) -> None:
    chance = random.Random(seed)
    heartbeat = pika.frame.Heartbeat().marshal()
    pieces: list[tuple[bytes, list[Any]]] = [
        (message(b"one"), [b"one"]),
        (ack(1), [(1, 0)]),
        (ack(5, multiple=True), [(5, 1)]),
        (ack(6, channel=2), ["Method"]),
        (heartbeat, ["Heartbeat"]),
        (message(b""), [b""]),
        (message(b"elsewhere", channel=2), ["Method", "Header", "Body"]),
        (message(b"y" * 200, frame_max=108), ["Method", "Header", "Body", "Body"]),
    ]
    chosen = chance.choices(pieces, k=30)
    data = b"".join(piece for piece, _ in chosen)
    size = len(data)
    stream = Stream()
    while data:
        step = chance.choice([1, 7, 50, 400])
        stream._on_data_available(data[:step])
        data = data[step:]
    assert stream.seen == [one for _, expected in chosen for one in expected]
    assert stream._frame_buffer == b""
    assert stream.bytes_received == size  # what heartbeats take for a sign of life


def test_after_the_fast_reader_is_switched_off_pika_reads_everything() -> None:
    stream = Stream()
    stream.read_all_with_pika()
    stream._on_data_available(message(b"one") + ack(1))
    assert stream.seen == ["Method", "Header", "Body", "Method"]
