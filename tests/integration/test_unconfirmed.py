"""Messages whose follow-ons are unconfirmed while their thread or task continues."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator

import pytest

from outbox import Publisher, enqueue_event
from outbox.consumers import Consumer, ReceivedEvent, Worker, consumer
from outbox.messages.delivery import dead_letter_queue
from outbox.testing.broker import PrivateBroker
from tests.amqp import Inspector
from tests.places import Place, events_for, made, reading, working
from tests.waiting import wait_until

MESSAGES = 10


class Gate:
    """Handlers wait here until all messages are with the worker and the broker is frozen."""

    def __init__(self, queue: str, *, is_async: bool = False) -> None:
        self.queue = queue
        self.handled: list[str] = []
        self.opened = threading.Event()
        self._is_async = is_async

    def consumer(self) -> Consumer:
        return consumer(self.queue, auto_publish=True)(self._task if self._is_async else self.act)

    def act(self, event: ReceivedEvent) -> None:
        assert self.opened.wait(30)
        enqueue_event({"of": event.id}, f"{self.queue}-next", exchange="")
        self.handled.append(event.id)

    async def _task(self, event: ReceivedEvent) -> None:
        await asyncio.to_thread(self.opened.wait, 30)
        self.act(event)


@pytest.fixture(params=[False, True], ids=["plain", "async"])
def gate(request: pytest.FixtureRequest, name: str) -> Gate:
    return Gate(name, is_async=request.param)


@contextlib.contextmanager
def frozen(
    broker: PrivateBroker, gate: Gate, *, at_a_time: int = 2, timeout: float = 30.0
) -> Iterator[tuple[Worker, Inspector]]:
    """Run a worker whose broker stops answering once it has delivered the messages."""
    name = gate.queue
    with (
        contextlib.closing(Inspector(broker.url)) as inspector,
        Publisher(broker.url, exchange=name, timeout=timeout, heartbeat=60) as publisher,
    ):
        inspector.queue(f"{name}-next", arguments={"x-queue-type": "classic"})
        worker = Worker(
            [gate.consumer()], publisher=publisher, threads=at_a_time, concurrency=at_a_time
        )
        worker.start()
        try:
            inspector.wait_for_queue(name)
            # A busy broker may nack events to a queue this young: those are kept, and retried.
            publisher.publish(events_for(publisher, [name] * MESSAGES, exchange=""))
            wait_until(lambda: worker._subscription.out(name) == MESSAGES)
            broker.pause()
            gate.opened.set()
            yield worker, inspector
        finally:
            broker.resume()
            worker.stop(10)


def test_a_thread_or_task_continues_before_the_broker_has_confirmed(
    private_broker: PrivateBroker, gate: Gate
) -> None:
    with frozen(private_broker, gate) as (worker, inspector):
        wait_until(lambda: len(gate.handled) == MESSAGES)
        private_broker.resume()
        wait_until(lambda: worker._subscription.out(gate.queue) == 0)
        assert worker.stop(10)
        assert len(set(gate.handled)) == MESSAGES
        assert inspector.all(gate.queue) == []
        follow_ons = inspector.all(f"{gate.queue}-next")
    assert sorted(one.payload["of"] for one in follow_ons) == sorted(gate.handled)


def test_a_single_thread_or_task_handles_messages_strictly_in_turn(
    private_broker: PrivateBroker, gate: Gate
) -> None:
    with frozen(private_broker, gate, at_a_time=1) as (worker, inspector):
        wait_until(lambda: len(gate.handled) == 1)
        time.sleep(0.3)
        assert len(gate.handled) == 1
        private_broker.resume()
        wait_until(lambda: worker._subscription.out(gate.queue) == 0)
        assert len(inspector.all(f"{gate.queue}-next")) == MESSAGES


def test_stopping_waits_for_the_confirms(private_broker: PrivateBroker, gate: Gate) -> None:
    with frozen(private_broker, gate) as (worker, inspector):
        wait_until(lambda: len(gate.handled) == MESSAGES)
        resuming = threading.Timer(0.5, private_broker.resume)
        resuming.start()
        assert worker.stop(20)
        resuming.join()
        assert inspector.all(gate.queue) == []
        assert len(inspector.all(f"{gate.queue}-next")) == MESSAGES


@pytest.mark.slow
def test_a_message_unconfirmed_at_the_end_of_the_grace_period_is_redelivered(
    private_broker: PrivateBroker, gate: Gate
) -> None:
    with frozen(private_broker, gate) as (worker, inspector):
        wait_until(lambda: len(gate.handled) == MESSAGES)
        begin = time.monotonic()
        assert not worker.stop(0.5)
        assert time.monotonic() - begin < 5
        private_broker.resume()
        wait_until(lambda: inspector.count(gate.queue) == MESSAGES)
        assert {one.id for one in inspector.all(gate.queue)} == set(gate.handled)


def test_a_message_not_confirmed_in_time_is_processed_again_with_the_same_follow_ons(
    private_broker: PrivateBroker, gate: Gate
) -> None:
    with frozen(private_broker, gate, timeout=0.5) as (worker, inspector):
        wait_until(lambda: len(gate.handled) == MESSAGES)
        time.sleep(1)
        private_broker.resume()
        wait_until(lambda: worker._subscription.out(gate.queue) == 0, 20)
        assert min(Counter(gate.handled).values()) >= 2
        follow_ons = inspector.all(f"{gate.queue}-next")
        assert inspector.all(gate.queue) == inspector.all(dead_letter_queue(gate.queue)) == []
    assert len({one.id for one in follow_ons}) == MESSAGES
    assert {one.payload["of"] for one in follow_ons} == set(gate.handled)


@pytest.mark.slow
def test_a_stop_does_not_wait_for_messages_that_were_not_confirmed_in_time(
    private_broker: PrivateBroker, gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    with frozen(private_broker, gate, timeout=0.2) as (worker, inspector):
        wait_until(lambda: caplog.text.count("holding message") >= 2)
        begin = time.monotonic()
        assert worker.stop(20)  # none was cut off: they are left, as every held message is
        assert time.monotonic() - begin < 10
        private_broker.resume()
        wait_until(lambda: inspector.count(gate.queue) == MESSAGES)
    assert len(gate.handled) == MESSAGES


def test_a_follow_on_that_the_broker_rejects_dead_letters_its_message(
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
    assert "a follow-on event was rejected" in (letter.headers or {})["outbox-dead-reason"]
    assert place.count(name) == 0


def test_success_is_reported_when_the_follow_ons_are_confirmed(
    private_broker: PrivateBroker, name: str
) -> None:
    succeeded: list[str] = []

    class Reporting(Gate):
        def consumer(self) -> Consumer:
            gate = self

            class Noting(Consumer):
                queue = name
                auto_publish = True

                def process(self, event: ReceivedEvent) -> None:
                    gate.act(event)

                def on_success(self, event: ReceivedEvent) -> None:
                    succeeded.append(event.id)

            return Noting()

    gate = Reporting(name)
    with frozen(private_broker, gate) as (worker, _inspector):
        wait_until(lambda: len(gate.handled) == 2)
        time.sleep(0.3)
        assert len(gate.handled) == 2
        assert succeeded == []
        private_broker.resume()
        wait_until(lambda: len(succeeded) == MESSAGES)
        wait_until(lambda: worker._subscription.out(name) == 0)
    assert set(succeeded) == set(gate.handled)
