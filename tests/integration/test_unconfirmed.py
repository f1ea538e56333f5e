"""Messages whose last follow-on events are on their way while their thread goes on."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from outbox import Publisher, enqueue_event
from outbox.consumers import Consumer, ReceivedEvent, Worker, consumer
from outbox.subscription import dead_letter_queue
from outbox.testing.broker import PrivateBroker
from tests.amqp import Inspector
from tests.places import Place, events_for, made, reading, working
from tests.waiting import wait_until

MESSAGES = 10


class Gate:
    """Handlers wait here until all messages are with the worker and the broker is frozen."""

    def __init__(self, queue: str) -> None:
        self.queue = queue
        self.handled: list[str] = []
        self.opened = threading.Event()

    def consumer(self) -> Consumer:
        @consumer(self.queue, auto_publish=True)
        def act(event: ReceivedEvent) -> None:
            assert self.opened.wait(30)
            enqueue_event({"of": event.id}, f"{self.queue}-next", exchange="")
            self.handled.append(event.id)

        return act


@contextlib.contextmanager
def frozen(
    broker: PrivateBroker, gate: Gate, *, threads: int, timeout: float = 30.0
) -> Iterator[tuple[Gate, Worker, Inspector]]:
    """Run a worker that has its messages from a broker that does not answer any more."""
    name = gate.queue
    inspector = Inspector(broker.url)
    inspector.queue(f"{name}-next", arguments={"x-queue-type": "classic"})
    with Publisher(broker.url, exchange=name, timeout=timeout, heartbeat=60) as publisher:
        worker = Worker([gate.consumer()], publisher=publisher, threads=threads)
        worker.start()
        inspector.wait_for_queue(name)
        assert publisher.publish(events_for(publisher, [name] * MESSAGES, exchange="")).ok
        wait_until(lambda: worker._subscription.out(name) == MESSAGES)
        broker.pause()
        try:
            gate.opened.set()
            yield gate, worker, inspector
        finally:
            broker.resume()
            worker.stop(10)
    inspector.close()


def test_a_thread_goes_on_while_the_broker_has_not_confirmed(
    private_broker: PrivateBroker, name: str
) -> None:
    with frozen(private_broker, Gate(name), threads=2) as (gate, worker, inspector):
        wait_until(lambda: len(gate.handled) == MESSAGES)
        private_broker.resume()
        wait_until(lambda: worker._subscription.out(name) == 0)
        assert worker.stop(10)
        assert len(set(gate.handled)) == MESSAGES
        assert inspector.all(name) == []
        follow_ons = inspector.all(f"{name}-next")
    assert sorted(one.payload["of"] for one in follow_ons) == sorted(gate.handled)


def test_a_single_thread_has_its_messages_strictly_one_after_the_other(
    private_broker: PrivateBroker, name: str
) -> None:
    with frozen(private_broker, Gate(name), threads=1) as (gate, worker, inspector):
        wait_until(lambda: len(gate.handled) == 1)
        time.sleep(0.3)
        assert len(gate.handled) == 1
        private_broker.resume()
        wait_until(lambda: worker._subscription.out(name) == 0)
        assert len(inspector.all(f"{name}-next")) == MESSAGES


def test_stopping_waits_for_the_confirms(private_broker: PrivateBroker, name: str) -> None:
    with frozen(private_broker, Gate(name), threads=2) as (gate, worker, inspector):
        wait_until(lambda: len(gate.handled) == MESSAGES)
        resuming = threading.Timer(0.5, private_broker.resume)
        resuming.start()
        assert worker.stop(20)
        resuming.join()
        assert inspector.all(name) == []
        assert len(inspector.all(f"{name}-next")) == MESSAGES


def test_what_is_not_confirmed_at_the_end_of_the_grace_comes_again(
    private_broker: PrivateBroker, name: str
) -> None:
    with frozen(private_broker, Gate(name), threads=2) as (gate, worker, inspector):
        wait_until(lambda: len(gate.handled) == MESSAGES)
        begin = time.monotonic()
        assert not worker.stop(0.5)
        assert time.monotonic() - begin < 5
        private_broker.resume()
        wait_until(lambda: inspector.count(name) == MESSAGES)
        assert {one.id for one in inspector.all(name)} == set(gate.handled)


def test_what_is_not_confirmed_in_time_is_processed_again_with_the_same_follow_ons(
    private_broker: PrivateBroker, name: str
) -> None:
    with frozen(private_broker, Gate(name), threads=2, timeout=0.5) as (gate, worker, inspector):
        wait_until(lambda: len(gate.handled) == MESSAGES)
        time.sleep(1)
        private_broker.resume()
        wait_until(lambda: worker._subscription.out(name) == 0, 20)
        assert min(Counter(gate.handled).values()) == 2
        follow_ons = inspector.all(f"{name}-next")
        assert inspector.all(name) == inspector.all(dead_letter_queue(name)) == []
    assert len({one.id for one in follow_ons}) == MESSAGES
    assert {one.payload["of"] for one in follow_ons} == set(gate.handled)


def test_a_stop_does_not_wait_for_what_was_not_confirmed_in_time(
    private_broker: PrivateBroker, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with frozen(private_broker, Gate(name), threads=2, timeout=0.2) as (gate, worker, _inspector):
        wait_until(lambda: caplog.text.count("holding message") == 2)
        begin = time.monotonic()
        assert not worker.stop(20)
        assert time.monotonic() - begin < 10
    assert len(gate.handled) == MESSAGES


def test_a_follow_on_that_the_broker_rejects_takes_its_message_to_the_dead_letters(
    place: Place, name: str
) -> None:
    @consumer(made(place, name), auto_publish=True)
    def act(event: ReceivedEvent) -> None:
        target = name if event.payload["n"] else "nowhere"
        enqueue_event({}, f"{target}-next", unroutable="fail")

    with reading(place, f"{name}-all", [f"{name}-next"]) as reader, place.publisher() as publisher:
        with working(publisher, act):
            sent = events_for(publisher, [name] * 4, exchange="")
            assert publisher.publish(sent).ok
            reader.get(3)
            wait_until(lambda: place.count(dead_letter_queue(name)) == 1)
    with reading(place, dead_letter_queue(name), again=True) as letters:
        [letter] = letters.get()
    assert letter.message_id == sent[0].id
    assert "a follow-on was rejected" in (letter.headers or {})["outbox-dead-reason"]
    assert place.count(name) == 0


def test_success_is_told_when_the_follow_ons_are_confirmed(
    private_broker: PrivateBroker, name: str
) -> None:
    told: list[str] = []

    class Telling(Gate):
        def consumer(self) -> Consumer:
            acting = super().consumer()

            class Tells(Consumer):
                queue = name
                auto_publish = True

                def process(self, event: ReceivedEvent) -> None:
                    acting.process(event)

                def on_success(self, event: ReceivedEvent) -> None:
                    told.append(event.id)

            return Tells()

    with frozen(private_broker, Telling(name), threads=2) as (gate, worker, _inspector):
        wait_until(lambda: len(gate.handled) == 2)
        time.sleep(0.3)
        assert len(gate.handled) == 2
        assert told == []
        private_broker.resume()
        wait_until(lambda: len(told) == MESSAGES)
        wait_until(lambda: worker._subscription.out(name) == 0)
    assert set(told) == set(gate.handled)
