"""What a parked message contains, how it is selected, and how it is replayed."""

from __future__ import annotations

import datetime
import struct
from typing import Any

import pika.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import Event
from outbox.consumers.message.copies import dead_letter
from outbox.consumers.outcome import Dead
from outbox.messages.dead_letters import PARKING_QUEUE, parked
from outbox.messages.delivery import Delivery
from outbox.messages.parked_message import Address, ParkedMessage, Selection
from outbox.transports.rabbitmq.amqp.content_header import ContentHeader
from outbox.transports.rabbitmq.amqp.encoder import Encoder
from outbox.transports.rabbitmq.browser import next_window
from outbox.transports.rabbitmq.parked_queues import VerbatimEncoder
from outbox.transports.rabbitmq.replayed import HeldMessage, Replayed, read, replayed
from tests.amqp import properties_of
from tests.unit.test_content_header import by_pika, content_headers

texts = st.text(max_size=40)
address_parts = st.text("abcdef.é", min_size=1, max_size=40)
header_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 63) - 1) | texts | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(address_parts, inner, max_size=3),
    max_leaves=5,
)
events = st.builds(
    Event,
    id=st.text(min_size=1, max_size=40),
    target=address_parts,
    exchange=address_parts | st.just(""),
    body=st.binary(max_size=200),
    headers=st.dictionaries(address_parts, header_values, max_size=4),
    key=st.none() | address_parts,
    priority=st.none() | st.integers(0, 255),
    occurred_at=st.datetimes(datetime.datetime(1971, 1, 1), timezones=st.just(datetime.UTC)),
)


def held(event: Event, queue: str, app_id: str = "") -> HeldMessage:
    """Return ``event`` as it is read again from ``queue``."""
    frames = Encoder(app_id).encode(event)
    [method_size] = struct.unpack(">I", frames[3:7])
    header = frames[8 + method_size :]
    [size] = struct.unpack(">I", header[3:7])
    return read(queue, ContentHeader.parse(header[7 : 7 + size]), event.body, 1, readable=True)


def foreign(queue: str = PARKING_QUEUE, *, readable: bool = True, **properties: Any) -> HeldMessage:
    header = ContentHeader.parse(by_pika(**properties))
    return read(queue, header, b"body", 1, readable=readable)


def delivery(headers: dict[str, Any] | None = None, **options: Any) -> Delivery:
    options = {"exchange": "shop", "target": "order.placed", "message_id": "7", **options}
    return Delivery("orders", 1, 1, False, body=b"{}", headers=headers, **options)


@given(events, st.text(max_size=20))
def test_a_parked_event_is_replayed_with_the_frames_it_was_first_published_with(
    event: Event, app_id: str
) -> None:
    message = held(parked(event, "312 NO_ROUTE"), PARKING_QUEUE, app_id)
    assert (message.kind, message.id, message.reason) == ("parked", event.id, "312 NO_ROUTE")
    assert message.origin == (event.exchange, event.target)
    again = replayed(message)
    assert isinstance(again, Replayed)
    assert VerbatimEncoder().encode(again) == Encoder(app_id).encode(event)


@given(content_headers)
def test_a_replay_changes_only_the_delivery_mode_of_another_clients_message(
    header: ContentHeader,
) -> None:
    address = [("outbox-parked-exchange", "shop"), ("outbox-parked-target", "order.placed")]
    clean = header.without(lambda name: name.startswith(("outbox-", "x-")) or name in ("CC", "BCC"))
    clean = ContentHeader({**clean.properties, "message_id": b"\x017"}, clean.headers)
    again = replayed(read(PARKING_QUEUE, clean.with_headers(address), b"", 1, readable=True))
    assert isinstance(again, Replayed)
    assert again.header == clean.persistent()


