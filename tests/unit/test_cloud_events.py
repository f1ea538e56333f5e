"""CloudEvents: what is written, and what is read, beside the package ``cloudevents``."""

from __future__ import annotations

import base64
import datetime
import json
from typing import Any

import pytest
from cloudevents.core.bindings import amqp, rabbitmq
from cloudevents.core.v1.event import CloudEvent

from outbox import Event, EventCollector, InvalidEvent, Publisher, UsageError, enqueue_event
from outbox.event import Headers, headers_on_the_wire
from outbox.messages.delivery import Delivery, as_delivered
from outbox.messages.message_copy import copy_of, senders_headers
from outbox.messages.received_event import ReceivedEvent, Undecodable, decode
from outbox.settings import Settings

SOURCE = "https://shop.example/orders"
ATTRIBUTES = {"specversion": "1.0", "id": "17", "source": "/shop", "type": "order.placed"}
TIME = "2026-11-27T09:30:00.250000Z"


def enqueued(envelope: Any, headers: Headers | None = None, **options: Any) -> Event:
    with Publisher("memory://", envelope=envelope, source=SOURCE) as publisher:
        collector = EventCollector(publisher=publisher)
        with EventCollector.use(collector):
            event = enqueue_event({"total": "12.50"}, "order.placed", headers=headers, **options)
            collector.clear_events()
    return event


def delivery(
    headers: Headers | None = None, body: bytes = b"{}", content_type: str | None = None
) -> Delivery:
    return Delivery("q", 1, 0, False, "e", "t", body, content_type, headers=headers)


def received(headers: Headers) -> ReceivedEvent:
    return decode(delivery(headers, content_type="application/json"))


def structured(members: Any, content_type: str = "application/cloudevents+json") -> ReceivedEvent:
    return decode(delivery(None, json.dumps(members).encode(), content_type))


# ----------------------------------------------------------------------------------- writing


def test_the_package_reads_what_is_written_for_rabbitmq() -> None:
    event = enqueued("cloudevents", key="order-17")
    message = rabbitmq.RabbitMQMessage(
        headers_on_the_wire(event),
        event.content_type,
        event.body,
    )
    read = rabbitmq.from_rabbitmq_event(message)
    assert read.get_id() == event.id
    assert read.get_source() == SOURCE
    assert read.get_type() == "order.placed"
    assert read.get_subject() is None
    assert read.get_time() == event.occurred_at
    assert read.get_datacontenttype() == "application/json"
    assert read.get_extension("partitionkey") == "order-17"
    assert read.get_data() == {"total": "12.50"}
    values = [value for name, value in event.headers.items() if name.startswith("ce-")]
    assert len(values) == 6
    assert all(isinstance(value, str) for value in values)
    assert event.headers["ce-time"].endswith("Z")


def test_the_package_reads_what_is_written_for_amqp_1_0() -> None:
    event = enqueued("cloudevents-amqp", {"cloudEvents_retries": 3, "tenant": "acme"})
    message = amqp.AMQPMessage(
        {"content-type": event.content_type}, headers_on_the_wire(event), event.body
    )
    read = amqp.from_amqp_event(message)
    assert (read.get_id(), read.get_source()) == (event.id, SOURCE)
    assert (read.get_type(), read.get_time()) == ("order.placed", event.occurred_at)
    assert read.get_extension("retries") == 3
    assert read.get_data() == {"total": "12.50"}
    assert event.headers["tenant"] == "acme"


def test_without_an_envelope_nothing_is_added() -> None:
    assert enqueued("outbox", {"ce-anything": 1}).headers == {"ce-anything": 1}


def test_the_callers_attributes_win_and_the_trace_is_an_attribute_too() -> None:
    trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"
    given = {
        "ce-subject": "17",
        "ce-type": "com.example.placed",
        "ce-urgent": True,
        "ce-n": 3,
        "traceparent": trace,
    }
    headers = enqueued("cloudevents", given).headers
    assert headers["ce-subject"] == "17"
    assert headers["ce-type"] == "com.example.placed"
    assert (headers["ce-urgent"], headers["ce-n"]) == ("true", "3")
    assert headers["traceparent"] == headers["ce-traceparent"] == trace


