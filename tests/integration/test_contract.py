"""What every transport promises: one test each, over RabbitMQ, databases and memory://."""

from __future__ import annotations

import asyncio
import datetime
import functools
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from outbox import (
    Event,
    InvalidEvent,
    Publisher,
    PublishReport,
    UsageError,
    auto_publishing,
    enqueue_event,
    publish,
)
from outbox.consumers import REQUEUE, ReceivedEvent, Reject, Worker, consumer
from outbox.consumers.worker import dispatch_queue
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.messages.delivery import Delivery, dead_letter_queue
from outbox.messages.topics import matches
from tests.places import (
    Place,
    RabbitMQPlace,
    events_for,
    made,
    parked_in,
    place_of,
    reading,
    replay,
    selected,
    working,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.every_kind

HEADERS: dict[str, Any] = {
    "text": "Grüße",
    "empty": "",
    "small": 7,
    "large": 1 << 40,
    "negative": -(1 << 63),
    "yes": True,
    "none": None,
    "raw": b"\x00\xff",
    "list": [1, "two", [b"3"], {"four": None}],
    "table": {"a": {"b": [True]}, "$bytes": "no bytes", "$table": {}},
}


@pytest.fixture
def publisher(place: Place) -> Iterator[Publisher]:
    with place.publisher() as found:
        yield found


@pytest.fixture(params=["rabbitmq", "sqlite", "postgresql", "mariadb"])
def place(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> Place:
    return place_of(request.param, request, name, tmp_path)


@pytest.fixture(params=["rabbitmq", "sqlite", "postgresql", "mariadb", "memory"])
def taker(request: pytest.FixtureRequest, name: str, tmp_path: Path) -> Iterator[Publisher]:
    """A publisher whose events go wherever they are sent."""
    if request.param == "memory":
        with Publisher("memory://", exchange=name) as found:
            yield found
        return
    made = place_of(request.param, request, name, tmp_path)
    made.bind(f"{name}-all", name, "#")
    with made.publisher() as found:
        yield found


def ids(found: list[Delivery] | tuple[Event, ...] | list[Event]) -> list[str | None]:
    return [one.message_id if isinstance(one, Delivery) else one.id for one in found]


def headers_of(event: Event, key: str = "k") -> dict[str, object]:
    """Return the headers its message must have: ``HEADERS``, and what has no property."""
    since = event.occurred_at - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return {
        **HEADERS,
        "outbox-format": 1,
        "outbox-key": key,
        "outbox-occurred-at-us": since // datetime.timedelta(microseconds=1),
    }


def assert_same(received: ReceivedEvent, sent: Event) -> None:
    """Assert that a consumer got the event that was enqueued."""
    for field in ("id", "target", "exchange", "body", "content_type", "key", "priority"):
        assert getattr(received, field) == getattr(sent, field)
    assert (received.headers, received.occurred_at) == (HEADERS, sent.occurred_at)


# ---------------------------------------------------------------------------- publishing


def test_the_report_names_every_event_in_order(taker: Publisher) -> None:
    events = events_for(taker, ["a", "b.c", "b.c"])
    report = taker.publish(events)
    assert report == PublishReport(published=tuple(events))
    assert report.ok


def test_an_empty_chunk_is_published_at_once(taker: Publisher) -> None:
    assert taker.publish([]) == PublishReport()


def test_a_published_event_is_counted_and_not_kept(taker: Publisher) -> None:
    taker.publish(events_for(taker, ["a"] * 3))
    stats = taker.stats()
    assert (stats.published, stats.kept, stats.ever_kept) == (3, 0, 0)
    assert taker.kept == ()


def test_many_threads_publish_concurrently(taker: Publisher) -> None:
    reports: list[PublishReport] = []

    def act() -> None:
        for _ in range(5):
            reports.append(taker.publish(events_for(taker, ["a"] * 10)))

    threads = [threading.Thread(target=act) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert [len(report.published) for report in reports] == [10] * 20


def test_a_closed_publisher_refuses(taker: Publisher) -> None:
    events = events_for(taker, ["a"])
    assert taker.close() == ()
    with pytest.raises(UsageError, match="closed"):
        taker.publish(events)


@pytest.mark.hazard("B1")
def test_publishing_on_a_running_loop_is_refused_and_its_async_twin_works(
    taker: Publisher,
) -> None:
    events = events_for(taker, ["a"])

    async def act() -> PublishReport:
        with pytest.raises(UsageError, match="publish_async"):
            taker.publish(events)
        return await taker.publish_async(events)

    assert asyncio.run(act()).published == tuple(events)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"headers": {"outbox-key": "x"}}, "is reserved"),
        ({"headers": {"x": object()}}, "headers carry"),
        ({"priority": 256}, "priority"),
        ({"unroutable": "drop"}, "unroutable"),
        ({"id": ""}, "id is empty"),
        ({"delay": -1}, "delay=-1"),
        ({"deliver_at": datetime.datetime(2030, 1, 1)}, "time zone"),
    ],
)
def test_an_invalid_event_is_refused_at_the_callers_line(
    taker: Publisher, options: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidEvent, match=reason):
        events_for(taker, ["a"], **options)