def test_a_dead_letter_returns_to_its_queue_and_names_its_first_address() -> None:
    own = {"outbox-key": "k", "tenant": "acme", "outbox-new": 1}
    letter = dead_letter(delivery(own, priority=4), Dead("no", ValueError()))
    message = held(letter, "orders.dead")
    assert (message.kind, message.died_in, message.reason) == ("dead", "orders", "no")
    assert (message.origin, message.error) == (("shop", "order.placed"), "ValueError")
    again = replayed(message)
    assert isinstance(again, Replayed)
    assert (again.exchange, again.target, again.id) == ("", "orders", "7")
    found = {name.decode() for name, _ in again.header.headers}
    assert found == {
        *own,
        "outbox-format",
        "outbox-occurred-at-us",
        "outbox-origin-exchange",
        "outbox-origin-target",
    }
    assert again.header.header("outbox-origin-target") == "order.placed"
    assert again.header.text("type") == "order.placed"


def test_a_dead_letter_goes_to_its_original_address_on_request() -> None:
    letter = dead_letter(delivery({"outbox-origin-target": "older"}), Dead("no"))
    again = replayed(held(letter, "orders.dead"), to_origin=True)
    assert isinstance(again, Replayed)
    assert (again.exchange, again.target) == ("shop", "order.placed")
    assert again.header.header("outbox-origin-target") is None


def test_a_second_death_does_not_hide_the_first_address() -> None:
    first = replayed(held(dead_letter(delivery(), Dead("no")), "orders.dead"))
    assert isinstance(first, Replayed)
    headers = {
        name: first.header.header(name)
        for name in ("outbox-origin-exchange", "outbox-origin-target")
    }
    second = held(dead_letter(delivery(headers), Dead("no")), "orders.dead")
    again = replayed(second)
    assert isinstance(again, Replayed)
    assert sum(name == b"outbox-origin-target" for name, _ in again.header.headers) == 1
    assert again.header.header("outbox-origin-target") == "order.placed"


def test_a_replayed_dead_letter_has_its_content_encoding_again() -> None:
    letter = dead_letter(delivery(content_encoding="gzip"), Dead("unknown encoding"))
    again = replayed(held(letter, "orders.dead"))
    assert isinstance(again, Replayed)
    assert again.header.text("content_encoding") == "gzip"


def test_a_message_dead_lettered_by_the_broker_is_replayed_without_the_brokers_headers() -> None:
    death = {
        "queue": "orders",
        "reason": "delivery_limit",
        "exchange": "shop",
        "routing-keys": ["order.placed"],
        "count": 3,
        "time": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
    }
    headers = {"x-death": [death], "x-delivery-count": 1, "x-first-death-queue": "orders", "a": 1}
    message = foreign("orders.dead", headers=headers, message_id="7", correlation_id="c")
    assert (message.kind, message.died_in, message.attempts) == ("dead", "orders", 3)
    assert message.reason == "dead-lettered by the broker: delivery_limit"
    assert message.at == "2026-01-02T00:00:00+00:00"
    assert message.returns == 1
    again = replayed(message)
    assert isinstance(again, Replayed)
    assert (again.exchange, again.target) == ("", "orders")
    assert [name for name, _ in again.header.headers] == [
        b"a",
        b"outbox-origin-exchange",
        b"outbox-origin-target",
    ]
    assert again.header.text("correlation_id") == "c"


def test_headers_that_would_reroute_a_message_are_not_sent_on() -> None:
    address = {"outbox-parked-exchange": "shop", "outbox-parked-target": "order.placed"}
    again = replayed(foreign(headers={**address, "CC": ["elsewhere"], "BCC": ["there"]}))
    assert isinstance(again, Replayed)
    assert again.header.headers == ()


def test_a_parked_event_that_died_in_a_consumer_of_the_parking_queue_is_a_dead_letter() -> None:
    headers = {"outbox-parked-target": "order.placed", "outbox-dead-queue": PARKING_QUEUE}
    message = foreign(f"{PARKING_QUEUE}.dead", headers=headers)
    assert message.destination() == ("", PARKING_QUEUE)
    again = replayed(message)
    assert isinstance(again, Replayed)
    assert again.header.header("outbox-parked-target") == "order.placed"