@pytest.mark.parametrize(
    "headers",
    [
        {"cloudEvents_subject": "17"},
        {"CE-Subject": "17"},
        {"ce-": "17"},
        {"ce-my-subject": "17"},
        {"ce-subject": ["17"]},
        {"ce-subject": None},
        {"ce-subject": ""},
        {"ce-data": "17"},
        {"ce-datacontenttype": "text/plain"},
    ],
)
def test_an_attribute_that_no_cloud_event_can_have_is_refused(headers: Headers) -> None:
    with pytest.raises(InvalidEvent, match="attribute"):
        enqueued("cloudevents", headers)


def test_the_source_is_made_of_the_programs_name_where_none_is_set() -> None:
    def source(**settings: Any) -> str:
        return Settings.load("memory://", {"envelope": "cloudevents", **settings}, {}).source

    assert source(app_id="my shop") == "//my%20shop"
    assert source(app_id="shop", source=SOURCE) == SOURCE
    with pytest.raises(UsageError, match="needs a source: set source='https"):
        source(app_id="")
    with pytest.raises(UsageError, match="not a URI reference"):
        source(source="my shop")
    assert Settings.load("memory://", {"app_id": ""}, {}).source == ""


def test_the_envelope_may_come_from_the_environment() -> None:
    environ = {"OUTBOX_ENVELOPE": "cloudevents-amqp", "OUTBOX_SOURCE": "/shop"}
    settings = Settings.load("memory://", {}, environ)
    assert (settings.envelope, settings.source) == ("cloudevents-amqp", "/shop")
    with pytest.raises(UsageError, match="OUTBOX_ENVELOPE is 'json', not one of outbox, clou"):
        Settings.load("memory://", {}, {"OUTBOX_ENVELOPE": "json"})


# ----------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("prefix", ["ce-", "cloudEvents_", "cloudEvents:", "CE-", "CloudEvents_"])
def test_each_prefix_is_read_in_any_case(prefix: str) -> None:
    headers = {prefix + name: value for name, value in ATTRIBUTES.items()}
    event = received({**headers, f"{prefix}Subject": "17", "tenant": "acme"})
    assert event.cloudevent == {
        **ATTRIBUTES,
        "subject": "17",
        "datacontenttype": "application/json",
    }
    assert event.id == "17"
    assert event.headers["tenant"] == "acme"


def test_what_the_package_writes_is_read() -> None:
    attributes = {**ATTRIBUTES, "time": datetime.datetime.fromisoformat(TIME), "urgent": "yes"}
    event = CloudEvent(attributes, {"total": "12.50"})
    in_headers = rabbitmq.to_binary_event(event)
    in_properties = amqp.to_binary_event(event)
    in_body = rabbitmq.to_structured_event(event)
    for read in (
        decode(delivery(in_headers.headers, in_headers.body, in_headers.content_type)),
        decode(
            delivery(
                in_properties.application_properties,
                in_properties.application_data,
                in_properties.properties.get("content-type"),
            )
        ),
        decode(delivery(in_body.headers, in_body.body, in_body.content_type)),
    ):
        assert read.payload == {"total": "12.50"}
        assert (read.id, read.occurred_at.isoformat()) == ("17", TIME.replace("Z", "+00:00"))
        assert read.cloudevent is not None
        assert {**ATTRIBUTES, "urgent": "yes"}.items() <= read.cloudevent.items()
        assert read.cloudevent["time"] == TIME


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {f"ce-{name}": value for name, value in ATTRIBUTES.items() if name != "source"},
        {f"ce-{name}": value for name, value in {**ATTRIBUTES, "specversion": "0.3"}.items()},
        {f"ce-{name}": value for name, value in {**ATTRIBUTES, "subject": [1]}.items()},
        {f"ce-{name}": value for name, value in {**ATTRIBUTES, "ID": "18"}.items()},
        {
            **{f"ce-{name}": value for name, value in ATTRIBUTES.items()},
            "cloudEvents_subject": "17",
        },
    ],
)
def test_other_messages_are_no_cloud_events(headers: Headers) -> None:
    event = received(headers)
    assert event.cloudevent is None
    assert event.id not in ("", "17")