def test_a_failed_block_publishes_nothing(taker: Publisher) -> None:
    with pytest.raises(ZeroDivisionError), auto_publishing(publisher=taker):
        enqueue_event({}, "a")
        raise ZeroDivisionError
    assert taker.stats().published == 0


# ----------------------------------------------------------------------------- delivering


def test_an_event_is_delivered_with_everything_the_wire_format_promises(
    place: Place, publisher: Publisher, name: str
) -> None:
    with reading(place, name, ["order.*"]) as reader:
        [event] = events_for(publisher, ["order.placed"], headers=HEADERS, key="k-7", priority=3)
        assert publisher.publish([event]).ok
        [found] = reader.get()
    assert (found.queue, found.exchange, found.target) == (name, place.exchange, "order.placed")
    assert (found.body, found.content_type) == (b'{"n":0}', "application/json")
    assert (found.message_id, found.priority, found.redelivered) == (event.id, 3, False)
    assert found.timestamp == int(event.occurred_at.timestamp())
    assert found.content_encoding is None
    assert found.headers == headers_of(event, "k-7")


def test_a_consumer_gets_the_event_that_was_enqueued(
    place: Place, publisher: Publisher, name: str
) -> None:
    seen: list[ReceivedEvent] = []
    handler = consumer(made(place, name, "order.#"), topics=["order.#"])(seen.append)
    with working(publisher, handler):
        [sent] = events_for(publisher, ["order.placed"], headers=HEADERS, key="k", priority=2)
        publisher.publish([sent])
        wait_until(lambda: seen)
    [event] = seen
    assert_same(event, sent)
    assert (event.queue, event.attempt, event.redelivered) == (name, 1, False)
    assert place.count(name) == place.count(dead_letter_queue(name)) == 0


