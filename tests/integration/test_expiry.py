"""Events with a time to live: dropped by consumers when it is over, never dead-lettered."""

from __future__ import annotations

import datetime
import logging
import time
from typing import Any

import pytest
from sqlalchemy.orm import Session

from outbox import Event, EventCollector, InvalidEvent, Publisher, enqueue_event
from outbox.consumers import Consumer, ReceivedEvent, RetryPolicy
from outbox.messages.delivery import dead_letter_queue
from outbox.messages.expiry import expires_at
from outbox.sql import Relay, Store
from outbox.testing.collected_events import CollectedEvents
from tests.places import Place, made, replay, working
from tests.waiting import wait_until


def enqueued(publisher: Publisher, target: str, **options: Any) -> Event:
    collector = EventCollector(publisher=publisher)
    with EventCollector.use(collector):
        event = enqueue_event({}, target, **{"exchange": "", **options})
        collector.publish().raise_for_failure()
    return event


def consumer_of(place: Place, name: str, done: list[str], fails: bool = False) -> type[Consumer]:
    class Work(Consumer):
        queue = made(place, name)
        retry = RetryPolicy(max_attempts=5, delay=1.5)

        def process(self, event: ReceivedEvent) -> None:
            done.append(event.id)
            if fails:
                raise ValueError

        def on_success(self, event: ReceivedEvent) -> None:
            done.append(f"success of {event.id}")

    return Work


def test_an_event_whose_ttl_is_over_is_dropped_with_a_line(
    place: Place, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    done: list[str] = []
    consumer = consumer_of(place, name, done)
    with place.publisher() as publisher:
        late = enqueued(publisher, name, ttl=0.05)
        in_time = enqueued(publisher, name, ttl=datetime.timedelta(minutes=1))
        time.sleep(0.1)
        with working(publisher, consumer):
            wait_until(lambda: len(done) == 2)
            wait_until(lambda: late.id in caplog.text)
        assert done == [in_time.id, f"success of {in_time.id}"]
    assert place.count(name) == 0
    assert place.count(dead_letter_queue(name)) == 0
    [line] = [each for each in caplog.records if "its ttl was over" in each.getMessage()]
    assert line.levelname == "WARNING"
    assert late.id in line.getMessage()


def test_a_ttl_begins_when_a_delayed_event_is_due(place: Place, name: str) -> None:
    done: list[str] = []
    consumer = consumer_of(place, name, done)
    with place.publisher() as publisher, working(publisher, consumer):
        event = enqueued(publisher, name, delay=1, ttl=5)
        wait_until(lambda: event.id in done, 5)
    assert expires_at(event.headers) == event.occurred_at + datetime.timedelta(seconds=6)


def test_a_retry_that_comes_too_late_is_dropped(
    place: Place, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[str] = []
    consumer = consumer_of(place, name, done, fails=True)
    with place.publisher() as publisher, working(publisher, consumer):
        event = enqueued(publisher, name, ttl=1)
        wait_until(lambda: "its ttl was over" in caplog.text, 10)
    assert done == [event.id]
    assert place.count(name) == 0
    assert place.count(dead_letter_queue(name)) == 0


def test_a_dead_letter_that_is_replayed_no_longer_expires(place: Place, name: str) -> None:
    done: list[str] = []

    class Work(Consumer):
        queue = made(place, name)

        def process(self, event: ReceivedEvent) -> None:
            done.append(event.id)
            if len(done) == 1:
                raise ValueError

    with place.publisher() as publisher:
        with working(publisher, Work):
            event = enqueued(publisher, name, ttl=0.8)
            wait_until(lambda: place.count(dead_letter_queue(name)) == 1)
        time.sleep(max(0.0, 0.9 - (time.time() - event.occurred_at.timestamp())))
        replay(place, dead_letter_queue(name))
        with working(publisher, Work):
            wait_until(lambda: len(done) == 2)
    assert done == [event.id, event.id]


def test_a_stored_event_keeps_its_ttl_through_the_relay(
    store: Store, place: Place, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    done: list[str] = []
    consumer = consumer_of(place, name, done)
    with place.publisher(after_commit="nothing") as publisher:
        collector = EventCollector(publisher=publisher)
        with EventCollector.use(collector), Session(store.engine) as session, session.begin():
            late = enqueue_event({}, name, exchange="", ttl=0.05, session=session)
            enqueue_event({}, name, exchange="", ttl=60, session=session)
        time.sleep(0.1)
        relay = Relay(store, publisher)
        relay.start()
        try:
            with working(publisher, consumer):
                wait_until(lambda: len(done) == 2)
                wait_until(lambda: "its ttl was over" in caplog.text)
        finally:
            relay.stop()
    assert late.id not in done


def test_the_kit_drops_what_has_expired(collected_events: CollectedEvents, name: str) -> None:
    done: list[str] = []

    class Work(Consumer):
        queue = name

        def process(self, event: ReceivedEvent) -> None:
            done.append(event.id)

    collector = EventCollector.current()
    enqueue_event({}, name, exchange="", ttl=0.001)
    collector.publish()
    time.sleep(0.01)
    collected_events.deliver(Work)
    assert not done


@pytest.mark.parametrize("ttl", [0, -1, True, "5", float("nan"), float("inf"), 1e12])
def test_an_impossible_ttl_is_refused(ttl: Any) -> None:
    with Publisher("memory://") as publisher, pytest.raises(InvalidEvent, match="ttl="):
        EventCollector(publisher=publisher).enqueue_event({}, "a", ttl=ttl)


def test_a_cloud_event_says_when_it_expires() -> None:
    with Publisher("memory://", envelope="cloudevents", source="/shop") as publisher:
        collector = EventCollector(publisher=publisher)
        event = collector.enqueue_event({}, "a", ttl=1)
        collector.clear_events()
    end = datetime.datetime.fromisoformat(event.headers["ce-expirytime"])
    assert end - event.occurred_at == datetime.timedelta(seconds=1)
