"""Delayed events over a real RabbitMQ: when and where they arrive, and what can go wrong."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from typing import Any

import pika.exceptions
import pytest

from outbox import Event, InvalidEvent, Publisher
from outbox.consumers import ReceivedEvent, Worker, consumer
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.messages.delivery import Delivery
from proving.proxy import FaultProxy
from tests.amqp import Inspector
from tests.places import RabbitMQPlace, Reader, events_for, parked_in, reading, working
from tests.waiting import wait_until

pytestmark = pytest.mark.one_python

HEADERS: dict[str, Any] = {"tenant": "acme", "n": [1, {"a": None}]}


@pytest.fixture
def place(amqp_url: str, name: str, inspector: Inspector) -> RabbitMQPlace:
    return RabbitMQPlace(amqp_url, name, inspector)


@pytest.fixture
def publisher(place: RabbitMQPlace) -> Iterator[Publisher]:
    with place.publisher() as found:
        yield found


def now() -> datetime.datetime:
    return datetime.datetime.now(datetime.UTC)


def arrival(reader: Reader) -> tuple[Delivery, datetime.datetime]:
    [found] = reader.get()
    return found, now()


def came_in_time(event: Event, at: datetime.datetime) -> bool:
    assert event.deliver_at is not None
    return event.deliver_at <= at < event.deliver_at + datetime.timedelta(seconds=2)


# ------------------------------------------------------------------------- when and where


@pytest.mark.hazard("C12")
def test_delayed_events_arrive_in_the_order_of_their_due_times_and_none_early(
    place: RabbitMQPlace, publisher: Publisher, name: str
) -> None:
    with reading(place, name) as reader:
        [late] = events_for(publisher, [name], delay=3)
        [soon] = events_for(publisher, [name], delay=0.2)
        [mid] = events_for(publisher, [name], delay=1.3)
        [plain] = events_for(publisher, [name])
        assert publisher.publish([late, soon, mid, plain]).published == (late, soon, mid, plain)
        for expected in (plain, soon, mid, late):
            found, at = arrival(reader)
            assert found.message_id == expected.id
            assert expected.deliver_at is None or came_in_time(expected, at)


def test_the_wait_of_a_delayed_event_is_counted_from_when_it_was_due(
    place: RabbitMQPlace, publisher: Publisher, name: str
) -> None:
    with working(publisher, consumer(name)(lambda _: None)) as worker:
        publisher.publish(events_for(publisher, [name], delay=2))
        wait_until(lambda: worker.stats().ended == 1)
        [queue] = worker.stats().queues
    assert queue.wait.count == 1
    assert queue.wait.total < 1.8


@pytest.mark.parametrize("kind", ["default", "topic", "direct", "fanout"])
def test_an_event_arrives_over_any_exchange_with_its_own_address_and_properties(
    place: RabbitMQPlace, publisher: Publisher, inspector: Inspector, name: str, kind: str
) -> None:
    target = name if kind == "default" else "order.placed"
    exchange = "" if kind == "default" else f"{name}-{kind}"
    with reading(place, name) as reader:
        if exchange:
            inspector.clean_up(exchange=exchange)
            inspector.channel.exchange_declare(exchange, kind, durable=True)
            inspector.channel.queue_bind(name, exchange, "order.*" if kind == "topic" else target)
        [event] = events_for(
            publisher, [target], exchange=exchange, headers=HEADERS, key="k", priority=3, delay=1
        )
        assert publisher.publish([event]).published == (event,)
        found, at = arrival(reader)
    assert came_in_time(event, at)
    assert (found.exchange, found.target, found.message_id) == (exchange, target, event.id)
    assert (found.body, found.priority) == (event.body, 3)
    assert found.timestamp == int(event.occurred_at.timestamp())
    headers = dict(found.headers or {})
    assert headers.pop("outbox-occurred-at-us") // 1000 == int(event.occurred_at.timestamp() * 1000)
    headers.pop("x-delivery-count", None)
    assert headers == {**HEADERS, "outbox-format": 1, "outbox-key": "k"}


def test_a_target_that_ends_with_another_target_does_not_reach_the_other_queue(
    place: RabbitMQPlace, publisher: Publisher, name: str
) -> None:
    longest = f"{'a.' * 108}{name}"[:255].ljust(255, "x")
    assert len(longest) == 255
    with (
        reading(place, name) as short,
        reading(place, f"a.{name}") as long,
        reading(place, f"{name}-all", ["#"]) as all_of_them,
    ):
        events = [
            events_for(publisher, [target], exchange=exchange, delay=1)[0]
            for target, exchange in (
                (f"a.{name}", ""),
                (f"a.{name}", name),
                (name, ""),
                (longest, name),
            )
        ]
        assert publisher.publish(events).published == tuple(events)
        ids = [event.id for event in events]
        assert {one.message_id for one in long.get(2)} == set(ids[:2])
        assert short.get()[0].message_id == ids[2]
        assert {one.target for one in all_of_them.get(2)} == {f"a.{name}", longest}
        for reader in (short, long, all_of_them):
            with pytest.raises(AssertionError, match="0 of 1"):
                reader.take(1, timeout=0.1)


def test_other_clients_see_the_event_and_where_it_was_published(
    place: RabbitMQPlace, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name, ("order.*",))
    [event] = events_for(publisher, ["order.placed"], headers=HEADERS, delay=1)
    publisher.publish([event])
    found = inspector.get(name)
    assert (found.id, found.body, found.target) == (event.id, event.body, "order.placed")
    assert found.properties.headers["outbox-delay-exchange"] == name
    assert found.properties.type == "order.placed"
    assert {one: found.properties.headers[one] for one in HEADERS} == HEADERS


def test_delays_of_days_use_levels_that_are_declared_when_first_needed(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name)
    before = {level: exists(inspector, f"outbox.delay.{level:02}") for level in (17, 18, 27)}
    assert not any(before.values())
    events = [
        events_for(publisher, [name], exchange="", delay=delay)[0]
        for delay in (2**17 + 60, 2**18 + 60, 2**27 + 60)  # the last is four years
    ]
    try:
        assert publisher.publish(events).published == tuple(events)
        for level in (17, 18, 27):
            wait_until(lambda level=level: inspector.count(f"outbox.delay.{level}") == 1)  # type: ignore[misc]
        assert not exists(inspector, "outbox.delay.26")
    finally:
        for level in (17, 18, 27):
            inspector.channel.queue_delete(f"outbox.delay.{level}")


def test_a_delay_of_more_than_eight_years_is_refused_at_the_callers_line(
    publisher: Publisher,
) -> None:
    with pytest.raises(InvalidEvent, match="by 3106 days at most"):
        events_for(publisher, ["a"], delay=datetime.timedelta(days=3107))
    with pytest.raises(InvalidEvent, match="by 3106 days at most"):
        events_for(publisher, ["a"], deliver_at=datetime.datetime.max.replace(tzinfo=datetime.UTC))


def test_a_kept_event_is_delayed_by_the_remaining_time(
    proxy: FaultProxy, place: RabbitMQPlace, name: str
) -> None:
    with reading(place, name) as reader, Publisher(proxy.url, exchange=name) as publisher:
        wait_until(lambda: publisher.make_ready() or publisher.connected)  # type: ignore[func-returns-value]
        proxy.refuse()
        wait_until(lambda: not publisher.connected)
        events = [events_for(publisher, [name], delay=delay)[0] for delay in (0.1, 2)]
        assert publisher.publish(events).kept == tuple(events)
        wait_until(lambda: now() > (events[0].deliver_at or now()))
        proxy.heal()
        assert publisher.drain(10)
        for event in events:
            found, at = arrival(reader)
            assert found.message_id == event.id
            assert came_in_time(event, at) or event is events[0]


def test_an_event_that_is_already_due_is_published_at_once(
    place: RabbitMQPlace, publisher: Publisher, name: str
) -> None:
    with reading(place, name) as reader:
        past = now() - datetime.timedelta(days=1)
        [event] = events_for(publisher, [name], deliver_at=past)
        publisher.publish([event])
        found, at = arrival(reader)
    assert (found.message_id, at - event.occurred_at < datetime.timedelta(seconds=1)) == (
        event.id,
        True,
    )


@pytest.mark.hazard("C7")
@pytest.mark.slow
def test_an_event_delayed_repeatedly_carries_no_headers_of_the_broker(
    place: RabbitMQPlace, publisher: Publisher, name: str
) -> None:
    """A broker that finds its record of an earlier delay drops the message as a cycle."""
    seen: list[ReceivedEvent] = []

    with reading(place, name):
        pass

    @consumer(name)
    def again(event: ReceivedEvent) -> None:
        seen.append(event)
        if len(seen) < 4:
            copy = dataclasses.replace(
                events_for(publisher, [name], exchange="", headers=event.headers, delay=1)[0],
                id=event.id,
            )
            assert publisher.publish([copy], keep=False).ok

    worker = Worker([again], publisher=publisher)
    worker.start()
    try:
        publisher.publish(events_for(publisher, [name], headers=HEADERS, delay=1))
        wait_until(lambda: len(seen) == 4)
    finally:
        worker.stop(5)
    assert [event.headers for event in seen] == [HEADERS] * 4
    assert [event.exchange for event in seen] == [name, "", "", ""]
    assert len({event.id for event in seen}) == 1


# ------------------------------------------------------------------------- what may go wrong


def exists(inspector: Inspector, queue: str) -> bool:
    channel = inspector._connection.channel()
    try:
        channel.queue_declare(queue, passive=True)
    except pika.exceptions.ChannelClosedByBroker:
        return False
    channel.close()
    return True


def test_a_delayed_event_to_a_missing_queue_or_exchange_is_parked_and_its_siblings_are_published(
    place: RabbitMQPlace, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name)
    good = events_for(publisher, [name] * 2, exchange="", delay=1)
    plain = events_for(publisher, [name], exchange="")
    [no_queue] = events_for(publisher, [f"{name}-no"], exchange="", delay=1)
    [no_exchange] = events_for(publisher, ["a"], exchange=f"{name}-no", delay=1)
    [to_fail] = events_for(
        publisher, [f"{name}-no"], exchange="", delay=1, unroutable="fail", headers=HEADERS
    )
    report = publisher.publish([good[0], no_queue, plain[0], to_fail, no_exchange, good[1]])
    assert report.published == (good[0], plain[0], good[1])
    assert report.parked == (no_queue, no_exchange)
    [rejection] = report.rejected
    assert rejection.event == to_fail
    assert f"404 NOT_FOUND - no queue '{name}-no'" in rejection.reason
    assert {message.id for message in inspector.messages(name, 3)} == {
        event.id for event in (*good, *plain)
    }


@pytest.mark.hazard("C13")
def test_a_delayed_event_whose_queue_is_gone_when_due_is_parked_and_can_be_replayed(
    place: RabbitMQPlace, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name)
    [event] = events_for(publisher, [name], exchange="", headers=HEADERS, delay=1)
    assert publisher.publish([event]).ok
    inspector.channel.queue_delete(name)
    wait_until(lambda: inspector.count(PARKING_QUEUE) == 1)
    inspector.queue(name)
    with parked_in(place) as parked, parked.browse(PARKING_QUEUE, 1) as browsing:
        [[message]] = browsing.windows()
        assert (message.kind, message.id, message.origin) == ("parked", event.id, ("", name))
        assert message.reason == "its queue did not exist when it was due"
        assert message.at is not None
        outcome = parked.replay([message], to_origin=False)
        browsing.remove(outcome.done)
    headers = inspector.get(name).properties.headers
    headers.pop("x-delivery-count", None)
    assert headers == {
        **HEADERS,
        "outbox-format": 1,
        "outbox-occurred-at-us": headers["outbox-occurred-at-us"],
    }


def test_a_consumers_queue_that_was_deleted_and_redeclared_gets_the_delayed_events(
    place: RabbitMQPlace, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    with reading(place, name):
        [event] = events_for(publisher, [name], exchange="", delay=2)
        assert publisher.publish([event]).ok
    inspector.channel.queue_delete(name)
    with reading(place, name) as reader:
        found, at = arrival(reader)
    assert found.message_id == event.id
    assert came_in_time(event, at)


@pytest.mark.hazard("C13")
def test_delayed_events_without_a_binding_when_due_do_not_hold_up_others(
    place: RabbitMQPlace, publisher: Publisher, name: str
) -> None:
    with reading(place, name, ["wanted"]) as reader:
        # More than the broker takes at a time when it moves messages on (32 by default).
        unwanted = events_for(publisher, ["unwanted"] * 200, delay=1)
        [wanted] = events_for(publisher, ["wanted"], delay=1)
        [after] = events_for(publisher, ["wanted"], delay=2)
        assert publisher.publish([*unwanted, wanted, after]).ok
        for event in (wanted, after):
            found, at = arrival(reader)
            assert found.message_id == event.id
            assert came_in_time(event, at)


def test_with_an_alternate_exchange_unbound_delayed_events_are_parked(
    place: RabbitMQPlace, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    exchange = f"{name}-alternate"
    inspector.clean_up(exchange=exchange)
    inspector.channel.exchange_declare(
        exchange, "topic", durable=True, arguments={"alternate-exchange": "outbox.delay.lost"}
    )
    [event] = events_for(publisher, ["unwanted"], exchange=exchange, delay=1)
    assert publisher.publish([event]).ok
    message = inspector.get(PARKING_QUEUE)
    assert (message.id, message.target) == (event.id, "unwanted")


@pytest.mark.hazard("C13")
@pytest.mark.parametrize(
    "broken",
    ["queue outbox.delay.00", "exchange outbox.delay.00", "exchange outbox.delay.due"],
)
def test_deleted_parts_of_the_ladder_are_redeclared(
    place: RabbitMQPlace, publisher: Publisher, inspector: Inspector, name: str, broken: str
) -> None:
    with reading(place, name) as reader:
        first = events_for(publisher, [name], delay=1)
        assert publisher.publish(first).ok
        reader.get()
        kind, victim = broken.split()
        if kind == "queue":
            inspector.channel.queue_delete(victim)
        else:
            inspector.channel.exchange_delete(victim)
        if victim.endswith("due"):  # only the regular check notices: nothing is published there
            publisher._own_transport()._delayer._ladder._looked_at -= 100  # type: ignore[attr-defined]
            [plain] = events_for(publisher, [name], delay=30)
            publisher.publish([plain])
            wait_until(lambda: exchange_exists(inspector, victim))
        events = events_for(publisher, [name] * 50, delay=1)
        assert publisher.publish(events).published == tuple(events)
        assert [one.message_id for one in reader.get(50)] == [event.id for event in events]


def exchange_exists(inspector: Inspector, exchange: str) -> bool:
    channel = inspector._connection.channel()
    try:
        channel.exchange_declare(exchange, passive=True)
    except pika.exceptions.ChannelClosedByBroker:
        return False
    channel.close()
    return True


def test_an_existing_ladder_is_used_without_declaring(
    place: RabbitMQPlace, publisher: Publisher, name: str
) -> None:
    with reading(place, name) as reader:
        publisher.publish(events_for(publisher, [name], delay=1))
        reader.get()
        with place.publisher(declare="never") as other:
            [event] = events_for(other, [name], delay=1)
            assert other.publish([event]).ok
            found, at = arrival(reader)
    assert found.message_id == event.id
    assert came_in_time(event, at)


def test_a_missing_level_parks_the_event_without_declaring(
    place: RabbitMQPlace, publisher: Publisher, name: str
) -> None:
    with place.publisher(declare="never") as other:
        [event] = events_for(other, [name], delay=2**25 + 1000)
        report = other.publish([event])
    assert report.parked == (event,)
    with parked_in(place) as parked, parked.browse(PARKING_QUEUE, 1) as browsing:
        [[message]] = browsing.windows()
        assert message.origin == (name, name)
        assert message.reason is not None
        # The level's exchange may be there, without a queue.
        assert message.reason.startswith(("404 NOT_FOUND - no exchange 'outbox.delay.25'", "312 "))


@pytest.mark.hazard("C9")
def test_a_ladder_with_other_arguments_is_reported_and_the_delayed_events_are_kept(
    place: RabbitMQPlace,
    publisher: Publisher,
    inspector: Inspector,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    inspector.queue(name)
    inspector.queue("outbox.delay.20", arguments={"x-queue-type": "classic"})
    [plain] = events_for(publisher, [name])
    [event] = events_for(publisher, [name], delay=2**20 + 1000)
    report = publisher.publish([event, plain])
    assert report.kept == (event,)
    assert "inequivalent arg 'x-message-ttl' for queue 'outbox.delay.20'" in str(report.error)
    assert "cannot declare the delay ladder" in caplog.text
    publisher.close(0)


@pytest.mark.hazard("C9")
def test_the_ladder_is_declared_as_the_wire_format_says(
    place: RabbitMQPlace, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    with reading(place, name) as reader:
        publisher.publish(events_for(publisher, [name], delay=3))
        reader.get()
    declare_exchange = inspector.channel.exchange_declare
    for level in ("00", "01"):
        declare_exchange(f"outbox.delay.{level}", "headers", durable=True)
    lost = {"alternate-exchange": "outbox.delay.lost"}
    declare_exchange("outbox.delay.due", "headers", durable=True, arguments=lost)
    declare_exchange("outbox.delay.queues", "direct", durable=True, arguments=lost)
    declare_exchange("outbox.delay.lost", "fanout", durable=True)
    for number, below in enumerate(("outbox.delay.due", "outbox.delay.00")):
        inspector.channel.queue_declare(
            f"outbox.delay.{number:02}",
            durable=True,
            arguments={
                "x-queue-type": "quorum",
                "x-message-ttl": 1000 * 2**number,
                "x-dead-letter-exchange": below,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",
            },
        )
    inspector.channel.queue_declare(
        "outbox.delay.sink",
        durable=True,
        arguments={"x-queue-type": "quorum", "x-max-length": 0, "x-overflow": "drop-head"},
    )