@pytest.mark.parametrize("size", [0, 1, 200_000, 3_000_000])
def test_a_body_arrives_byte_for_byte(
    place: Place, publisher: Publisher, name: str, size: int
) -> None:
    body = bytes(range(256)) * (size // 256) + bytes(size % 256)
    event = Event(
        id="1", target=name, exchange=place.exchange, body=body, content_type="application/x-raw"
    )
    with reading(place, name) as reader:
        assert publisher.publish([event]).ok
        [found] = reader.get()
    assert found.body == body
    assert found.content_type == "application/x-raw"


def test_events_keep_their_order_within_and_between_chunks(
    place: Place, publisher: Publisher, name: str
) -> None:
    with reading(place, name, ["a.*"]) as reader:
        events = events_for(publisher, ["a.x", "a.y"] * 300)
        for start in range(0, 600, 150):
            publisher.submit(events[start : start + 150])
        assert ids(reader.get(600)) == ids(events)


PATTERNS = ["a.b", "a.*", "*.b", "#", "a.#", "#.b", "*", "*.*", "a.*.c", "a.#.c", "#.#", "", "*."]
TARGETS = ["a", "b", "a.b", "a.b.c", "a..c", "a.", ".b", ".", "..", "a.c", "b.a"]


def test_patterns_match_as_those_of_a_topic_exchange(place: Place, name: str) -> None:
    with place.publisher(unroutable="ignore") as publisher:
        for number, pattern in enumerate(PATTERNS):
            exchange = f"{name}-{number}"
            if isinstance(place, RabbitMQPlace):
                place._inspector.clean_up(exchange=exchange)
            place.bind(f"{name}-q", exchange, pattern)
            events = [Event(id=one, target=one, exchange=exchange, body=b"") for one in TARGETS]
            routed = {event.target for event in publisher.publish(events).published}
            assert routed == {one for one in TARGETS if matches(pattern, one)}, pattern


def test_every_queue_that_matches_gets_an_event_once(
    place: Place, publisher: Publisher, name: str
) -> None:
    with (
        reading(place, f"{name}-3", ["order"]) as three,
        reading(place, f"{name}-2", ["*.placed"]) as two,
        reading(place, f"{name}-1", ["order.*", "#.placed", "#"]) as one,
    ):
        events = events_for(publisher, ["order.placed", "order"])
        publisher.publish(events)
        assert ids(one.get(2)) == ids(events)
        assert ids(two.get(1)) == ids(events[:1])
        assert ids(three.get(1)) == ids(events[1:])
    assert [place.count(f"{name}-{n}") for n in (1, 2, 3)] == [0, 0, 0]


def test_a_queue_bound_later_by_another_process_gets_events_published_after_that(
    place: Place, publisher: Publisher, name: str
) -> None:
    before = events_for(publisher, ["a.b"], unroutable="ignore")
    assert publisher.publish(before).ignored == tuple(before)
    place.bind(name, place.exchange, "a.*")
    after = events_for(publisher, ["a.b"])
    assert publisher.publish(after).published == tuple(after)
    assert place.count(name) == 1


def test_the_unnamed_exchange_delivers_to_the_queue_named_by_the_target(
    place: Place, publisher: Publisher, name: str
) -> None:
    queue = f"{name}.*"
    with reading(place, queue) as reader:
        [event, elsewhere] = events_for(
            publisher, [queue, f"{name}.x"], exchange="", unroutable="fail"
        )
        report = publisher.publish([event, elsewhere])
        assert report.published == (event,)
        assert [one.event for one in report.rejected] == [elsewhere]
        [found] = reader.get()
    assert (found.exchange, found.target, found.message_id) == ("", queue, event.id)


def test_an_unsettled_message_is_redelivered_in_its_old_place_to_the_next_worker(
    place: Place, publisher: Publisher, name: str
) -> None:
    with reading(place, name, ["a"]) as reader:
        events = events_for(publisher, ["a"] * 5)
        publisher.publish(events)
        reader.get(1)
        assert not any(one.redelivered for one in reader.take(3))
    later = events_for(publisher, ["a"])
    publisher.publish(later)
    with reading(place, name, again=True) as reader:
        found = reader.get(5)
    assert ids(found) == ids(events[1:] + later)
    assert [one.redelivered for one in found][:3] == [True] * 3
    assert not found[-1].redelivered


def test_a_message_given_back_is_redelivered(place: Place, publisher: Publisher, name: str) -> None:
    with reading(place, name) as reader:
        sent = events_for(publisher, [name])
        publisher.publish(sent)
        [first] = reader.take(1)
        reader.requeue(first, 0.05)
        [second] = reader.get()
    assert ids([second]) == ids(sent)
    assert (first.redelivered, second.redelivered) == (False, True)
    assert (first.body, first.headers) == (
        second.body,
        {name: value for name, value in (second.headers or {}).items() if name[:2] != "x-"},
    )


def test_delayed_events_of_a_chunk_arrive_when_they_are_due_and_never_earlier(
    place: Place, publisher: Publisher, name: str
) -> None:
    with reading(place, name, ["a.*"]) as reader:
        [later] = events_for(publisher, ["a.b"], headers=HEADERS, key="k", priority=2, delay=2)
        [now] = events_for(publisher, ["a.b"])
        moment = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=0.5)
        [sooner] = events_for(publisher, [name], exchange="", deliver_at=moment)
        assert publisher.publish([later, now, sooner]).published == (later, now, sooner)
        for expected in (now, sooner, later):
            [found] = reader.get()
            at = datetime.datetime.now(datetime.UTC)
            assert found.message_id == expected.id
            if expected.deliver_at is not None:
                late = at - expected.deliver_at
                # Over RabbitMQ within a second after it was rounded up to whole seconds.
                assert datetime.timedelta(milliseconds=-2) <= late < datetime.timedelta(seconds=2)
    assert (found.exchange, found.target, found.priority) == (place.exchange, "a.b", 2)
    assert {one: (found.headers or {})[one] for one in HEADERS} == HEADERS
    assert not any(one.startswith("outbox-delay") for one in found.headers or {})


