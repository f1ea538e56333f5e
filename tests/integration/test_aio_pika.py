"""A second client, aio-pika, reads what outbox writes, and outbox what it writes."""

from __future__ import annotations

import asyncio
import datetime
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aio_pika
import pytest

from outbox import Event, Publisher, UsageError, auto_publishing, enqueue_event
from outbox.consumers import ReceivedEvent
from outbox.ids import new_id
from tests.amqp import Inspector, properties_of
from tests.integration.test_worker import Seen, running

UTC = datetime.UTC
HEADERS: dict[str, Any] = {
    "text": "käse",
    "empty": "",
    "bytes": b"\x00\xff",
    "yes": True,
    "no": False,
    "small": -1,
    "short": 40_000,
    "large": 3_000_000_000,
    "largest": 2**63 - 1,
    "smallest": -(2**63),
    "nothing": None,
    "list": [1, "two", [None, True]],
    "table": {"a": {"b": [-70_000]}},
}


def over_aio_pika(url: str, act: Callable[[aio_pika.abc.AbstractChannel], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with asyncio.timeout(20):
            async with await aio_pika.connect(url, timeout=10) as connection:
                return await act(await connection.channel(on_return_raises=True))

    return asyncio.run(run())


def received(url: str, queue: str, count: int) -> list[aio_pika.abc.AbstractIncomingMessage]:
    async def act(channel: aio_pika.abc.AbstractChannel) -> Any:
        messages: list[Any] = []
        async with (await channel.get_queue(queue)).iterator(no_ack=True) as iterator:
            async for message in iterator:
                messages.append(message)
                if len(messages) == count:
                    break
        return messages

    messages: list[aio_pika.abc.AbstractIncomingMessage] = over_aio_pika(url, act)
    return messages


def publish(url: str, *events: Event) -> None:
    async def act(channel: aio_pika.abc.AbstractChannel) -> None:
        for event in events:
            exchange = await channel.get_exchange(event.exchange)
            await exchange.publish(event.to_aio_pika(app_id="shop"), event.target, mandatory=True)

    over_aio_pika(url, act)


def test_aio_pika_reads_each_property_and_header_that_outbox_writes(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    with Publisher(amqp_url, exchange=name, app_id="shop") as publisher:
        with auto_publishing(publisher=publisher):
            event = enqueue_event(
                {"photo": "käse.jpg"}, "photo.new", headers=HEADERS, key="k", priority=4
            )
            plain = enqueue_event([1], "photo.old")
    message, second = received(amqp_url, name, 2)
    assert message.body == event.body
    assert (message.exchange, message.routing_key, message.type) == (
        name,
        "photo.new",
        "photo.new",
    )
    assert message.content_type == "application/json"
    assert message.delivery_mode == aio_pika.DeliveryMode.PERSISTENT
    assert (message.message_id, message.app_id, message.priority) == (event.id, "shop", 4)
    assert message.timestamp == event.occurred_at.replace(microsecond=0)
    assert message.headers == HEADERS | {
        "outbox-format": 1,
        "outbox-key": "k",
        "outbox-occurred-at-us": round(event.occurred_at.timestamp() * 1e6),
    }
    assert (message.content_encoding, message.expiration, message.reply_to) == (None, None, None)

    taken = ReceivedEvent.from_aio_pika(message, queue=name)
    for field in ("id", "target", "exchange", "body", "content_type", "key", "occurred_at"):
        assert getattr(taken, field) == getattr(event, field), field
    assert (taken.headers, taken.priority, taken.queue) == (HEADERS, 4, name)
    assert (taken.attempt, taken.redelivered, taken.first_failure) == (1, False, None)
    assert type(taken.headers["bytes"]) is bytes
    assert taken.payload == {"photo": "käse.jpg"}
    assert taken.payload is taken.payload
    other = ReceivedEvent.from_aio_pika(second)
    assert (other.id, other.payload, other.headers) == (plain.id, [1], {})
    assert (other.priority, other.key, other.queue) == (None, None, "")


def test_what_aio_pika_publishes_is_what_outbox_would_have_written(
    amqp_url: str, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    event = Event(
        id=new_id(),
        target="photo.new",
        exchange=name,
        body='{"photo": "käse.jpg"}'.encode(),
        headers=HEADERS,
        priority=4,
        key="k",
        deliver_at=datetime.datetime(2020, 1, 1, tzinfo=UTC),
    )
    publish(amqp_url, event)
    with Publisher(amqp_url, exchange=name, app_id="shop") as publisher:
        publisher.publish([event])
    theirs, ours = inspector.messages(name, 2)
    assert vars(theirs.properties) == vars(ours.properties)
    assert (theirs.body, theirs.target) == (ours.body, ours.target)


def test_a_consumer_gets_what_aio_pika_has_published(
    amqp_url: str, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    seen = Seen()
    event = Event(id=new_id(), target=name, exchange=name, body=b'{"n": 1}', headers=HEADERS)
    with running(publisher, inspector, seen, name):
        publish(amqp_url, event)
        [taken] = seen.wait(1)
    assert (taken.id, taken.payload, taken.headers) == (event.id, {"n": 1}, HEADERS)
    assert taken.occurred_at == event.occurred_at


def test_an_event_that_is_due_later_cannot_be_given_to_aio_pika() -> None:
    due = datetime.datetime.now(UTC) + datetime.timedelta(minutes=1)
    event = Event(id="1", target="x", exchange="", body=b"{}", deliver_at=due)
    with pytest.raises(UsageError, match=r"is due at .* publish it with outbox"):
        event.to_aio_pika()


def test_a_header_that_aio_pika_would_cut_is_refused() -> None:
    def event(length: int) -> Event:
        return Event(id="1", target="x", exchange="", body=b"", headers={"t": {"ä" * length: 1}})

    with pytest.raises(UsageError, match="more than 128 bytes"):
        event(65).to_aio_pika()
    assert event(64).to_aio_pika().headers["t"] == {"ä" * 64: 1}


def test_a_delayed_event_has_its_own_exchange_and_headers(
    amqp_url: str, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name)
    with auto_publishing(publisher=publisher):
        enqueue_event({}, "photo.new", delay=1, headers={"tenant": 7})
    [message] = received(amqp_url, name, 1)
    assert "x-death" in message.headers
    event = ReceivedEvent.from_aio_pika(message)
    assert (event.exchange, event.target, event.headers) == (name, "photo.new", {"tenant": 7})


@pytest.mark.parametrize(
    ("body", "properties", "reason"),
    [
        (b"{", {"content_type": "application/json"}, "is not valid application/json"),
        (b"\x1f\x8b", {"content_encoding": "gzip"}, "content encoding 'gzip'"),
        (b"<a/>", {"content_type": "text/xml"}, "no serializer is registered for 'text/xml'"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_another_clients_message_becomes_an_event_whose_payload_says_what_is_wrong(
    amqp_url: str,
    inspector: Inspector,
    name: str,
    body: bytes,
    properties: dict[str, Any],
    reason: str,
) -> None:
    inspector.queue(name)
    inspector.publish(name, body, properties=properties_of(**properties))
    [message] = received(amqp_url, name, 1)
    event = ReceivedEvent.from_aio_pika(message, queue=name)
    assert (event.body, event.target, event.exchange, event.key) == (body, name, "", None)
    assert event.id
    for _ in range(2):
        with pytest.raises(ValueError, match=reason):
            _ = event.payload


def test_a_bare_message_is_read_as_json_of_now(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    inspector.queue(name)
    inspector.publish(name, b"[1]", properties=properties_of())
    [message] = received(amqp_url, name, 1)
    event = ReceivedEvent.from_aio_pika(message)
    assert (event.payload, event.content_type) == ([1], "application/json")
    assert abs(datetime.datetime.now(UTC) - event.occurred_at) < datetime.timedelta(minutes=1)


def test_a_retried_message_has_its_attempt_and_its_own_address(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    inspector.queue(name)
    first = datetime.datetime(2026, 11, 21, 12, tzinfo=UTC)
    headers = {
        "outbox-attempt": 3,
        "outbox-first-failed-at": first.isoformat(),
        "outbox-origin-exchange": "shop",
        "outbox-origin-target": "photo.new",
    }
    inspector.publish(name, json.dumps({}).encode(), properties=properties_of(headers=headers))
    [message] = received(amqp_url, name, 1)
    event = ReceivedEvent.from_aio_pika(message, queue=name)
    assert (event.attempt, event.first_failure) == (3, first)
    assert (event.exchange, event.target, event.headers) == ("shop", "photo.new", {})
