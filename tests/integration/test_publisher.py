"""The publisher against a real broker."""

from __future__ import annotations

import asyncio
import datetime
import logging
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from outbox import (
    Event,
    EventCollector,
    Publisher,
    PublishReport,
    UsageError,
    auto_publishing,
    configure,
    enqueue_event,
    publish,
    publish_async,
)
from outbox.messages.dead_letters import PARKING_QUEUE
from tests.amqp import Inspector
from tests.waiting import wait_until


def make_events(publisher: Publisher, targets: list[str], **options: object) -> list[Event]:
    collector = EventCollector(publisher=publisher)
    return [
        collector.enqueue_event({"n": n}, target, **options)  # type: ignore[arg-type]
        for n, target in enumerate(targets)
    ]


@pytest.mark.hazard("B13")
def test_a_published_event_arrives_with_everything_the_wire_format_promises(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    classic = {"x-queue-type": "classic"}  # a quorum queue adds headers
    queue = inspector.queue(name, name, arguments=classic)
    with auto_publishing(publisher=publisher) as block:
        event = enqueue_event(
            {"total": "12.50"},
            "order.placed",
            headers={
                "tenant": "acme",
                "n": 1 << 40,
                "ratio": 0.5,
                "yes": True,
                "none": None,
                "raw": b"\x00\xff",
                "list": [1, {"a": "b"}],
            },
            key="customer-7",
            priority=3,
        )
    assert block.report == PublishReport(published=(event,))
    message = inspector.get(queue)
    properties = message.properties
    assert (message.exchange, message.target) == (name, "order.placed")
    assert message.payload == {"total": "12.50"}
    assert properties.message_id == event.id
    assert properties.delivery_mode == 2
    assert properties.content_type == "application/json"
    assert properties.type == "order.placed"
    assert properties.app_id == (publisher.settings.app_id or None)
    assert properties.priority == 3
    assert properties.timestamp == int(event.occurred_at.timestamp())
    epoch = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    occurred = (event.occurred_at - epoch) // datetime.timedelta(microseconds=1)
    assert properties.headers == {
        "outbox-format": 1,
        "tenant": "acme",
        "n": 1 << 40,
        "ratio": "0.5",
        "yes": True,
        "none": None,
        "raw": b"\x00\xff",
        "list": [1, {"a": "b"}],
        "outbox-key": "customer-7",
        "outbox-occurred-at-us": occurred,
    }


@pytest.mark.parametrize("size", [0, 1, 131_063, 131_064, 131_065, 1_000_000])
def test_bodies_of_any_size_arrive_whole(
    publisher: Publisher, inspector: Inspector, name: str, size: int
) -> None:
    queue = inspector.queue(name, name)
    event = Event(id="1", target="x", exchange=name, body=b"b" * size)
    assert publisher.publish([event]).ok
    assert inspector.get(queue).body == event.body


def test_a_chunk_arrives_in_order_and_every_event_is_reported(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    events = make_events(publisher, ["x"] * 5_000)
    report = publisher.publish(events)
    assert report.published == tuple(events)
    assert report.ok
    assert [message.id for message in inspector.messages(queue, 5_000)] == [
        event.id for event in events
    ]


@pytest.mark.hazard("A3", "B1", "C1")
def test_an_unroutable_event_is_reported_and_its_siblings_are_published(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name, ("good",))
    rejected = []
    with Publisher(
        amqp_url,
        exchange=name,
        unroutable="fail",
        on_rejected=lambda event, why: rejected.append((event, why)),
    ) as publisher:
        events = make_events(publisher, ["bad" if n % 10 == 0 else "good" for n in range(200)])
        ignored = make_events(publisher, ["bad"], unroutable="ignore")
        report = publisher.publish([*events, *ignored])
    bad = tuple(event for event in events if event.target == "bad")
    assert report.published == tuple(event for event in events if event.target == "good")
    assert tuple(one.event for one in report.rejected) == bad
    assert all("NO_ROUTE" in reason for _, reason in report.rejected)
    assert report.ignored == tuple(ignored)
    assert not report.ok
    assert [event for event, _ in rejected] == list(bad)
    assert len(inspector.messages(queue, 180)) == 180


@pytest.mark.hazard("A3", "B2")
def test_two_events_with_one_id_are_distinguished_by_their_address(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name, ("good",))
    events = [
        Event(id="same", target=target, exchange=name, body=b"{}", unroutable="fail")
        for target in ("good", "bad", "good", "bad")
    ]
    report = publisher.publish(events)
    assert report.published == (events[0], events[2])
    assert [one.event for one in report.rejected] == [events[1], events[3]]
    assert len(inspector.messages(queue, 2)) == 2


@pytest.mark.hazard("A8", "B3")
def test_an_event_for_a_missing_exchange_does_not_affect_others(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    events = make_events(publisher, ["x"] * 5)
    lost = make_events(publisher, ["x"], exchange=f"{name}-missing", unroutable="fail")
    report = publisher.publish([*events[:2], *lost, *events[2:]])
    assert report.published == tuple(events)
    assert [one.event for one in report.rejected] == lost
    assert "no exchange" in report.rejected[0].reason
    assert {message.id for message in inspector.all(queue)} == {event.id for event in events}
    assert publisher.publish(make_events(publisher, ["x"] * 100)).ok


@pytest.mark.hazard("C1")
def test_an_event_no_queue_takes_is_parked_with_its_address_and_the_reason(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name, ("good",))
    inspector.channel.queue_delete(PARKING_QUEUE)
    inspector.clean_up(queue=PARKING_QUEUE)
    hooked: list[Event] = []
    with Publisher(amqp_url, exchange=name, on_parked=hooked.extend) as publisher:
        good = make_events(publisher, ["good"] * 3)
        bad = make_events(publisher, ["bad"], headers={"tenant": "acme"}, key="k")
        nowhere = make_events(publisher, ["x"], exchange=f"{name}-missing")
        report = publisher.publish([good[0], *bad, good[1], *nowhere, good[2]])
        assert report.published == tuple(good)
        # A queue that has only just been made may refuse (basic.nack): then it is kept, at first.
        assert {*report.parked, *report.kept} == {*bad, *nowhere}
        assert publisher.drain(10)
        again = make_events(publisher, ["bad"] * 300)
        assert publisher.publish(again).parked == tuple(again)
    assert {*hooked} == {*bad, *nowhere, *again}
    # The missing exchange closes the channel: what was not confirmed by then is sent again.
    assert {m.id for m in inspector.all(queue)} == {event.id for event in good}
    letters = inspector.messages(PARKING_QUEUE, 302)
    assert {m.id for m in letters} == {event.id for event in (*bad, *nowhere, *again)}
    [letter] = [m for m in letters if m.id == bad[0].id]
    headers = letter.properties.headers
    assert (letter.body, letter.properties.delivery_mode) == (bad[0].body, 2)
    assert (headers["tenant"], headers["outbox-key"]) == ("acme", "k")
    assert headers["outbox-parked-exchange"] == name
    assert headers["outbox-parked-target"] == "bad"
    assert "NO_ROUTE" in headers["outbox-parked-reason"]
    [letter] = [m for m in letters if m.id == nowhere[0].id]
    assert "no exchange" in letter.properties.headers["outbox-parked-reason"]


def test_an_event_without_a_parking_queue_is_kept(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    inspector.channel.exchange_declare(name, "topic", durable=True)
    inspector.channel.queue_delete(PARKING_QUEUE)
    inspector.clean_up(queue=PARKING_QUEUE, exchange=name)
    with Publisher(amqp_url, exchange=name, declare="never") as publisher:
        events = make_events(publisher, ["bad"])
        assert publisher.publish(events).kept == tuple(events)
        inspector.queue(PARKING_QUEUE)
        assert publisher.drain(10)
    assert inspector.get(PARKING_QUEUE).id == events[0].id


def test_what_must_be_kept_is_reported_to_the_hook_on_the_publishers_thread() -> None:
    seen: list[tuple[Event, str]] = []

    def on_kept(events: tuple[Event, ...]) -> None:
        seen.extend((event, threading.current_thread().name) for event in events)

    unreachable = "amqp://127.0.0.1:9"
    with Publisher(unreachable, timeout=0.2, drain_timeout=0, on_kept=on_kept) as publisher:
        events = make_events(publisher, ["x"] * 3)
        publisher.publish(events[:1])  # waits; then the broker is known to be unavailable
        with ThreadPoolExecutor(1) as executor:
            executor.submit(publisher.publish, events[1:2]).result(10)
        asyncio.run(publisher.publish_async(events[2:]))
        wait_until(lambda: len(seen) == 3)
    assert seen == [(event, "outbox-publisher") for event in events]


def test_nacked_events_of_one_key_arrive_in_order_and_hold_up_no_other_key(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    full = {"x-max-length": 2, "x-overflow": "reject-publish"}
    inspector.queue(f"{name}-full", name, ("full",), arguments=full)
    inspector.queue(name, name, ("good",))
    with Publisher(amqp_url, exchange=name) as publisher:
        # One after the other: what is in flight together may overtake a nacked one.
        events = make_events(publisher, ["full"] * 12, key="k")
        for event in events:
            publisher.publish([event])
        assert len(publisher.kept) == 10
        assert publisher.publish(make_events(publisher, ["good"], key="other")).ok
        later = make_events(publisher, ["good"], key="k")
        assert publisher.publish(later).kept == tuple(later)
        arrived = [inspector.get(f"{name}-full", 40).id for _ in range(12)]
        assert arrived == [event.id for event in events]
        assert publisher.drain(10)
    assert inspector.messages(name, 2)[-1].id == later[0].id


def test_a_chunk_of_one_key_that_is_nacked_in_part_arrives_in_order(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    full = {"x-max-length": 3, "x-overflow": "reject-publish"}
    inspector.queue(name, name, arguments=full)
    with Publisher(amqp_url, exchange=name) as publisher:
        events = make_events(publisher, ["full"] * 8, key="k")
        assert publisher.publish(events).kept == tuple(events[3:])
        arrived = [inspector.get(name, 30).id for _ in events]
        assert arrived == [event.id for event in events]
        assert publisher.drain(5)


@pytest.mark.hazard("C2")
def test_an_event_refused_by_a_full_queue_is_kept_and_blocks_no_others(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    full = {"x-max-length": 1, "x-overflow": "reject-publish"}
    inspector.queue(f"{name}-full", name, ("full",), arguments=full)
    queue = inspector.queue(name, name, ("good",))
    kept: list[Event] = []
    with Publisher(amqp_url, exchange=name, on_kept=kept.extend) as publisher:
        assert publisher.publish(make_events(publisher, ["full"])).ok
        events = make_events(publisher, ["good", "full", "good"])
        report = publisher.publish(events)
        assert report.published == (events[0], events[2])
        assert report.kept == publisher.kept == tuple(kept)
        assert kept == [events[1]]
        assert publisher.publish(make_events(publisher, ["good"])).ok
        assert len(inspector.messages(queue, 3)) == 3
        inspector.get(f"{name}-full")  # makes room
        assert publisher.drain(10)
        assert not publisher.kept
    assert inspector.get(f"{name}-full").id == events[1].id


def test_an_event_that_must_not_be_kept_is_withdrawn_when_the_broker_refuses_it(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    full = {"x-max-length": 1, "x-overflow": "reject-publish"}
    queue = inspector.queue(name, name, arguments=full)
    first, second = make_events(publisher, ["x", "x"])
    assert publisher.publish([first]).ok
    report = publisher.publish([second], keep=False)
    assert report.kept == publisher.kept == ()
    assert report.rejected[0].event == second
    assert report.error is not None
    assert inspector.get(queue).id == first.id
    assert inspector.all(queue) == []


@pytest.mark.hazard("A6")
def test_eight_threads_through_one_publisher_neither_lose_nor_mix_up_events(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    configure(amqp_url, exchange=name)

    def flush(thread: int) -> list[str]:
        sent = []
        for number in range(50):
            with auto_publishing() as block:
                for part in range(3):
                    sent.append(enqueue_event([thread, number, part], f"t.{thread}").id)
            assert block.report is not None
            assert block.report.ok
            assert len(block.report.published) == 3
        return sent

    with ThreadPoolExecutor(8) as pool:
        sent = [one for ids in pool.map(flush, range(8)) for one in ids]
    messages = inspector.messages(queue, len(sent))
    assert sorted(message.id for message in messages) == sorted(sent)
    for thread in range(8):
        of_thread = [m.payload for m in messages if m.target == f"t.{thread}"]
        assert of_thread == [[thread, n, part] for n in range(50) for part in range(3)]


@pytest.mark.hazard("A6", "B7")
def test_event_loops_in_turn_and_at_the_same_time_lose_nothing(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    configure(amqp_url, exchange=name)
    sent: list[str] = []

    async def work(count: int) -> None:
        async def one() -> None:
            async with auto_publishing() as block:
                sent.append(enqueue_event({}, "x").id)
            assert block.report is not None
            assert block.report.ok

        await asyncio.gather(*(one() for _ in range(count)))

    for _ in range(3):
        asyncio.run(work(20))
    threads = [threading.Thread(target=lambda: asyncio.run(work(20))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sent) == 100
    assert sorted(m.id for m in inspector.messages(queue, 100)) == sorted(sent)


@pytest.mark.hazard("E13")
@pytest.mark.asyncio
async def test_publishing_synchronously_on_an_event_loop_is_refused_and_loses_nothing(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    collector = EventCollector(publisher=publisher)
    with EventCollector.use(collector):
        event = enqueue_event({}, "x")
        with pytest.raises(UsageError, match="publish_async"):
            publish()
        assert collector.events == (event,)
        assert (await publish_async()).published == (event,)
    assert inspector.get(queue).id == event.id


def test_the_host_that_answers_is_used(amqp_url: str, inspector: Inspector, name: str) -> None:
    queue = inspector.queue(name, name)
    credentials, _, address = amqp_url.rpartition("@")
    with Publisher(f"{credentials}@127.0.0.1:1,{address}", exchange=name) as publisher:
        events = make_events(publisher, ["x"])
        publisher.publish(events)
        assert publisher.drain(10)
    assert inspector.get(queue).id == events[0].id


@pytest.mark.hazard("A7")
@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_after_a_fork_parent_and_child_publish_over_separate_connections(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    publisher = configure(amqp_url, exchange=name)
    with auto_publishing():
        enqueue_event("before", "x")
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            for n in range(5):
                with auto_publishing() as block:
                    enqueue_event(f"child {n}", "x")
                assert block.report is not None
                assert block.report.ok
            publisher.close()
            status = 0
        finally:
            os._exit(status)
    for n in range(5):
        with auto_publishing() as block:
            enqueue_event(f"parent {n}", "x")
        assert block.report is not None
        assert block.report.ok
    assert os.waitpid(pid, 0)[1] == 0
    payloads = [message.payload for message in inspector.messages(queue, 11)]
    assert sorted(payloads) == sorted(
        ["before", *(f"{who} {n}" for who in ("child", "parent") for n in range(5))]
    )
    assert inspector.all(queue) == []


def test_a_hook_that_waits_for_its_publisher_is_refused_without_harm(
    amqp_url: str, inspector: Inspector, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    inspector.queue(name, name, ("good",))

    def waits(event: Event, reason: str) -> None:
        publisher.publish([event])

    with Publisher(amqp_url, exchange=name, unroutable="fail", on_rejected=waits) as publisher:
        publisher.publish(make_events(publisher, ["bad"]))
        assert publisher.publish(make_events(publisher, ["good"])).ok
    assert "must not wait" in caplog.text


@pytest.mark.hazard("A4")
@pytest.mark.one_python
@pytest.mark.slow
def test_a_publisher_idle_longer_than_its_heartbeat_is_still_connected(
    amqp_url: str, inspector: Inspector, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "outbox")
    inspector.queue(name, name)
    with Publisher(amqp_url, exchange=name, heartbeat=1) as publisher:
        assert publisher.publish(make_events(publisher, ["x"])).ok
        threading.Event().wait(4)
        assert publisher.connected
        assert publisher.publish(make_events(publisher, ["x"])).ok
    assert caplog.text.count("connected to") == 1


def test_a_closed_publisher_refuses_and_the_collector_keeps_its_events(
    amqp_url: str, name: str
) -> None:
    publisher = Publisher(amqp_url, exchange=name)
    collector = EventCollector(publisher=publisher)
    event = collector.enqueue_event({}, "x")
    publisher.close()
    publisher.close()
    with EventCollector.use(collector), pytest.raises(UsageError, match="closed"):
        publish()
    assert collector.events == (event,)


def test_a_second_configure_takes_over_the_kept_events(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    configure("amqp://127.0.0.1:1/", exchange=name)
    with auto_publishing() as block:
        event = enqueue_event({}, "x")
    assert block.report is not None
    assert block.report.kept == (event,)
    configure(amqp_url, exchange=name)
    assert inspector.get(queue).id == event.id


def test_a_wrong_password_is_reported_without_the_password(
    amqp_url: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    host = amqp_url.rpartition("@")[2]
    with Publisher(f"amqp://guest:hunter2@{host}", exchange=name, drain_timeout=0.1) as publisher:
        report = publisher.publish(make_events(publisher, ["x"]))
        assert report.error is not None
        assert "refused the user or the password" in str(report.error)
        assert "hunter2" not in repr(publisher)
    assert "hunter2" not in caplog.text


@pytest.mark.hazard("C9")
def test_an_exchange_of_another_type_is_reported_by_the_name_of_the_argument(
    amqp_url: str, inspector: Inspector, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    inspector.channel.exchange_declare(name, "fanout", durable=True)
    inspector.clean_up(exchange=name)
    with Publisher(amqp_url, exchange=name) as publisher:
        publisher.publish(make_events(publisher, ["x"]))
    errors = [record.getMessage() for record in caplog.records if "cannot declare" in record.msg]
    assert len(errors) == 1
    assert "inequivalent arg 'type'" in errors[0]


@pytest.mark.hazard("A12")
def test_a_report_survives_pickling(publisher: Publisher, inspector: Inspector, name: str) -> None:
    inspector.queue(name, name, ("good",))
    report = publisher.publish(make_events(publisher, ["good", "bad"], unroutable="fail"))
    assert report.rejected
    assert pickle.loads(pickle.dumps(report)) == report


@pytest.mark.hazard("A8")
@pytest.mark.one_python
@pytest.mark.slow
def test_events_to_a_missing_exchange_are_identified_by_its_name_in_a_large_chunk(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    good = make_events(publisher, ["x"] * 3_000)
    bad = make_events(publisher, ["x"] * 3, exchange=f"{name}-missing", unroutable="fail")
    chunk = [*good[:1_000], bad[0], *good[1_000:2_000], *bad[1:], *good[2_000:]]
    begin = time.monotonic()
    report = publisher.publish(chunk, timeout=30)
    assert time.monotonic() - begin < 5  # one by one they would take longer
    assert report.published == tuple(good)
    assert [one.event for one in report.rejected] == bad
    assert {m.id for m in inspector.all(queue)} == {event.id for event in good}


@pytest.mark.hazard("A11")
def test_a_hook_that_exits_ends_nothing(amqp_url: str, inspector: Inspector, name: str) -> None:
    inspector.queue(name, name, ("good",))

    def exits(event: Event, reason: str) -> None:
        raise SystemExit(1)

    with Publisher(amqp_url, exchange=name, unroutable="fail", on_rejected=exits) as publisher:
        assert publisher.publish(make_events(publisher, ["bad"])).rejected
        assert publisher.publish(make_events(publisher, ["good"])).ok
        assert publisher.connected


@pytest.mark.one_python
@pytest.mark.slow
def test_a_large_chunk_that_is_unroutable_is_parked_in_order(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    parked = inspector.queue(PARKING_QUEUE)
    inspector.channel.queue_purge(parked)
    events = make_events(publisher, ["nowhere"] * 5_000)
    assert publisher.publish(events, timeout=30).parked == tuple(events)
    assert [message.id for message in inspector.messages(parked, 5_000)] == [
        event.id for event in events
    ]