def test_a_consumer_sees_nothing_of_the_delay(
    place: Place, publisher: Publisher, name: str
) -> None:
    seen: list[ReceivedEvent] = []
    handler = consumer(made(place, name, "order.#"), topics=["order.#"])(seen.append)
    with working(publisher, handler):
        [sent] = events_for(publisher, ["order.placed"], headers=HEADERS, key="k", delay=1)
        publisher.publish([sent])
        wait_until(lambda: seen)
    [event] = seen
    assert_same(event, sent)
    assert (event.attempt, event.redelivered) == (1, False)


def test_no_more_messages_than_the_prefetch_are_delivered_at_a_time(
    place: Place, publisher: Publisher, name: str
) -> None:
    with reading(place, name, prefetch=3) as reader:
        publisher.publish(events_for(publisher, [name] * 5))
        reader.take(3)
        with pytest.raises(AssertionError, match="0 of 1 messages arrived"):
            reader.take(1, timeout=0.3)
    wait_until(lambda: place.count(name) == 5)


# ----------------------------------------------------------------------------- unroutable


def test_an_unroutable_event_is_parked_failed_or_ignored_and_its_siblings_are_published(
    place: Place, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    rejected: list[tuple[Event, str]] = []
    parked: list[Event] = []
    place.bind(name, place.exchange, "good")
    with place.publisher(
        on_rejected=lambda event, why: rejected.append((event, why)), on_parked=parked.extend
    ) as publisher:
        good = events_for(publisher, ["good"] * 3)
        to_park = events_for(publisher, ["bad"])
        to_fail = events_for(publisher, ["bad"], unroutable="fail")
        to_ignore = events_for(publisher, ["bad"], unroutable="ignore")
        report = publisher.publish([*to_park, good[0], *to_fail, good[1], *to_ignore, good[2]])
    assert report == PublishReport(
        published=tuple(good),
        parked=tuple(to_park),
        ignored=tuple(to_ignore),
        rejected=report.rejected,
    )
    assert [(one.event, one.reason) for one in report.rejected] == rejected
    assert rejected == [(to_fail[0], "unroutable: 312 NO_ROUTE")]
    assert parked == to_park
    assert not report.ok
    assert f"no queue is bound to 'bad' on exchange {place.exchange!r}: start a" in caplog.text
    assert "`outbox parked replay` publishes them" in caplog.text


def test_all_hooks_but_one_run_on_the_publishers_thread(place: Place, name: str) -> None:
    threads: dict[str, str] = {}

    def note(hook: str) -> Any:
        return lambda *_: threads.update({hook: threading.current_thread().name})

    place.bind(name, place.exchange, "good")
    with place.publisher(
        on_connected=note("connected"),
        on_confirmed=note("confirmed"),
        on_parked=note("parked"),
        on_rejected=note("rejected"),
        on_cleared=note("cleared"),
    ) as publisher:
        publisher.publish(
            [
                *events_for(publisher, ["good", "bad"]),
                *events_for(publisher, ["bad"], unroutable="fail"),
            ]
        )
        with auto_publishing(publisher=publisher) as block:
            enqueue_event({}, "good")
            block.clear_events()
    assert threads == {
        **dict.fromkeys(("connected", "confirmed", "parked", "rejected"), "outbox-publisher"),
        "cleared": threading.current_thread().name,
    }


@pytest.mark.parametrize("policy", ["park", "fail", "ignore"])
def test_the_publishers_policy_applies_to_events_without_one(
    place: Place, policy: Any, name: str
) -> None:
    with place.publisher(unroutable=policy) as publisher:
        own = events_for(publisher, ["bad"], unroutable="fail" if policy == "park" else "park")
        plain = events_for(publisher, ["bad"])
        report = publisher.publish([*own, *plain])
    fates = {
        "park": report.parked,
        "fail": tuple(one.event for one in report.rejected),
        "ignore": report.ignored,
    }
    assert fates[policy] == tuple(plain)
    assert fates["fail" if policy == "park" else "park"] == tuple(own)


def test_a_parked_event_is_unchanged_and_has_its_address_and_the_reason(
    place: Place, publisher: Publisher
) -> None:
    [event] = events_for(publisher, ["lost.one"], headers=HEADERS, key="k", priority=1)
    assert publisher.publish([event]).parked == (event,)
    with reading(place, PARKING_QUEUE, again=True) as reader:
        [found] = reader.get()
    headers = dict(found.headers or {})
    datetime.datetime.fromisoformat(headers.pop("outbox-parked-at"))
    assert headers == {
        **headers_of(event),
        "outbox-parked-reason": "312 NO_ROUTE",
        "outbox-parked-exchange": place.exchange,
        "outbox-parked-target": "lost.one",
    }
    assert (found.exchange, found.target, found.message_id) == ("", PARKING_QUEUE, event.id)
    assert (found.body, found.priority) == (event.body, 1)


def test_parked_events_keep_their_order(place: Place, publisher: Publisher) -> None:
    events = events_for(publisher, [f"lost.{n}" for n in range(50)])
    assert publisher.publish(events).parked == tuple(events)
    with reading(place, PARKING_QUEUE, again=True) as reader:
        assert ids(reader.get(50)) == ids(events)


# ------------------------------------------------------------------------------- consuming


def test_a_dead_letter_has_the_reason_and_everything_from_the_message(
    place: Place, publisher: Publisher, name: str
) -> None:
    @consumer(made(place, name, "order.*"), topics=["order.*"])
    def refuse(event: ReceivedEvent) -> None:
        raise Reject("no such customer")

    with working(publisher, refuse):
        [sent] = events_for(publisher, ["order.placed"], headers=HEADERS, key="k", priority=4)
        publisher.publish([sent])
        with reading(place, dead_letter_queue(name), again=True) as reader:
            [letter] = reader.get()
    headers = dict(letter.headers or {})
    for when in ("outbox-dead-at", "outbox-dead-first-at"):
        datetime.datetime.fromisoformat(headers.pop(when))
    assert "Reject: no such customer" in headers.pop("outbox-dead-traceback")
    assert headers == {
        **headers_of(sent),
        "outbox-dead-reason": "no such customer",
        "outbox-dead-error": "Reject",
        "outbox-dead-queue": name,
        "outbox-dead-exchange": place.exchange,
        "outbox-dead-target": "order.placed",
        "outbox-attempt": 1,
    }
    assert (letter.message_id, letter.body, letter.priority) == (sent.id, sent.body, 4)
    assert place.count(name) == 0


def test_a_second_run_is_marked_redelivered_and_its_follow_ons_have_the_same_ids(
    place: Place, publisher: Publisher, name: str
) -> None:
    made(place, name)
    seen: list[bool] = []

    @consumer(name)
    def act(event: ReceivedEvent) -> Any:
        for n in (1, 1, 2):
            enqueue_event({"n": n}, f"{name}-next")
        publish()
        seen.append(event.redelivered)
        return None if event.redelivered else REQUEUE

    with reading(place, f"{name}-next") as reader, working(publisher, act):
        publisher.publish(events_for(publisher, [name]))
        found = ids(reader.get(6))
    assert seen == [False, True]
    assert found[:3] == found[3:]
    assert len(set(found)) == 3


def test_the_same_message_has_follow_ons_of_the_same_ids_over_every_transport(
    place: Place, publisher: Publisher
) -> None:
    queue = made(place, "contract.follow-on")

    @consumer(queue)
    def act(event: ReceivedEvent) -> None:
        enqueue_event({"of": event.id}, "contract.next", exchange="")
        publish()

    with reading(place, "contract.next") as reader, working(publisher, act):
        message = Event(id="m-1", target=queue, exchange="", body=b"1")
        publisher.publish([message])
        assert ids(reader.get()) == ["534dd04d-b6bd-51e4-9a31-689698afa1c5"]


def test_submitted_events_are_published_before_close_returns(
    place: Place, publisher: Publisher, name: str
) -> None:
    place.bind(name, place.exchange, "#")
    events = events_for(publisher, ["x"] * 500)
    for event in events:
        publisher.submit([event])
    assert publisher.close() == ()
    assert place.count(name) == 500


# ------------------------------------------------------------------------------ priorities


@pytest.mark.hazard("C11")
@pytest.mark.parametrize(
    ("threads", "prefetch"), [pytest.param(1, 50, marks=pytest.mark.slow), (4, 50), (2, 1)]
)
def test_all_messages_of_a_queue_start_before_any_of_the_next(
    place: Place,
    publisher: Publisher,
    name: str,
    threads: int,
    prefetch: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A broker may be busy with other tests, too.
    is_broker = isinstance(place, RabbitMQPlace)
    monkeypatch.setattr(dispatch_queue, "_ON_ITS_WAY", 2.0 if is_broker else 0.5)
    begun: list[str] = []
    queues = [made(place, f"{name}-{rank}") for rank in ("high", "medium", "low")]
    count = 20 if prefetch == 1 else 150
    for queue in reversed(queues):
        publisher.publish(events_for(publisher, [queue] * count)).raise_for_failure()
    consumers = [
        consumer(queue)(lambda event: begun.append(event.queue)) for queue in sorted(queues)
    ]
    ranks = {queue: rank for rank, queue in enumerate(queues)}
    with working(publisher, *consumers, threads=threads, prefetch=prefetch, ranks=ranks):
        wait_until(lambda: len(begun) == 3 * count, 30)
    assert begun == [queue for queue in queues for _ in range(count)]


def test_new_messages_of_a_preferred_queue_start_before_others_already_waiting_in_the_worker(
    place: Place, publisher: Publisher, name: str
) -> None:
    begun: list[str] = []
    go_on = threading.Event()
    high, low = made(place, f"{name}-high"), made(place, f"{name}-low")

    def act(event: ReceivedEvent) -> None:
        begun.append(event.queue)
        assert go_on.wait(20)

    consumers = [consumer(high)(act), consumer(low)(act)]
    with working(publisher, *consumers, threads=1, ranks={high: 0, low: 1}) as worker:
        publisher.publish(events_for(publisher, [low] * 30))
        wait_until(lambda: begun and has_come(worker, low, 30))
        publisher.publish(events_for(publisher, [high] * 30))
        wait_until(lambda: has_come(worker, high, 30))
        go_on.set()
        wait_until(lambda: len(begun) == 60)
    assert begun == [low] + [high] * 30 + [low] * 29


def test_a_preferred_queue_with_a_trickle_of_messages_does_not_hold_up_others(
    place: Place, publisher: Publisher, name: str
) -> None:
    begun: list[str] = []
    never = threading.Event()
    high, low = made(place, f"{name}-high"), made(place, f"{name}-low")

    @consumer(high)
    def on_high(event: ReceivedEvent) -> None:
        publisher.publish(events_for(publisher, [high]), timeout=0.0)
        begun.append(event.queue)
        never.wait(0.02)

    @consumer(low)
    def on_low(event: ReceivedEvent) -> None:
        begun.append(event.queue)

    publisher.publish(events_for(publisher, [low] * 20))
    publisher.publish(events_for(publisher, [high]))
    with working(publisher, on_high, on_low, threads=2, ranks={high: 0, low: 1}):
        wait_until(lambda: begun.count(low) == 20)


def test_the_queue_hands_out_the_higher_priority_first(
    place: Place, publisher: Publisher, name: str
) -> None:
    made(place, name, max_priority=10)
    events = [events_for(publisher, [name], priority=one)[0] for one in (None, 5, 0, 255, 5)]
    assert publisher.publish(events).ok
    wait_until(lambda: place.count(name) == 5)
    with reading(place, name, again=True, prefetch=1, max_priority=10) as reader:
        order = [reader.get()[0].message_id for _ in events]
    assert order == [events[n].id for n in (3, 1, 4, 0, 2)]


def has_come(worker: Worker, queue: str, count: int) -> bool:
    """Return whether the worker has ``count`` messages of the queue: started, or waiting there."""
    found: int = worker._subscription.out(queue)
    return found == count


@pytest.mark.hazard("C11")
def test_a_higher_priority_starts_before_messages_already_waiting_in_the_worker(
    place: Place, publisher: Publisher, name: str
) -> None:
    begun: list[int | None] = []
    go_on = threading.Event()

    @consumer(made(place, name, max_priority=10), max_priority=10)
    def act(event: ReceivedEvent) -> None:
        begun.append(event.priority)
        assert go_on.wait(20)

    with working(publisher, act, threads=1) as worker:
        for number, priority in enumerate((4, 1, None, 9, 5, 9), 1):
            publisher.publish(events_for(publisher, [name], priority=priority))
            wait_until(functools.partial(has_come, worker, name, number))
            wait_until(lambda: begun)
        go_on.set()
        wait_until(lambda: len(begun) == 6)
    assert begun == [4, 9, 9, 5, 1, None]


# ---------------------------------------------------------------------- what waits for a person


def test_parked_events_are_listed_and_replayed_as_they_were(
    place: Place, publisher: Publisher, name: str
) -> None:
    events = events_for(publisher, ["late.one", "late.two"], headers=HEADERS, key="k", priority=1)
    publisher.publish(events)
    found = selected(place, PARKING_QUEUE)
    assert [(one.kind, one.id, one.origin, one.reason) for one in found] == [
        ("parked", event.id, (place.exchange, event.target), "312 NO_ROUTE") for event in events
    ]
    assert replay(place, PARKING_QUEUE) == ["unroutable: 312 NO_ROUTE"] * 2
    assert place.count(PARKING_QUEUE) == 2
    with reading(place, name, ["late.*"]) as reader:
        assert replay(place, PARKING_QUEUE) == []
        again = reader.get(2)
    assert place.count(PARKING_QUEUE) == 0
    for event, message in zip(events, again, strict=True):
        assert (message.exchange, message.target) == (place.exchange, event.target)
        assert (message.message_id, message.body, message.priority) == (event.id, event.body, 1)
        assert message.headers == headers_of(event)


def test_a_replayed_dead_letter_reaches_the_consumer_it_died_in_unchanged(
    place: Place, publisher: Publisher, name: str
) -> None:
    seen: list[ReceivedEvent] = []
    dead = dead_letter_queue(name)

    @consumer(made(place, name, "order.*"), topics=["order.*"])
    def act(event: ReceivedEvent) -> None:
        seen.append(event)
        if len(seen) == 1:
            raise ValueError("broken")

    with working(publisher, act):
        [sent] = events_for(publisher, ["order.placed"], headers=HEADERS, key="k", priority=4)
        publisher.publish([sent])
        wait_until(lambda: place.count(dead))
        [letter] = selected(place, dead)
        assert (letter.kind, letter.died_in, letter.error) == ("dead", name, "ValueError")
        assert replay(place, dead) == []
        wait_until(lambda: len(seen) == 2)
    first, second = seen
    for field in ("id", "target", "exchange", "body", "content_type", "key", "priority"):
        assert getattr(first, field) == getattr(second, field)
    assert (first.headers, first.occurred_at) == (second.headers, second.occurred_at)
    assert place.count(dead) == 0


def test_messages_are_deleted_one_by_one(place: Place, publisher: Publisher) -> None:
    events = events_for(publisher, ["lost"] * 3)
    publisher.publish(events)
    with parked_in(place) as parked, parked.browse(PARKING_QUEUE, 3) as browsing:
        [window] = browsing.windows()
        browsing.remove([window[1]])
    assert [one.id for one in selected(place, PARKING_QUEUE)] == ids([events[0], events[2]])


def test_browsing_a_missing_queue_is_refused(place: Place) -> None:
    with parked_in(place) as parked, pytest.raises(UsageError, match=r"has no queue 'no\.dead'"):
        parked.count("no.dead")
