"""Properties and headers are parsed from bytes and rebuilt unchanged."""

from __future__ import annotations

import datetime
import struct
from typing import Any

import pika
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.transports.rabbitmq.amqp.content_header import ContentHeader, MalformedHeader
from tests.amqp import properties_of

NAMES = (
    "content_type",
    "content_encoding",
    "correlation_id",
    "reply_to",
    "expiration",
    "message_id",
    "type",
    "user_id",
    "app_id",
    "cluster_id",
)


def sized(kind: bytes, data: bytes) -> bytes:
    return kind + struct.pack(">I", len(data)) + data


def entry(name: bytes, value: bytes) -> bytes:
    return bytes([len(name)]) + name + value


field_names = st.binary(max_size=20)
fixed = st.sampled_from([(b"b", 1), (b"B", 1), (b"t", 1), (b"s", 2), (b"u", 2), (b"I", 4)]) | (
    st.sampled_from([(b"i", 4), (b"f", 4), (b"l", 8), (b"d", 8), (b"T", 8), (b"D", 5), (b"V", 0)])
)
values = st.recursive(
    fixed.flatmap(lambda kind: st.binary(min_size=kind[1], max_size=kind[1]).map(kind[0].__add__))
    | st.builds(sized, st.sampled_from([b"S", b"x"]), st.binary(max_size=30)),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda items: sized(b"A", b"".join(items)))
        | st.lists(st.builds(entry, field_names, inner), max_size=4).map(
            lambda items: sized(b"F", b"".join(items))
        )
    ),
    max_leaves=12,
)
short_strings = st.binary(max_size=255).map(lambda data: bytes([len(data)]) + data)
content_headers = st.builds(
    ContentHeader,
    st.dictionaries(st.sampled_from(NAMES), short_strings),
    st.lists(st.tuples(field_names, values), max_size=6).map(tuple),
)


def by_pika(**properties: Any) -> bytes:
    return bytes(pika.frame.Header(1, 7, properties_of(**properties)).marshal()[7:-1])


@given(content_headers, st.integers(0, (1 << 64) - 1))
def test_any_header_of_a_client_is_rebuilt_unchanged(header: ContentHeader, size: int) -> None:
    payload = header.encode(size)
    assert ContentHeader.parse(payload) == header
    assert ContentHeader.parse(payload).encode(size) == payload


@given(content_headers, st.data())
def test_a_corrupted_header_raises_nothing_but_malformed_header(
    header: ContentHeader, data: Any
) -> None:
    payload = bytearray(header.encode(3))
    at = data.draw(st.integers(0, len(payload) - 1))
    payload[at] = data.draw(st.integers(0, 255))
    for broken in (bytes(payload), bytes(payload[:at])):
        try:
            found = ContentHeader.parse(broken)
        except MalformedHeader:
            continue
        for name, _ in found.headers:
            found.header(name.decode(errors="replace"))  # nor does decoding raise


def test_every_property_of_pika_is_parsed() -> None:
    strings = {name: f"the {name}" for name in NAMES}
    payload = by_pika(
        **strings, delivery_mode=1, priority=9, timestamp=1_700_000_000, headers={"a": "b"}
    )
    header = ContentHeader.parse(payload)
    assert header.encode(7) == payload
    assert {name: header.text(name) for name in NAMES} == strings
    assert header.header("a") == "b"


@pytest.mark.parametrize(
    "value",
    [
        "é",
        b"\xff",
        -5,
        1 << 40,
        True,
        None,
        ["a", 1, {"b": [None]}],
        datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    ],
    ids=repr,
)
def test_a_header_is_decoded_to_its_original_value(value: Any) -> None:
    header = ContentHeader.parse(by_pika(headers={"other": 1, "mine": value}))
    assert header.header("mine") == value
    assert header.header("missing") is None


@pytest.mark.parametrize(
    "value",
    [
        b"T" + b"\xff" * 8,
        sized(b"A", b"?"),
        sized(b"F", b"\xff"),
        sized(b"A", sized(b"S", b"x")[:-1]),
    ],
    ids=["a date beyond all", "unknown type", "short table", "short string"],
)
def test_an_invalid_header_value_counts_as_missing(value: bytes) -> None:
    assert ContentHeader(headers=((b"odd", value),)).header("odd") is None


def test_a_header_nested_a_thousand_deep_is_skipped() -> None:
    value = b"V"
    for _ in range(1_000):
        value = sized(b"A", value)
    header = ContentHeader(headers=((b"deep", value),))
    assert header.header("deep") is None
    assert ContentHeader.parse(header.encode(1)) == header


def test_a_header_frame_of_another_class_is_refused() -> None:
    with pytest.raises(MalformedHeader, match="class 61"):
        ContentHeader.parse(struct.pack(">HHQH", 61, 0, 0, 0))
