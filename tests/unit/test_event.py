"""What can be enqueued, and what is refused in the caller's line."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import json
import pickle
import random
import re
import uuid
from typing import Any

import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox import Event, EventCollector, InvalidEvent, Publisher, UsageError, configure
from outbox.ids import follow_on_id, new_id
from outbox.serializer import JSONSerializer


@pytest.fixture
def collector() -> EventCollector:
    return EventCollector(publisher=Publisher("memory://"))


@dataclasses.dataclass
class Point:
    x: int
    when: datetime.date


class Model(pydantic.BaseModel):
    price: decimal.Decimal


class Nowhere(datetime.tzinfo):
    """Leaves open how far from UTC it is, which Python takes for no time zone at all."""

    def utcoffset(self, at: datetime.datetime | None) -> None:
        return None

    dst = tzname = utcoffset


EAST = datetime.timezone(datetime.timedelta(hours=12))
WEST = datetime.timezone(datetime.timedelta(hours=-12))


class Colour(enum.Enum):
    RED = "red"


def test_common_types_are_supported_out_of_the_box(collector: EventCollector) -> None:
    at = datetime.datetime(2026, 1, 2, 3, 4, 5, 678, tzinfo=datetime.UTC)
    an_id = uuid.uuid4()
    event = collector.enqueue_event(
        {
            "at": at,
            "day": at.date(),
            "price": decimal.Decimal("1.10"),
            "id": an_id,
            "point": Point(1, at.date()),
            "model": Model(price=decimal.Decimal("2.50")),
            "colour": Colour.RED,
            "text": "Grüße ☃",
            "tuple": (1, None, True),
        },
        "x",
    )
    assert event.payload == {
        "at": "2026-01-02T03:04:05.000678+00:00",
        "day": "2026-01-02",
        "price": "1.10",
        "id": str(an_id),
        "point": {"x": 1, "when": "2026-01-02"},
        "model": {"price": "2.50"},
        "colour": "red",
        "text": "Grüße ☃",
        "tuple": [1, None, True],
    }


class Line(pydantic.BaseModel):
    unit_price: int = pydantic.Field(alias="unitPrice")


class Order(pydantic.BaseModel):
    order_id: int = pydantic.Field(serialization_alias="orderId")
    lines: list[Line]


class OrderByName(Order):
    model_config = pydantic.ConfigDict(serialize_by_alias=False)


@pydantic.dataclasses.dataclass
class Payment:
    order_id: int = pydantic.Field(alias="orderId")


@dataclasses.dataclass
class Refund(Payment):
    reason: str = ""


class Dumpable:
    """A class with the method alone, as other libraries have it."""

    def model_dump(self, mode: str) -> dict[str, str]:
        return {"mode": mode}


LINES = [Line(unitPrice=5)]


@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (Order(order_id=1, lines=LINES), {"orderId": 1, "lines": [{"unitPrice": 5}]}),
        (OrderByName(order_id=1, lines=LINES), {"order_id": 1, "lines": [{"unit_price": 5}]}),
        (pydantic.RootModel[list[Line]](LINES), [{"unitPrice": 5}]),
        (Payment(orderId=1), {"orderId": 1}),
        (Refund(1), {"order_id": 1, "reason": ""}),
        (Dumpable(), {"mode": "json"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_pydantic_model_is_written_by_its_aliases_unless_it_says_otherwise(
    payload: Any, expected: Any
) -> None:
    serializer = JSONSerializer()
    assert serializer.decode(serializer.encode({"one": payload})) == {"one": expected}


circular: list[Any] = []
circular.append(circular)
itself: list[Any] = []
itself.append({"itself": itself})
deep: list[Any] = []
for _ in range(100_000):
    deep = [deep]


@pytest.mark.hazard("A10", "H6")
@pytest.mark.parametrize(
    ("payload", "expected"),
    [
        (float("nan"), "cannot be carried"),
        ({"a": [float("inf")]}, "cannot be carried"),
        ({1: "a"}, "the key 1 is a int, not a string"),
        ({"a": [{None: 1}]}, "the key None"),
        ({"a": Point(1, {2: 3})}, "the key 2"),  # type: ignore[arg-type]
        ({"a": {1, 2}}, "a set cannot be carried"),
        (b"bytes", "a bytes cannot be carried"),
        (object(), "a object cannot be carried"),
        ("\ud800", "cannot be carried"),
        (circular, "cannot be carried"),
        (deep, "nested too deeply"),
        ("x" * 2_000, "more than max_body_bytes"),
    ],
)
def test_a_payload_that_cannot_be_serialised_is_refused(payload: Any, expected: str) -> None:
    collector = EventCollector(publisher=Publisher("memory://", max_body_bytes=1_000))
    with pytest.raises(InvalidEvent, match=re.escape(expected)):
        collector.enqueue_event(payload, "x")
    assert collector.events == ()


@pytest.mark.parametrize(
    ("payload", "path"),
    [
        ({"a": [1, {"b": object()}]}, "payload['a'][1]['b']"),
        ([float("nan")], "payload[0]"),
        ({"a": {1: 2}}, "payload['a']"),
        ({"a": "\ud800"}, "payload['a']"),
        ({"a": Point(1, [object()])}, "payload['a']['when'][0]"),  # type: ignore[arg-type]
        ({"a": {"circular": circular}}, "payload['a']['circular']"),
    ],
)
def test_a_refused_payload_is_named_by_the_path_to_its_fault(payload: Any, path: str) -> None:
    with pytest.raises(InvalidEvent, match=re.escape(f"(at {path}")):
        EventCollector(publisher=Publisher("memory://")).enqueue_event(payload, "x")


def test_the_repr_of_an_event_is_one_line_whatever_its_id() -> None:
    collector = EventCollector(publisher=Publisher("memory://"))
    event = collector.enqueue_event(1, "x", id="a\nERROR forged")
    assert "\n" not in repr(event)
    assert repr(event.id) in repr(event)
    collector.clear_events()


@pytest.mark.hazard("A9", "B14")
@pytest.mark.parametrize(
    "target", ["", "é" * 128, "x" * 256, None, 5, b"x", "\ud800", "a\0", "é\0"], ids=repr
)
def test_a_target_is_a_string_of_1_to_255_bytes(collector: EventCollector, target: Any) -> None:
    with pytest.raises(InvalidEvent, match="target"):
        collector.enqueue_event({}, target)
    assert collector.enqueue_event({}, "é" * 127).target == "é" * 127


@pytest.mark.hazard("A9", "C7", "H3")
@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"headers": {"CC": ["q2"]}}, "'CC' is reserved"),
        ({"headers": {"BCC": ["q2"]}}, "'BCC'"),
        ({"headers": {"x-death": []}}, "'x-death'"),
        ({"headers": {"x-first-death-queue": "q"}}, "x-first-death-queue"),
        ({"headers": {"x-delay": 1}}, "x-delay"),
        ({"headers": {"outbox-key": "k"}}, "outbox-key"),
        ({"headers": {"Outbox-Anything": "k"}}, "Outbox-Anything"),
        ({"headers": {1: "a"}}, "header name is a int"),
        ({"headers": {"n" * 256: "a"}}, "header name has 256 bytes"),
        ({"headers": {"a": 1 << 63}}, "headers['a'] does not fit into 64 bits"),
        ({"headers": {"a": [object()]}}, "headers['a'][0] is a object"),
        ({"headers": {"a": {"b": {2: 1}}}}, "headers['a']['b']"),
        ({"headers": {"a": "x" * 131_072}}, "the headers take"),
        ({"headers": ["a"]}, "headers must be a mapping, not a list"),
        ({"key": "k" * 256}, "key has 256 bytes"),
        ({"key": 7}, "key is a int"),
        ({"key": "k\0"}, "key 'k\\x00' contains a NUL"),
        ({"id": "\0i"}, "contains a NUL"),
        ({"exchange": "e\0"}, "contains a NUL"),
        ({"id": ""}, "id is empty"),
        ({"id": "i" * 256}, "id has 256 bytes"),
        ({"exchange": "e" * 256}, "exchange has 256 bytes"),
        ({"exchange": 0}, "exchange is a int"),
        ({"priority": 256}, "priority 256"),
        ({"priority": -1}, "priority -1"),
        ({"priority": True}, "priority True"),
        ({"priority": 1.0}, "priority 1.0"),
        ({"unroutable": "drop"}, "not one of park, fail, ignore"),
        ({"delay": -1}, "delay=-1"),
        ({"delay": "5"}, "delay='5'"),
        ({"delay": True}, "delay=True"),
        ({"delay": float("nan")}, "delay=nan"),
        ({"delay": 1e300}, "delay=1e+300"),
        ({"deliver_at": datetime.datetime(2030, 1, 1)}, "time zone"),
        ({"deliver_at": datetime.datetime.max.replace(tzinfo=WEST)}, "out of range in UTC"),
        ({"deliver_at": datetime.datetime.min.replace(tzinfo=EAST)}, "out of range in UTC"),
        ({"deliver_at": datetime.datetime(2030, 1, 1, tzinfo=Nowhere())}, "time zone"),
        ({"headers": {"a": deep}}, "nested too deeply"),
        ({"headers": {"a": itself}}, "nested too deeply"),
        ({"deliver_at": datetime.datetime.now(datetime.UTC), "delay": 1}, "not both"),
    ],
)
def test_an_invalid_option_is_refused(
    collector: EventCollector, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(InvalidEvent, match=re.escape(expected)):
        collector.enqueue_event({}, "x", **options)
    assert collector.events == ()


def test_a_delay_too_long_for_its_transport_is_refused() -> None:
    collector = EventCollector(publisher=Publisher("amqp://127.0.0.1:1/"))
    with pytest.raises(InvalidEvent, match="its transport delays events by 3106 days at most"):
        collector.enqueue_event({}, "x", delay=datetime.timedelta(days=3107))
    assert collector.events == ()


@pytest.mark.hazard("A10")
def test_headers_are_copied_as_types_that_every_transport_writes_the_same(
    collector: EventCollector,
) -> None:
    an_id = uuid.uuid4()
    nested = {"n": [1, 2]}
    event = collector.enqueue_event(
        {},
        "x",
        headers={
            "id": an_id,
            "price": decimal.Decimal("1.10"),
            "day": datetime.date(2026, 1, 2),
            "ratio": 0.5,
            "raw": bytearray(b"\x00"),
            "nested": nested,
            "colour": Colour.RED,
        },
    )
    nested["n"].append(3)
    assert event.headers == {
        "id": str(an_id),
        "price": "1.10",
        "day": "2026-01-02",
        "ratio": "0.5",
        "raw": b"\x00",
        "nested": {"n": [1, 2]},
        "colour": "red",
    }


def test_a_later_change_of_the_payload_has_no_effect(collector: EventCollector) -> None:
    payload = {"items": [1]}
    event = collector.enqueue_event(payload, "x")
    payload["items"].append(2)
    assert event.payload == {"items": [1]}


def test_delay_and_deliver_at_both_become_an_instant(collector: EventCollector) -> None:
    event = collector.enqueue_event({}, "x", delay=90)
    assert event.deliver_at == event.occurred_at + datetime.timedelta(seconds=90)
    zone = datetime.timezone(datetime.timedelta(hours=2))
    at = datetime.datetime(2030, 1, 1, 2, tzinfo=zone)
    assert collector.enqueue_event({}, "x", deliver_at=at).deliver_at == at
    assert collector.enqueue_event({}, "x", delay=0).deliver_at is None


def test_an_event_is_immutable_hashable_and_survives_pickling(collector: EventCollector) -> None:
    event = collector.enqueue_event({"secret": "s3cret"}, "x", headers={"a": [1]}, key="k")
    with pytest.raises(dataclasses.FrozenInstanceError):
        event.id = "other"  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(event)) == event
    assert {event: 1}[event] == 1
    assert "s3cret" not in repr(event)
    assert not hasattr(event, "__dict__")


class Upper:
    content_type = "text/x-upper"

    def encode(self, payload: Any) -> bytes:
        return str(payload).upper().encode()

    def decode(self, body: bytes) -> Any:
        return body.decode().lower()


def test_a_custom_serializer_encodes_and_decodes() -> None:
    publisher = configure("memory://", serializer=Upper())
    event = EventCollector(publisher=publisher).enqueue_event("hello", "x")
    assert (event.body, event.content_type, event.payload) == (b"HELLO", "text/x-upper", "hello")


@pytest.mark.parametrize("kind", [bytearray, memoryview])
def test_what_a_serializer_makes_becomes_bytes(kind: Any) -> None:
    class Other(Upper):
        def encode(self, payload: Any) -> Any:
            return kind(super().encode(payload))

    publisher = configure("memory://", serializer=Other())
    event = EventCollector(publisher=publisher).enqueue_event("hello", "x")
    assert event.body == b"HELLO"
    assert type(event.body) is bytes


@pytest.mark.parametrize("body", ["text", None])
def test_a_serializer_that_makes_no_bytes_is_named(body: Any) -> None:
    class Wrong(Upper):
        def encode(self, payload: Any) -> Any:
            return body

    collector = EventCollector(publisher=configure("memory://", serializer=Wrong()))
    with pytest.raises(UsageError, match=r"Wrong\.encode\(\) has returned a .*, not bytes"):
        collector.enqueue_event("hello", "x")


def test_an_unknown_content_type_is_reported() -> None:
    event = Event(id="1", target="x", exchange="", body=b"", content_type="application/x-other")
    with pytest.raises(UsageError, match="application/x-other"):
        _ = event.payload


texts = st.text(st.characters(codec="utf-8"))
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner) | st.dictionaries(texts, inner),
    max_leaves=20,
)


@given(json_values)
def test_any_json_value_is_decoded_unchanged(value: Any) -> None:
    serializer = JSONSerializer()
    assert serializer.decode(serializer.encode(value)) == value
    assert json.loads(serializer.encode(value)) == value


def test_ids_are_uuid7_unique_and_ascending() -> None:
    random.seed(1)
    first = new_id()
    random.seed(1)
    ids = [first, *(new_id() for _ in range(10_000))]
    assert ids == sorted(set(ids))
    for one in (ids[0], ids[-1]):
        parsed = uuid.UUID(one)
        assert (str(parsed), parsed.version, parsed.variant) == (one, 7, uuid.RFC_4122)
    milliseconds = int(ids[0].replace("-", "")[:12], 16)
    assert abs(milliseconds - datetime.datetime.now(datetime.UTC).timestamp() * 1000) < 10_000


def test_follow_on_ids_depend_on_every_part_and_its_boundaries() -> None:
    assert follow_on_id("a", "bc") == follow_on_id("a", "bc")
    assert len({follow_on_id("a", "bc"), follow_on_id("ab", "c"), follow_on_id("abc")}) == 3
    namespace = uuid.uuid5(uuid.NAMESPACE_URL, "outbox:follow-on")
    for part in map(str, range(100)):  # of every variant
        assert follow_on_id(part) == str(uuid.uuid5(namespace, f"{len(part)}:{part}"))
