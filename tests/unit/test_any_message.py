"""Any message gets an outcome, and a dead letter that can be published."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import pickle
import sys
from collections.abc import Iterator
from typing import Any
from unittest.mock import ANY

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import Event, Publisher, enqueue_event, publish
from outbox.consumers import consumer
from outbox.consumers.message.copies import dead_letter
from outbox.consumers.outcome import Ack, Dead, Outcome, Reject, Return
from outbox.messages.delivery import Delivery, as_delivered
from outbox.messages.received_event import ReceivedEvent, Undecodable, decode
from outbox.testing.recorded_delivery import processed
from outbox.transports.rabbitmq.amqp.encoder import Encoder

# What a subscription hands out: 255 bytes, and what they become where they are not UTF-8.
short = st.text(max_size=20) | (
    st.binary(max_size=255) | st.sampled_from([b"\xff" * 255, b"\xff" * 86, b"a" * 255])
).map(lambda data: data.decode(errors="replace"))


class Long(int):
    """As pika has one."""


names = st.text(max_size=20) | st.sampled_from(
    ["outbox-attempt", "outbox-key", "outbox-occurred-at-us", "outbox-format", "x-death", "CC"]
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.integers(-(2**63), 2**63 - 1).map(Long)
    | st.floats()
    | st.text(max_size=20)
    | st.binary(max_size=20)
    | st.builds(decimal.Decimal, st.integers(-(2**31), 2**31 - 1))
    | st.datetimes(timezones=st.just(datetime.UTC))
)
values = st.recursive(
    leaves,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(names | st.binary(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)


def nested(depth: int, table: bool) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = {"a": value} if table else [value]
    return value


deep = st.builds(nested, st.sampled_from([1, 33, 400, 900]), st.booleans())
tables = st.dictionaries(names | st.binary(max_size=5), values | deep, max_size=5)
bodies = st.sampled_from([b"{}", b'{"a": [1, null]}']) | (
    st.binary(max_size=40)
    | st.text(max_size=40).map(str.encode)
    | st.sampled_from([b"", b"{}", b"[1]", b'"\\ud800"', b"NaN", b"1e999", b"\xef\xbb\xbf{}"])
    | st.integers(1, 2_000).map(lambda size: b"[" * size)
    | st.integers(1, 10_000).map(lambda size: b"9" * size)
)
content_types = st.none() | st.sampled_from(
    [
        "",
        "application/json",
        "application/json",
        "APPLICATION/JSON; charset=utf-8",
        "text/plain",
        "application/json;",
    ]
)
deliveries = st.builds(
    Delivery,
    queue=st.just("orders"),
    tag=st.just(1),
    generation=st.just(0),
    redelivered=st.booleans(),
    exchange=short,
    target=short,
    body=bodies,
    content_type=content_types | content_types | short,
    content_encoding=st.none() | st.sampled_from([None, "", "utf-8", "utf-8", "gzip"]) | short,
    headers=st.none() | tables,
    message_id=st.none() | short,
    priority=st.none() | st.integers(0, 255),
    timestamp=st.none() | st.integers(0, 2**64 - 1),
)


class Unspeakable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("it cannot be said")


class Unreadable:
    def __str__(self) -> str:
        raise RuntimeError("it cannot be said")


@pytest.fixture(scope="module")
def publisher() -> Iterator[Publisher]:
    with Publisher("memory://") as found:
        yield found


def outcome_of(process: Any, delivery: Delivery, publisher: Publisher, **options: Any) -> Outcome:
    found = consumer("orders", **options)(process)
    outcome = processed(found, delivery, publisher)
    assert isinstance(outcome, Ack | Dead | Return)
    return outcome


def can_be_published(delivery: Delivery, dead: Dead) -> bool:
    letter = dead_letter(delivery, dead)
    return bool(Encoder("an-application").encode(letter))


def accept(event: ReceivedEvent) -> None:
    assert isinstance(event.payload, object)


def follow(event: ReceivedEvent) -> None:
    enqueue_event(str(event.id), "follow.on", key="k")
    publish()


def send_on(event: ReceivedEvent) -> None:
    enqueue_event(event.payload, event.target, headers=event.headers, id=event.id, key=event.key)


@pytest.mark.hazard("H9")
@given(st.sampled_from([accept, follow, send_on]), deliveries)
def test_any_message_is_processed_or_dead_lettered(
    publisher: Publisher, process: Any, delivery: Delivery
) -> None:
    outcome = outcome_of(process, delivery, publisher, auto_publish=True)
    if process is not send_on and isinstance(outcome, Dead):
        assert outcome.reason.startswith("undecodable: ")


@pytest.mark.hazard("H9")
@given(deliveries)
def test_any_message_can_be_published_to_the_dead_letters(
    publisher: Publisher, delivery: Delivery
) -> None:
    outcome = outcome_of(accept, delivery, publisher)
    assert can_be_published(delivery, outcome if isinstance(outcome, Dead) else Dead("why"))


ERRORS = [
    Unspeakable(),
    SystemExit(1),
    KeyError("\udc80"),
    ValueError(Unreadable()),
    RecursionError(),
    Reject(),
    Reject("\udc80" * 3_000),
    Reject(None),  # type: ignore[arg-type]
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_whatever_a_consumer_raises_can_be_published_to_the_dead_letters(
    publisher: Publisher, error: BaseException
) -> None:
    def process(event: ReceivedEvent) -> None:
        enqueue_event(1, "dropped")
        raise error

    delivery = as_delivered(Event("1", "orders", "", b"{}"), "orders", 1)
    outcome = outcome_of(process, delivery, publisher)
    assert isinstance(outcome, Dead)
    assert can_be_published(delivery, outcome)


@pytest.mark.parametrize("depth", [40, 500, 900])
def test_headers_nested_too_deeply_are_left_out_of_a_dead_letter(
    publisher: Publisher, depth: int
) -> None:
    delivery = as_delivered(Event("1", "orders", "", b"{}"), "orders", 1)
    delivery.headers = {"deep": nested(depth, table=False), "other": 1}
    letter = dead_letter(delivery, Dead("why"))
    assert letter.headers["outbox-dead-headers"] == "dropped: they are nested too deeply"
    assert not {"deep", "other"} & set(letter.headers)
    assert Encoder().encode(letter)


def test_headers_nested_too_deeply_to_read_make_a_message_undecodable(publisher: Publisher) -> None:
    delivery = as_delivered(Event("1", "orders", "", b"{}"), "orders", 1)
    delivery.headers = {"deep": nested(5_000, table=True)}
    outcome = outcome_of(accept, delivery, publisher)
    assert outcome == Dead("undecodable: its headers are nested too deeply", ANY)


def test_an_id_that_is_not_utf_8_is_shortened_to_fit() -> None:
    delivery = as_delivered(Event("1", "orders", "", b"{}"), "orders", 1)
    delivery.message_id = delivery.content_type = (b"\xff" * 255).decode(errors="replace")
    letter = dead_letter(delivery, Dead("why"))
    assert letter.id == letter.content_type == "\ufffd" * 85
    assert Encoder().encode(letter)


@pytest.mark.hazard("H1")
@pytest.mark.parametrize(
    "content_type",
    ["application/x-python-serialize", "application/python-pickle", "application/json", None],
)
def test_nothing_in_a_message_is_ever_executed_or_imported(content_type: str | None) -> None:
    executed: list[str] = []
    _EXECUTED.append(executed)

    class Trap:
        def __reduce__(self) -> Any:
            return _execute, ("by a pickle",)

    headers = {"handler": "os:system", "task": "antigravity.geohash", "__class__": "os"}
    poison = Delivery(
        "q", 1, 1, False, "e", "os.system", pickle.dumps(Trap()), content_type, headers=headers
    )
    with pytest.raises(Undecodable):
        decode(poison)
    harmless = decode(
        dataclasses.replace(poison, body=b'{"__reduce__": "os.system"}', content_type=None)
    )
    assert harmless.payload == {"__reduce__": "os.system"}
    assert harmless.headers == headers
    assert executed == []
    assert "antigravity" not in sys.modules


_EXECUTED: list[list[str]] = []


def _execute(what: str) -> None:
    _EXECUTED[-1].append(what)