@pytest.mark.parametrize(
    ("properties", "why"),
    [
        ({}, "no header that says"),
        ({"headers": {"outbox-parked-target": 5}}, "no header that says"),
        ({"headers": {"outbox-parked-target": ""}}, "no header that says"),
        ({"headers": {"outbox-dead-queue": ""}}, "no header that says"),
        ({"headers": {"x-death": "mine"}}, "no header that says"),
        ({"headers": {"x-death": [{"queue": 5}]}}, "no header that says"),
        ({"headers": {"outbox-parked-target": PARKING_QUEUE}}, "the queue that it is in"),
        ({"headers": {"outbox-parked-target": "x" * 256}}, "longer than 255 bytes"),
        (
            {"headers": {"outbox-dead-queue": "q", "outbox-dead-target": "é" * 128}},
            "longer than 255 bytes",
        ),
    ],
)
def test_a_message_without_a_usable_address_is_not_replayed(
    properties: dict[str, Any], why: str
) -> None:
    assert why in str(replayed(foreign(**properties)))


def test_a_message_that_would_not_be_recognised_when_returned_is_not_replayed() -> None:
    headers = {"outbox-parked-target": "order.placed"}
    assert "cannot be read" in str(replayed(foreign(headers=headers, readable=False)))
    header = ContentHeader.parse(by_pika(headers=headers))
    odd = ContentHeader({"message_id": b"\x02\xff\xfe"}, header.headers)
    assert "not UTF-8" in str(replayed(read(PARKING_QUEUE, odd, b"", 1, readable=True)))
    unknown = read(PARKING_QUEUE, None, b"", 1, readable=False)
    assert unknown.kind == "foreign"
    assert isinstance(replayed(unknown), str)


def message(**options: Any) -> ParkedMessage:
    return ParkedMessage(**{"queue": "q.dead", "kind": "parked", "id": "1", "body": b"", **options})


@pytest.mark.parametrize(
    ("selection", "selected"),
    [
        (Selection(), True),
        (Selection(frozenset({"1", "2"})), True),
        (Selection(frozenset({"2"})), False),
        (Selection(reason="NO_R"), True),
        (Selection(reason="no_r"), False),
        (Selection(target="order.*"), True),
        (Selection(target="order"), False),
        (Selection(frozenset({"1"}), "NO_ROUTE", "#"), True),
        (Selection(frozenset({"1"}), "404", "#"), False),
        (Selection(before=datetime.datetime(2100, 1, 1, tzinfo=datetime.UTC)), True),
        (Selection(before=datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)), False),
    ],
)
def test_a_message_is_selected_when_it_meets_every_condition(
    selection: Selection, selected: bool
) -> None:
    found = message(
        reason="312 NO_ROUTE", origin=Address("shop", "order.placed"), at="2026-01-02T03:04:05"
    )
    assert (found in selection) is selected


def test_a_message_without_a_property_meets_no_condition_on_it() -> None:
    assert message() in Selection()
    assert message() not in Selection(target="#")
    assert message() not in Selection(reason="a")
    assert message() not in Selection(before=datetime.datetime.now(datetime.UTC))


@given(st.integers(0, 1000), st.integers(0, 1 << 40))
def test_a_window_is_never_empty_and_never_over_a_thousand(messages: int, size: int) -> None:
    window = next_window(messages, size)
    assert 1 <= window <= 1000
    if messages and window > 1:
        assert window * size <= 16 * 1024 * 1024 * messages


def test_pika_decodes_the_frames_of_a_replay() -> None:
    headers = {"outbox-parked-target": "order.placed", "a": "b"}
    again = replayed(foreign(headers=headers, message_id="7", priority=3))
    assert isinstance(again, Replayed)
    expected = properties_of(headers={"a": "b"}, message_id="7", priority=3, delivery_mode=2)
    frames = VerbatimEncoder().encode(again)
    end, _method = pika.frame.decode_frame(frames)
    header: Any = pika.frame.decode_frame(frames[end:])[1]
    assert header.properties == expected
