"""The worker, consuming from a real broker."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import decimal
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from outbox import (
    ConnectionLost,
    Event,
    EventCollector,
    Publisher,
    UsageError,
    auto_publishing,
    enqueue_event,
    publish,
)
from outbox.consumers import (
    REJECT,
    REQUEUE,
    Consumer,
    ReceivedEvent,
    Reject,
    Requeue,
    Retry,
    RetryPolicy,
    Worker,
    consumer,
)
from outbox.testing.broker import PrivateBroker
from outbox.transports.rabbitmq import pika_connection
from tests.amqp import Inspector, Unwritten, properties_of
from tests.waiting import wait_until


@contextlib.contextmanager
def running(
    publisher: Publisher,
    inspector: Inspector,
    process: Callable[[ReceivedEvent], Any],
    queue: str,
    **options: Any,
) -> Iterator[Worker]:
    """Run a worker with one consumer, from the moment it consumes."""
    of_worker = {name: options.pop(name) for name in ("threads", "prefetch") if name in options}
    worker = Worker([consumer(queue, **options)(process)], publisher=publisher, **of_worker)
    inspector.clean_up(queue=queue, exchange=publisher.settings.exchange)
    inspector.clean_up(queue=f"{queue}.dead")
    worker.start()
    try:
        deadline = time.monotonic() + 10
        inspector.wait_for_queue(queue)
        while not inspector.consumers(queue):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        yield worker
    finally:
        worker.stop(10)


def as_task(act: Callable[[ReceivedEvent], Any]) -> Callable[[ReceivedEvent], Any]:
    """Return a coroutine function that does the same."""

    async def process(event: ReceivedEvent) -> Any:
        return await asyncio.to_thread(act, event)

    return process


def as_is(act: Callable[[ReceivedEvent], Any]) -> Callable[[ReceivedEvent], Any]:
    return act


on_either_engine = pytest.mark.parametrize("engine", [as_is, as_task], ids=["plain", "async"])


def send(publisher: Publisher, target: str, *payloads: Any, **options: Any) -> list[str]:
    with auto_publishing(publisher=publisher, independent=True) as block:
        ids = [enqueue_event(payload, target, **options).id for payload in payloads]
    assert block.report is not None
    assert block.report.ok, block.report
    return ids


class Seen:
    """What a consumer has seen; called as its process()."""

    def __init__(self, act: Callable[[ReceivedEvent], Any] = lambda event: None) -> None:
        self.events: list[ReceivedEvent] = []
        self._act = act
        self._arrived = threading.Condition()
        self.__qualname__ = self.__name__ = "seen"

    def __call__(self, event: ReceivedEvent) -> Any:
        with self._arrived:
            self.events.append(event)
            self._arrived.notify_all()
        return self._act(event)

    def wait(self, count: int, timeout: float = 15.0) -> list[ReceivedEvent]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.events) >= count, timeout), self.events
            return list(self.events)


def test_an_event_arrives_as_it_was_enqueued(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    seen = Seen()
    with running(publisher, inspector, seen, name, topics=["order.*"]):
        with auto_publishing(publisher=publisher):
            sent = enqueue_event({"n": 1}, "order.placed", headers={"a": 1}, key="k", priority=2)
        [event] = seen.wait(1)
    assert (event.id, event.target, event.exchange) == (sent.id, "order.placed", name)
    assert (event.payload, event.body) == ({"n": 1}, sent.body)
    assert {one: event.headers[one] for one in event.headers if one[:2] != "x-"} == {"a": 1}
    assert (event.key, event.priority, event.occurred_at) == ("k", 2, sent.occurred_at)
    assert (event.queue, event.attempt, event.redelivered) == (name, 1, False)
    assert inspector.all(name) == []
    assert inspector.all(f"{name}.dead") == []


def test_a_queue_is_bound_to_its_name_and_its_topics(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    seen = Seen()
    with running(publisher, inspector, seen, name, topics=["a.#", "*.z"]):
        send(publisher, name, 1)
        send(publisher, "a.b.c", 2)
        send(publisher, "y.z", 3)
        send(publisher, "not.for.us", 4, unroutable="ignore")
        assert sorted(event.payload for event in seen.wait(3)) == [1, 2, 3]


def test_a_topic_that_was_taken_out_is_warned_of_when_its_messages_arrive(
    publisher: Publisher, inspector: Inspector, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    with running(publisher, inspector, Seen(), name, topics=["old.*", "kept.#"]):
        pass
    seen = Seen()
    with running(publisher, inspector, seen, name, topics=["kept.#"]):
        for target in (name, "kept.a", "old.a", "old.a", "old.b"):
            send(publisher, target, 1)
        seen.wait(5)
    lines = [line for line in caplog.text.splitlines() if "beside its consumer's topics" in line]
    assert [line.split("message for ")[1].split("'")[1] for line in lines] == ["old.a", "old.b"]


@pytest.mark.hazard("G1")
def test_follow_on_events_are_confirmed_before_the_ack(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    follow_ons = inspector.queue(f"{name}-next", name, ("next",))
    acked_before = []

    def process(event: ReceivedEvent) -> None:
        enqueue_event({"of": event.payload}, "next")
        report = publish()
        acked_before.append(len(report.published))
        with pytest.raises(AssertionError):
            inspector_of_thread = Inspector(inspector._url)
            try:
                inspector_of_thread.get(name, timeout=0.1)  # unacked: not available
            finally:
                inspector_of_thread.close()

    seen = Seen(process)
    with running(publisher, inspector, seen, name):
        [sent] = send(publisher, name, 1)
        message = inspector.get(follow_ons)
    assert message.payload == {"of": 1}
    assert message.id != sent
    assert acked_before == [1]


@pytest.mark.hazard("G1")
def test_a_second_run_of_a_message_gives_its_follow_ons_the_same_ids(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    follow_ons = inspector.queue(f"{name}-next", name, ("next",))

    def process(event: ReceivedEvent) -> None:
        for n in (1, 1, 2):
            enqueue_event({"n": n}, "next")
        publish()
        if not event.redelivered:
            raise Requeue

    seen = Seen(process)
    with running(publisher, inspector, seen, name):
        send(publisher, name, "x")
        seen.wait(2)
        ids = [message.id for message in inspector.messages(follow_ons, 6)]
    assert ids[:3] == ids[3:]
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    ("act", "reason", "error"),
    [
        (lambda event: REJECT, "rejected by the consumer", None),
        (lambda event: _raise(Reject("no such customer")), "no such customer", "Reject"),
        (lambda event: _raise(ValueError("broken")), "ValueError: broken", "ValueError"),
        (lambda event: "done", "TypeError: process() returned 'done'", "TypeError"),
        (lambda event: enqueue_event({}, "x") and None, "UnpublishedEvents", "UnpublishedEvents"),
    ],
    ids=["REJECT", "Reject", "exception", "wrong return", "unpublished"],
)
def test_a_message_that_cannot_be_handled_is_dead_lettered_with_the_reason(
    publisher: Publisher,
    inspector: Inspector,
    name: str,
    act: Callable[[ReceivedEvent], Any],
    reason: str,
    error: str | None,
) -> None:
    with running(publisher, inspector, Seen(act), name, topics=["order.*"]):
        [sent] = send(publisher, "order.placed", {"n": 1}, headers={"tenant": "acme"})
        letter = inspector.get(f"{name}.dead")
    headers = letter.properties.headers
    assert letter.id == sent
    assert letter.payload == {"n": 1}
    assert letter.properties.delivery_mode == 2
    assert headers["tenant"] == "acme"
    assert reason in headers["outbox-dead-reason"]
    assert headers.get("outbox-dead-error") == error
    assert headers["outbox-dead-queue"] == name
    assert headers["outbox-dead-target"] == "order.placed"
    assert headers["outbox-dead-exchange"] == name
    assert inspector.all(name) == []
    assert inspector.all(f"{name}.dead") == []


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.hazard("G5")
def test_events_of_a_failed_message_are_dropped_and_the_next_one_has_only_its_own(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    follow_ons = inspector.queue(f"{name}-next", name, ("next",))

    def process(event: ReceivedEvent) -> None:
        enqueue_event(event.payload, "next")
        if event.payload == "bad":
            raise ValueError
        publish()

    with running(publisher, inspector, Seen(process), name, threads=1):
        send(publisher, name, "bad", "good")
        inspector.get(f"{name}.dead")
        assert [m.payload for m in inspector.messages(follow_ons, 1)] == ["good"]
        assert inspector.all(follow_ons) == []


@pytest.mark.hazard("G2", "H6")
@pytest.mark.parametrize(
    ("body", "properties", "reason"),
    [
        (b"{not json", {"content_type": "application/json"}, "its body is not"),
        (b"\xff\xfe", {}, "its body is not"),
        (b"NaN", {}, "its body is not"),
        (b"[" * 100_000, {}, "its body is not"),
        (b"cos\nsystem\n", {"content_type": "application/x-python-serialize"}, "no serializer is"),
        (b"{}", {"content_encoding": "gzip"}, "content encoding"),
    ],
    ids=["json", "utf-8", "NaN", "deep", "pickle", "gzip"],
)
def test_an_undecodable_message_is_dead_lettered_unchanged(
    publisher: Publisher,
    inspector: Inspector,
    name: str,
    body: bytes,
    properties: dict[str, Any],
    reason: str,
) -> None:
    seen = Seen()
    with running(publisher, inspector, seen, name):
        sent = properties_of(message_id="m-1", headers={"mine": 1}, **properties)
        inspector.publish(name, body, properties=sent)
        letter = inspector.get(f"{name}.dead")
        send(publisher, name, "good")
        assert seen.wait(1)[0].payload == "good"
    assert letter.body == body
    assert letter.id == "m-1"
    assert letter.properties.headers["mine"] == 1
    assert reason in letter.properties.headers["outbox-dead-reason"]


@pytest.mark.hazard("H9")
def test_messages_of_other_clients_are_consumed_whatever_properties_they_lack(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    seen = Seen()
    with running(publisher, inspector, seen, name):
        inspector.publish(name, b'{"a": 1}')
        odd = properties_of(
            headers={"outbox-key": 5, "outbox-attempt": "x", "outbox-occurred-at-us": 1 << 62},
            timestamp=1 << 40,
        )
        inspector.publish(name, b"2", properties=odd)
        events = seen.wait(2)
    assert sorted(json.dumps(event.payload) for event in events) == ["2", '{"a": 1}']
    assert all(event.id and event.attempt == 1 and event.key is None for event in events)
    assert all(event.occurred_at.tzinfo for event in events)


@pytest.mark.hazard("C6", "G2")
def test_a_requeued_message_is_redelivered_after_a_pause_and_not_in_a_loop(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    times = []

    def process(event: ReceivedEvent) -> Any:
        times.append(time.monotonic())
        return REQUEUE if len(times) < 2 else None

    seen = Seen(process)
    with running(publisher, inspector, seen, name):
        send(publisher, name, 1)
        first, second = seen.wait(2)
    assert second.redelivered
    assert second.attempt == first.attempt == 1
    assert 0.9 < times[1] - times[0] < 3


def test_auto_publish_publishes_the_events_of_a_successful_message(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    follow_ons = inspector.queue(f"{name}-next", name, ("next",))

    def process(event: ReceivedEvent) -> None:
        with auto_publishing() as block:
            enqueue_event(event.payload, "next")
        assert block.joined
        if event.payload == "bad":
            raise ValueError

    with running(publisher, inspector, Seen(process), name, auto_publish=True):
        send(publisher, name, "bad", "good")
        inspector.get(f"{name}.dead")
        assert inspector.get(follow_ons).payload == "good"
        assert inspector.all(follow_ons) == []


def test_a_block_in_an_explicit_consumer_publishes_at_its_end_with_derived_ids(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    follow_ons = inspector.queue(f"{name}-next", name, ("next",))

    def process(event: ReceivedEvent) -> None:
        with auto_publishing() as block:
            enqueue_event({}, "next")
        assert not block.joined
        if not event.redelivered:
            raise Requeue

    seen = Seen(process)
    with running(publisher, inspector, seen, name):
        send(publisher, name, 1)
        seen.wait(2)
        first, second = inspector.messages(follow_ons, 2)
    assert first.id == second.id


@pytest.mark.hazard("A15", "B9")
@pytest.mark.one_python
@pytest.mark.parametrize("is_async", [False, True], ids=["plain", "async"])
def test_a_handler_that_outlasts_the_heartbeat_runs_once(
    amqp_url: str, inspector: Inspector, name: str, is_async: bool
) -> None:
    seen = Seen(lambda event: time.sleep(4))

    async def block_the_loop(event: ReceivedEvent) -> None:
        seen(event)

    with Publisher(amqp_url, exchange=name, heartbeat=1) as publisher:
        with running(publisher, inspector, block_the_loop if is_async else seen, name):
            send(publisher, name, 1)
            seen.wait(1)
            time.sleep(4.5)
        assert len(seen.events) == 1
    assert inspector.all(name) == []


@pytest.mark.hazard("A6")
@pytest.mark.parametrize("with_pika_alone", [False, True])
def test_a_thousand_messages_are_handled_once_each_by_eight_threads(
    publisher: Publisher,
    inspector: Inspector,
    name: str,
    with_pika_alone: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if with_pika_alone:
        monkeypatch.delattr(pika_connection.Connection, "_on_data_available")
    seen = Seen(lambda event: time.sleep(0.0005))
    with running(publisher, inspector, seen, name, threads=8):
        sent = send(publisher, name, *range(1000))
        events = seen.wait(1000)
    assert sorted(event.id for event in events) == sorted(sent)
    assert inspector.all(name) == []


@pytest.mark.hazard("G3")
def test_stopping_finishes_running_messages_and_gives_back_the_rest(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    seen = Seen(lambda event: time.sleep(0.7))
    with running(publisher, inspector, seen, name, threads=4) as worker:
        send(publisher, name, *range(10))
        seen.wait(4)
        assert worker.stop(10)
    assert len(seen.events) == 4
    left = inspector.messages(name, 6)
    assert len(left) == 6
    assert {m.id for m in left}.isdisjoint(event.id for event in seen.events)
    assert inspector.all(name) == []


def test_a_consumer_that_raises_system_exit_has_failed_and_the_worker_continues(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    def process(event: ReceivedEvent) -> None:
        if event.payload == "exit":
            raise SystemExit(3)

    seen = Seen(process)
    with running(publisher, inspector, seen, name, threads=1):
        send(publisher, name, "exit", "fine")
        seen.wait(2)
        letter = inspector.get(f"{name}.dead")
    assert letter.properties.headers["outbox-dead-reason"] == "SystemExit: 3"
    assert inspector.all(name) == []


@pytest.mark.hazard("A14", "B10")
@on_either_engine
def test_a_deleted_queue_is_redeclared_and_consumed(
    publisher: Publisher, inspector: Inspector, name: str, engine: Any
) -> None:
    seen = Seen()
    with running(publisher, inspector, engine(seen), name):
        inspector.channel.queue_delete(name)
        deadline = time.monotonic() + 10
        inspector.wait_for_queue(name)
        while not inspector.consumers(name):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        send(publisher, name, 1)
        seen.wait(1)


@pytest.mark.hazard("C9", "C16")
@pytest.mark.parametrize("kind", ["classic", "stream"])
def test_a_queue_with_other_arguments_is_reported_by_the_name_of_the_argument(
    publisher: Publisher, inspector: Inspector, name: str, kind: str
) -> None:
    inspector.queue(name, arguments={"x-queue-type": kind})
    inspector.clean_up(queue=f"{name}.dead", exchange=name)
    worker = Worker([consumer(name)(lambda event: None)], publisher=publisher)
    worker.start()
    try:
        with pytest.raises(UsageError, match="inequivalent arg 'x-"):
            worker.wait(10)
    finally:
        worker.stop(5)
    assert publisher.publish([Event(id="1", target=name, exchange="", body=b"1")]).ok


@pytest.mark.hazard("B11")
@pytest.mark.one_python
@on_either_engine
@pytest.mark.slow
def test_a_worker_survives_the_restart_of_its_broker_and_loses_nothing(
    private_broker: PrivateBroker, name: str, engine: Any
) -> None:
    inspector = Inspector(private_broker.url)
    follow_ons = inspector.queue(
        f"{name}-next", name, ("next",), arguments={"x-queue-type": "classic"}
    )

    def process(event: ReceivedEvent) -> None:
        enqueue_event(event.payload, "next")
        publish()

    seen = Seen(process)
    with Publisher(private_broker.url, exchange=name, drain_timeout=30) as publisher:
        with running(publisher, inspector, engine(seen), name, threads=4):
            time.sleep(1.5)  # until the broker has the queues on disk
            sent = send(publisher, name, *range(100))
            seen.wait(20)
            private_broker.restart()
            with auto_publishing(publisher=publisher):  # kept, until the connection is back
                sent += [enqueue_event(n, name).id for n in range(100, 150)]
            arrived: dict[str, Any] = {}
            deadline = time.monotonic() + 30
            while len(arrived) < 150 and time.monotonic() < deadline:
                arrived.update((m.id, m.payload) for m in inspector.messages(follow_ons, 1, 1))
    assert sorted(arrived.values()) == list(range(150))
    assert {event.id for event in seen.events} == set(sent)
    assert inspector.all(f"{name}.dead") == []
    inspector._queues.clear()
    inspector._exchanges.clear()
    inspector.close()


class Explicit(Consumer):
    queue = "explicit"

    def process(self, event: ReceivedEvent) -> None: ...


class Unfinished(Consumer):
    queue = "unfinished"


def test_wrong_consumers_are_refused_where_they_are_defined() -> None:
    with pytest.raises(UsageError, match=r"topics are 'a\.\*', not a list"):
        consumer("q", topics="a.*")(lambda event: None)
    with pytest.raises(UsageError, match="250 bytes"):
        consumer("q" * 251)(lambda event: None)
    with pytest.raises(UsageError, match="names no queue"):
        consumer("")(lambda event: None)
    publisher = Publisher("amqp://127.0.0.1:1/")
    with pytest.raises(UsageError, match="two consumers have the queue 'explicit'"):
        Worker([Explicit, Explicit], publisher=publisher)
    with pytest.raises(UsageError, match="at least one consumer"):
        Worker([], publisher=publisher)
    with pytest.raises(UsageError, match=r"the consumer Unfinished has no process\(\)"):
        Worker([Unfinished], publisher=publisher)
    forgetful: Any = type("Forgetful", (Unfinished,), {"process": lambda self: None})
    with pytest.raises(UsageError, match=r"Forgetful must take one argument, the event, not \(\)"):
        Worker([forgetful], publisher=publisher)
    alone: Any = lambda: None  # noqa: E731
    with pytest.raises(UsageError, match="must take one argument"):
        Worker([consumer("alone")(alone)], publisher=publisher)
    with pytest.raises(UsageError, match="which no consumer has"):
        Worker([Explicit], publisher=publisher, ranks={"typo": 1})
    with pytest.raises(UsageError, match="threads is '8'"):
        Worker([Explicit], publisher=publisher, threads="8")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="threads is 0"):
        Worker([Explicit], publisher=publisher, threads=0)
    with pytest.raises(UsageError, match="cannot be consumed from"):
        Worker([Explicit], publisher=Publisher("memory://"))
    assert EventCollector()


@pytest.mark.hazard("A14")
def test_a_connection_lost_while_a_cancelled_consumer_waits_leaves_one_consumer(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    seen = Seen()
    with running(publisher, inspector, seen, name, threads=2) as worker:
        subscription: Any = worker._subscription
        consuming = subscription._consumers[name]
        consuming._failures = 2  # as after earlier ones: consuming again waits 1 to 2 seconds
        inspector.channel.queue_delete(name)
        deadline = time.monotonic() + 10
        while worker.is_consuming:  # the broker's cancel has arrived
            assert time.monotonic() < deadline
            time.sleep(0.001)
        lost = ConnectionLost("as if the broker had gone")
        subscription._link.call(lambda: subscription._link.fail(lost))
        time.sleep(2.5)
        assert inspector.consumers(name) == 1
        sent = send(publisher, name, *range(200))
        seen.wait(200)
    assert {event.id for event in seen.events} == set(sent)
    assert inspector.all(name) == []


@pytest.mark.hazard("H6")
@pytest.mark.parametrize("what", ["timestamp", "depth"])
def test_a_message_with_unreadable_properties_blocks_no_others(
    publisher: Publisher, inspector: Inspector, name: str, what: str
) -> None:
    value: Any = Unwritten(b"T" + b"\x7f" * 8)
    if what == "depth":
        table = b""
        for _ in range(2_000):
            table = b"\x01aF" + len(table).to_bytes(4, "big") + table
        value = Unwritten(b"F" + len(table).to_bytes(4, "big") + table)
    seen = Seen()
    with running(publisher, inspector, seen, name):
        with Unwritten.written():
            inspector.publish(name, b'{"n": 1}', properties=properties_of(headers={"odd": value}))
        [good] = send(publisher, name, "good")
        assert seen.wait(1)[0].id == good
        letter = inspector.get(f"{name}.dead")
    assert letter.body == b'{"n": 1}'
    assert "unreadable-properties" in letter.properties.headers["outbox-dead-reason"]


def test_a_message_whose_properties_are_not_text_is_dead_lettered_like_others(
    publisher: Publisher, inspector: Inspector, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is logged cannot be written in UTF-8 either, as pytest's workers write their reports.
    monkeypatch.setattr(logging.getLogger("outbox.consumer"), "propagate", False)

    def process(event: ReceivedEvent) -> None:
        enqueue_event({}, "x")
        raise ValueError("\udc80")

    with running(publisher, inspector, Seen(process), name):
        odd = properties_of(
            message_id=b"\xff\xfe",
            headers={
                "at": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
                "price": decimal.Decimal("1.5"),
            },
        )
        inspector.publish(name, b"{}", properties=odd)
        letter = inspector.get(f"{name}.dead")
        assert letter.payload == {}
    assert letter.id == "\ufffd\ufffd"
    assert letter.properties.headers["price"] == "1.5"
    assert letter.properties.headers["at"] == "2026-01-02T00:00:00+00:00"


@pytest.mark.hazard("C6", "C7", "H9")
def test_a_senders_requests_to_the_broker_are_not_copied_from_its_message(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    follow_ons = inspector.queue(f"{name}-next", name, ("next",))
    other = inspector.queue(f"{name}-other")

    def process(event: ReceivedEvent) -> None:
        assert "CC" not in event.headers
        if event.attempt == 1:
            raise Retry
        enqueue_event(1, "next")
        publish()
        raise Reject("seen")

    with running(publisher, inspector, process, name, retry=RetryPolicy(delay=0)):
        inspector.publish(
            name,
            b"1",
            properties=properties_of(
                headers={"CC": [other], "x-death": [{"count": 3}], "tenant": 7},
                reply_to="amq.rabbitmq.reply-to.x",
                correlation_id="c" * 255,
                expiration="60000",
                priority=5,
                message_id="m",
            ),
        )
        assert inspector.get(other).id == "m"  # that was the broker, once
        follow_on = inspector.get(follow_ons)
        letter = inspector.get(f"{name}.dead")
    assert inspector.all(other) == []
    for one in (follow_on, letter):
        found = one.properties
        assert {"CC", "BCC", "x-death"} & found.headers.keys() == set()
        assert (found.reply_to, found.correlation_id, found.expiration) == (None, None, None)
    assert letter.properties.headers["tenant"] == 7
    assert letter.properties.headers["outbox-attempt"] == 2
    assert follow_on.properties.priority is None


@pytest.mark.hazard("G6")
def test_with_a_prefetch_of_one_two_workers_share_evenly(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    one, other = (Seen(lambda event: time.sleep(0.02)) for _ in range(2))
    with running(publisher, inspector, one, name, threads=1, prefetch=1):
        with running(publisher, inspector, other, name, threads=1, prefetch=1):
            deadline = time.monotonic() + 10
            while inspector.consumers(name) < 2:
                assert time.monotonic() < deadline
                time.sleep(0.02)
            send(publisher, name, *range(40))
            while len(one.events) + len(other.events) < 40:
                assert time.monotonic() < deadline
                time.sleep(0.02)
    assert 12 <= len(one.events) <= 28


def test_all_attempts_at_a_message_without_an_id_see_the_same_id(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    seen: list[tuple[str, str]] = []

    def fail(event: ReceivedEvent) -> None:
        seen.append((event.id, enqueue_event({}, "next").id))
        raise ValueError

    with running(publisher, inspector, fail, name, retry=RetryPolicy(max_attempts=2, delay=0)):
        inspector.channel.basic_publish("", name, b"{}")
        letter = inspector.get(f"{name}.dead")
    assert seen == [seen[0]] * 2
    assert letter.id == seen[0][0]


@pytest.mark.slow
def test_a_worker_reports_whether_it_is_consuming(private_broker: PrivateBroker, name: str) -> None:
    private_broker.kill()
    with Publisher(private_broker.url, exchange=name) as publisher:
        worker = Worker([consumer(name)(print)], publisher=publisher)
        worker.start()
        try:
            time.sleep(0.3)
            assert not worker.is_consuming
            private_broker.start()
            wait_until(lambda: worker.is_consuming, 30)
            private_broker.kill()
            wait_until(lambda: not worker.is_consuming)
        finally:
            assert worker.stop(10)
