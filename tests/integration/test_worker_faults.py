"""Faults of the network and the broker on a worker, frame by frame."""

from __future__ import annotations

import asyncio
import contextvars
import logging
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from outbox import Publisher, enqueue_event, publish
from outbox.consumers import REQUEUE, ReceivedEvent
from proving.proxy import BLOCKED, UNBLOCKED, FaultProxy, Frame, Way, channel_close, method_frame
from tests.amqp import Inspector
from tests.integration.test_worker import Seen, on_either_engine, running, send
from tests.waiting import wait_until


@pytest.fixture
def through_proxy(proxy: FaultProxy, name: str) -> Iterator[Publisher]:
    """A publisher with its own exchange; a worker that uses it goes through the proxy."""
    with Publisher(proxy.url, exchange=name) as found:
        yield found


def follow(event: ReceivedEvent) -> None:
    enqueue_event({"of": event.payload}, "next")
    publish()


def at(way: Way, class_id: int, method_id: int, channel: int | None = None) -> Any:
    """Return a rule for the first frame of a method."""

    def rule(frame: Frame) -> bool:
        here = frame.way is way and frame.method == (class_id, method_id)
        return here and channel in (None, frame.channel)

    return rule


def behind(first: Callable[[Frame], bool], kind: int) -> Callable[[Frame], bool]:
    """Return a rule for the next frame of that kind behind one that ``first`` names."""
    begun: list[tuple[Way, int]] = []

    def rule(frame: Frame) -> bool:
        if first(frame):
            begun.append((frame.way, frame.channel))
            return False
        return bool(begun) and frame.kind == kind and (frame.way, frame.channel) == begun[0]

    return rule


DELIVERY = at(Way.DOWN, 60, 60)
POINTS: dict[str, Callable[[], Callable[[Frame], bool]]] = {
    "before the delivery": lambda: DELIVERY,
    "between its method and its header": lambda: behind(DELIVERY, 2),
    "between its header and its body": lambda: behind(DELIVERY, 3),
    "at the follow-on's publish": lambda: at(Way.UP, 60, 40),
    "between its method and its body": lambda: behind(at(Way.UP, 60, 40), 3),
    "at the follow-on's confirm": lambda: at(Way.DOWN, 60, 80),
    "at the ack": lambda: at(Way.UP, 60, 80),
}


@pytest.mark.hazard("G1")
@pytest.mark.parametrize("auto_publish", [False, True], ids=["explicit", "auto"])
@pytest.mark.parametrize("point", POINTS)
def test_wherever_the_link_is_lost_a_message_is_handled_and_its_follow_on_keeps_its_id(
    proxy: FaultProxy,
    through_proxy: Publisher,
    publisher: Publisher,
    inspector: Inspector,
    name: str,
    point: str,
    auto_publish: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "outbox.consumer")
    follow_ons = inspector.queue(f"{name}-next", name, ("next",))
    generations: dict[str, int] = {}

    def process(event: ReceivedEvent) -> None:
        enqueue_event({"of": event.payload}, "next")
        if not auto_publish:
            publish()
        generations[event.id] = subscription._consumers[name].generation

    with running(through_proxy, inspector, process, name, auto_publish=auto_publish) as worker:
        subscription: Any = worker._subscription
        before = subscription._consumers[name].generation
        assert through_proxy.publish([]).ok
        cut = proxy.cut_at(POINTS[point]())
        sent = send(publisher, name, 1, 2, 3)
        assert cut.wait(10)
        # No ack has arrived yet: over the next connection, what is done must be acked once more,
        # and all others must be done.
        wait_until(
            lambda: (
                sum(one > before for one in generations.values()) + caplog.text.count("acked again")
                >= 3
            ),
            15,
        )
        assert len(generations) == 3
        wait_until(lambda: subscription.out(name) == 0, 15)
        assert worker.stop(10)
    assert set(generations) == set(sent)
    by_payload: dict[int, set[str]] = {}
    for message in inspector.all(follow_ons):
        by_payload.setdefault(message.payload["of"], set()).add(message.id)
    assert [len(by_payload[n]) for n in (1, 2, 3)] == [1, 1, 1]
    assert inspector.all(name) == []
    assert inspector.all(f"{name}.dead") == []


@pytest.mark.hazard("A16")
def test_acks_of_handlers_that_outlived_their_connection_settle_no_new_delivery(
    proxy: FaultProxy,
    through_proxy: Publisher,
    publisher: Publisher,
    inspector: Inspector,
    name: str,
) -> None:
    go_on, held = threading.Event(), threading.Event()

    def process(event: ReceivedEvent) -> None:
        # The first ones wait until the connection is gone, the others until they are looked at.
        (held if event.payload >= 5 else go_on).wait(20)

    seen = Seen(process)
    with running(through_proxy, inspector, seen, name, threads=10) as worker:
        subscription: Any = worker._subscription
        sent = send(publisher, name, *range(5))
        seen.wait(5)
        proxy.cut()
        # Redelivered, with the numbers 1 to 5 of another channel, they wait for the first run.
        wait_until(lambda: subscription.out(name) == 5)
        sent += send(publisher, name, *range(5, 10))
        seen.wait(10)
        go_on.set()
        wait_until(lambda: subscription.out(name) == 5)
        settled = threading.Event()
        subscription._link.call(lambda: subscription._link.later(0.2, settled.set))
        assert settled.wait(5)
        assert inspector.consumers(name) == 1  # no channel was closed over an unknown number
        assert subscription.out(name) == 5
        held.set()
        wait_until(lambda: subscription.out(name) == 0)
        assert worker.stop(10)
    assert Counter(event.id for event in seen.events) == Counter(sent)
    assert inspector.all(name) == []