def test_the_senders_id_and_time_come_first() -> None:
    headers = {f"ce-{name}": value for name, value in {**ATTRIBUTES, "time": TIME}.items()}
    message = delivery(headers, content_type="application/json")
    message.message_id, message.timestamp = "m", 1_000_000_000
    event = decode(message)
    assert (event.id, event.occurred_at.year) == ("m", 2001)
    assert event.cloudevent is not None


def test_a_copy_of_a_message_without_an_id_has_that_of_its_cloud_event() -> None:
    headers = {f"ce-{name}": value for name, value in {**ATTRIBUTES, "time": TIME}.items()}
    message = delivery(headers, content_type="application/json")
    copy = copy_of(message, "q", senders_headers(message))
    again = decode(as_delivered(copy, "q", 2))
    assert (copy.id, again.id) == ("17", "17")
    assert again.occurred_at.isoformat() == TIME.replace("Z", "+00:00")
    assert again.cloudevent is not None


@pytest.mark.parametrize(
    ("members", "payload"),
    [
        ({"data": {"a": 1}}, {"a": 1}),
        ({"data": "text", "datacontenttype": "application/json"}, "text"),
        ({"data": "text", "datacontenttype": "text/plain"}, "text"),
        ({"data": '{"a":1}', "datacontenttype": "text/plain"}, '{"a":1}'),
        ({}, None),
        ({"data_base64": base64.b64encode(b"\x00\xff").decode()}, b"\x00\xff"),
        (
            {
                "data_base64": base64.b64encode(b'{"a":1}').decode(),
                "datacontenttype": "application/json",
            },
            {"a": 1},
        ),
        ({"data": 1, "subject": None}, 1),
    ],
)
@pytest.mark.parametrize(
    "content_type",
    ["application/cloudevents+json", "Application/CloudEvents+JSON; charset=utf-8"],
)
def test_the_data_of_a_structured_cloud_event_is_the_payload(
    members: Any, payload: Any, content_type: str
) -> None:
    event = structured({**ATTRIBUTES, **members}, content_type)
    assert event.payload == payload
    assert event.id == "17"
    assert event.cloudevent is not None
    assert event.cloudevent["type"] == "order.placed"


@pytest.mark.parametrize(
    ("members", "content_type", "reason"),
    [
        ([ATTRIBUTES], "application/cloudevents-batch+json", "it is a batch of CloudEvents"),
        (ATTRIBUTES, "application/cloudevents+avro", "the format .* is not supported; send JSON"),
        (ATTRIBUTES, "application/cloudevents", "is not supported; send JSON"),
        ({**ATTRIBUTES, "data": 1, "data_base64": ""}, "application/cloudevents+json", "has both"),
        ({**ATTRIBUTES, "data_base64": "?"}, "application/cloudevents+json", "data_base64 is inv"),
        ({**ATTRIBUTES, "data_base64": 1}, "application/cloudevents+json", "data_base64 is inval"),
        (
            {**ATTRIBUTES, "data": "\ud800", "datacontenttype": "text/plain"},
            "application/cloudevents+json",
            "its data is not valid Unicode",
        ),
        (
            {**ATTRIBUTES, "data_base64": "AP8=", "datacontenttype": "application/json"},
            "application/cloudevents+json",
            "its data is not valid application/json",
        ),
    ],
)
def test_what_cannot_be_read_says_why(members: Any, content_type: str, reason: str) -> None:
    with pytest.raises(Undecodable, match=reason):
        structured(members, content_type)
    assert delivery(None, json.dumps(members).encode(), content_type).id_or_new


@pytest.mark.parametrize("body", [[], {"id": "1"}, {**ATTRIBUTES, "a": {}}, "text"])
def test_other_json_is_read_as_it_is_whatever_its_type_says(body: Any) -> None:
    event = structured(body)
    assert event.payload == body
    assert event.cloudevent is None


def test_invalid_json_says_so() -> None:
    with pytest.raises(Undecodable, match="its body is not valid JSON"):
        decode(delivery(None, b"{", "application/cloudevents+json"))


@pytest.mark.parametrize("time", ["yesterday", "2026-11-27T09:30:00", 1 << 70, True, -1])
def test_a_time_that_cannot_be_read_is_that_of_the_receipt(time: Any) -> None:
    headers = {f"ce-{name}": value for name, value in {**ATTRIBUTES, "time": time}.items()}
    received(headers).occurred_at.isoformat()