@pytest.mark.hazard("A14", "B10", "B11", "C8")
@on_either_engine
def test_a_consumer_cancelled_by_the_broker_consumes_again_and_drops_its_late_ack(
    proxy: FaultProxy,
    through_proxy: Publisher,
    publisher: Publisher,
    inspector: Inspector,
    name: str,
    engine: Any,
) -> None:
    go_on = threading.Event()
    seen = Seen(lambda event: None if go_on.wait(20) else REQUEUE)
    with running(through_proxy, inspector, engine(seen), name, threads=2) as worker:
        subscription: Any = worker._subscription
        channel = subscription._consumers[name].channel
        [tag] = channel.consumer_tags
        before = subscription._consumers[name].generation
        [first] = send(publisher, name, "first")
        seen.wait(1)
        text = tag.encode()
        cancel = method_frame(channel.channel_number, 60, 30, bytes([len(text)]) + text + b"\x01")
        proxy.inject(cancel, to="consumer")
        wait_until(lambda: subscription._consumers[name].generation > before)
        wait_until(lambda: subscription.out(name) == 1)  # redelivered
        [second] = send(publisher, name, "second")
        assert [event.id for event in seen.wait(2)] == [first, second]
        go_on.set()
        wait_until(lambda: subscription.out(name) == 0)
        assert len(seen.events) == 2
    assert inspector.all(name) == []


@pytest.mark.hazard("C5")
def test_a_worker_whose_publisher_is_blocked_still_acks_messages_without_follow_ons(
    proxy: FaultProxy,
    through_proxy: Publisher,
    publisher: Publisher,
    inspector: Inspector,
    name: str,
) -> None:
    follow_ons = inspector.queue(f"{name}-next", name, ("next",))

    def process(event: ReceivedEvent) -> None:
        if event.payload == "publishes":
            follow(event)

    seen = Seen(process)
    with running(through_proxy, inspector, seen, name, threads=2) as worker:
        subscription: Any = worker._subscription
        wait_until(lambda: through_proxy.connected)
        proxy.inject(BLOCKED, to="publisher")
        wait_until(lambda: not through_proxy.connected)
        send(publisher, name, "publishes", *range(20))
        seen.wait(21)
        acks = subscription._consumers[name].acks
        wait_until(lambda: len(acks._settled) + acks._lowest - 1 == 20)
        proxy.inject(UNBLOCKED, to="publisher")
        assert inspector.get(follow_ons).payload == {"of": "publishes"}
        assert worker.stop(10)
    assert inspector.all(follow_ons) == []
    assert inspector.all(name) == []


@pytest.mark.hazard("G5")
def test_a_message_does_not_see_context_variables_of_the_one_before(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    variable = contextvars.ContextVar("variable", default="nothing")
    found: list[str] = []

    def process(event: ReceivedEvent) -> None:
        found.append(variable.get())
        variable.set(event.payload)

    seen = Seen(process)
    with running(publisher, inspector, seen, name, threads=1):
        send(publisher, name, "first", "second")
        seen.wait(2)
    assert found == ["nothing", "nothing"]


@pytest.mark.hazard("B9", "G1")
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_an_attempt_that_fails_after_its_delivery_is_lost_leaves_the_message_to_the_next(
    proxy: FaultProxy,
    through_proxy: Publisher,
    publisher: Publisher,
    inspector: Inspector,
    name: str,
    is_async: bool,
) -> None:
    again = threading.Event()

    def process(event: ReceivedEvent) -> None:
        if event.redelivered:
            again.set()
            return
        before = consuming.generation
        proxy.cut()
        wait_until(lambda: subscription.out(name) == 1 and consuming.generation > before)
        wait_until(lambda: through_proxy.connected)
        assert not again.is_set()
        raise ValueError("too late")

    async def process_as_task(event: ReceivedEvent) -> None:
        await asyncio.to_thread(process, event)

    found: Any = process_as_task if is_async else process
    with running(through_proxy, inspector, found, name, threads=2) as worker:
        subscription: Any = worker._subscription
        consuming = subscription._consumers[name]
        send(publisher, name, 1)
        assert again.wait(10)
        assert worker.stop(10)
    assert inspector.all(name) == []
    assert inspector.all(f"{name}.dead") == []


@pytest.mark.hazard("B9", "C8")
@on_either_engine
def test_a_channel_that_the_broker_closes_over_a_late_ack_is_reopened(
    proxy: FaultProxy,
    through_proxy: Publisher,
    publisher: Publisher,
    inspector: Inspector,
    name: str,
    engine: Any,
) -> None:
    go_on = threading.Event()

    def process(event: ReceivedEvent) -> None:
        if event.payload == "first" and not event.redelivered:
            go_on.wait(20)

    seen = Seen(process)
    with running(through_proxy, inspector, engine(seen), name, threads=2) as worker:
        subscription: Any = worker._subscription
        [first] = send(publisher, name, "first")
        seen.wait(1)
        text = "PRECONDITION_FAILED - delivery acknowledgement on channel 1 timed out"
        close = channel_close(406, text, subscription._consumers[name].channel.channel_number)
        # The broker has forgotten its own half of the channel: a new one has another number.
        proxy.inject(close, to="consumer")
        wait_until(lambda: worker.is_consuming and inspector.consumers(name) >= 1)
        go_on.set()
        [second] = send(publisher, name, "second")
        wait_until(lambda: second in {event.id for event in seen.events}, 15)
        assert worker.stop(10)
    assert {event.id for event in seen.events} == {first, second}
    assert inspector.all(f"{name}.dead") == []
