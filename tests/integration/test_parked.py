"""Browsing and emptying parking and dead-letter queues of a real broker."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from outbox import (
    BrokerError,
    ConnectFailed,
    ConnectionLost,
    Event,
    Publisher,
    UsageError,
    auto_publishing,
    enqueue_event,
)
from outbox.consumers import ReceivedEvent, Reject, Worker, consumer
from outbox.messages.dead_letters import parked
from outbox.messages.parked_message import ParkedMessage, ReplayResult
from outbox.settings import Settings
from outbox.testing.broker import PrivateBroker
from outbox.transports.parked_queues import ParkedQueues
from outbox.transports.rabbitmq import pika_connection
from outbox.transports.rabbitmq.parameters import connection_parameters
from outbox.transports.registry import open_parked_queues
from outbox.url import BrokerURL
from tests.amqp import Inspector, Unwritten, properties_of

pytestmark = pytest.mark.one_python

TYPES = ["quorum", "classic"]


@contextlib.contextmanager
def opened(url: str, **settings: Any) -> Iterator[ParkedQueues]:
    with open_parked_queues(Settings.load(url, settings)) as found:
        yield found


@pytest.fixture
def queues(amqp_url: str) -> Iterator[ParkedQueues]:
    with opened(amqp_url) as found:
        yield found


@pytest.fixture
def dead(inspector: Inspector, name: str) -> str:
    """An empty dead-letter queue."""
    return inspector.queue(f"{name}.dead")


def park(url: str, queue: str, events: Sequence[Event]) -> None:
    """Put ``events`` into ``queue`` as a publisher parks what is unroutable."""
    letters = [parked(event, "312 NO_ROUTE") for event in events]
    moved = [
        Event(id=one.id, target=queue, exchange="", body=one.body, headers=one.headers, key=one.key)
        for one in letters
    ]
    with Publisher(url, declare="never") as publisher:
        report = publisher.publish(moved, timeout=30)
        assert len(report.published) == len(events), report


def put(inspector: Inspector, queue: str, body: bytes, **properties: Any) -> None:
    """Put a message into ``queue`` as some other client would, and see that it is there."""
    before = inspector.count(queue)
    inspector.publish(queue, body, properties=properties_of(**properties))
    wait_until(lambda: inspector.count(queue) > before)


def made(count: int, exchange: str, target: str = "order.placed") -> list[Event]:
    return [
        Event(id=str(n), target=target, exchange=exchange, body=b'{"n": %d}' % n)
        for n in range(count)
    ]


def ids(messages: Sequence[Any]) -> list[str]:
    return [one.id for one in messages]


def replay_all(queues: ParkedQueues, queue: str, **options: Any) -> ReplayResult:
    """Replay what is in ``queue`` now."""
    done: list[ParkedMessage] = []
    left: list[tuple[ParkedMessage, str]] = []
    with queues.browse(queue, queues.count(queue)) as browsing:
        for window in browsing.windows():
            outcome = queues.replay(window, **{"to_origin": False, **options})
            assert outcome.error is None
            browsing.remove(outcome.done)
            done += outcome.done
            left += outcome.left
    return ReplayResult(tuple(done), tuple(left))


@pytest.mark.parametrize("kind", TYPES)
def test_browsing_removes_nothing_and_keeps_the_order(
    queues: ParkedQueues, inspector: Inspector, amqp_url: str, name: str, kind: str
) -> None:
    queue = inspector.queue(f"{name}.dead", arguments={"x-queue-type": kind})
    park(amqp_url, queue, made(1_500, name))
    for bound in (50, 1_300):
        with queues.browse(queue, bound) as browsing:
            seen = [message for window in browsing.windows() for message in window]
        assert ids(seen) == [str(n) for n in range(bound)]
    assert queues.count(queue) == 1_500
    assert ids(inspector.messages(queue, 1_500)) == [str(n) for n in range(1_500)]


@pytest.mark.parametrize("kind", TYPES)
def test_only_removed_messages_are_gone_and_the_rest_stay_in_order(
    queues: ParkedQueues, inspector: Inspector, amqp_url: str, name: str, kind: str
) -> None:
    queue = inspector.queue(f"{name}.dead", arguments={"x-queue-type": kind})
    park(amqp_url, queue, made(1_500, name))
    with queues.browse(queue, 1_400) as browsing:
        for window in browsing.windows():
            browsing.remove([message for message in window if int(message.id) % 3])
    left = [str(n) for n in range(1_500) if n >= 1_400 or not n % 3]
    assert queues.count(queue) == len(left)
    assert ids(inspector.messages(queue, len(left))) == left


def test_all_messages_returned_by_nack_to_a_newer_broker_are_there(
    queues: ParkedQueues,
    inspector: Inspector,
    amqp_url: str,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pika_connection.BlockingConnection, "version", (4, 3))
    queue = inspector.queue(f"{name}.dead", arguments={"x-queue-type": "classic"})
    park(amqp_url, queue, made(300, name))
    with queues.browse(queue, 250) as browsing:
        for window in browsing.windows():
            browsing.remove(window[:10])
    left = [str(n) for n in range(300) if n not in (*range(10), *range(100, 110))]
    assert ids(inspector.messages(queue, len(left))) == left


def test_the_brokers_version_is_known(amqp_url: str) -> None:
    parameters = connection_parameters(BrokerURL.parse(amqp_url), Settings(), "test")
    connection = pika_connection.BlockingConnection(parameters[0])
    assert (3, 10) <= connection.version < (100, 0)
    connection.close()


def test_a_connection_that_ends_in_the_middle_loses_nothing(
    inspector: Inspector, amqp_url: str, dead: str, name: str
) -> None:
    park(amqp_url, dead, made(300, name))
    with pytest.raises(KeyboardInterrupt), opened(amqp_url) as queues:
        with queues.browse(dead, 300) as browsing:
            for window in browsing.windows():
                browsing.remove(window[:10])
                raise KeyboardInterrupt
    assert sorted(map(int, ids(inspector.messages(dead, 290)))) == list(range(10, 300))


@pytest.mark.slow
def test_thousands_of_messages_are_replayed_in_order_in_a_few_seconds(
    queues: ParkedQueues, inspector: Inspector, amqp_url: str, dead: str, name: str
) -> None:
    park(amqp_url, dead, made(5_000, name))
    target = inspector.queue(name, name, arguments={"x-queue-type": "classic"})
    started = time.monotonic()
    outcome = replay_all(queues, dead)
    assert time.monotonic() - started < 10  # one by one, confirmed, they take far longer
    assert (len(outcome.done), outcome.left) == (5_000, ())
    assert ids(inspector.messages(target, 5_000)) == [str(n) for n in range(5_000)]
    assert inspector.all(dead) == []


def test_only_messages_the_broker_does_not_accept_stay_with_the_reason(
    queues: ParkedQueues, inspector: Inspector, amqp_url: str, dead: str, name: str
) -> None:
    classic = {"x-queue-type": "classic"}
    target = inspector.queue(name, name, ("order.*",), arguments=classic)
    full = {"x-max-length": 1, "x-overflow": "reject-publish", **classic}
    put(inspector, inspector.queue(f"{name}-full", name, ("full",), full), b"fills it")
    bad = {
        3: Event(id="3", target="nobody", exchange=name, body=b""),
        5: Event(id="5", target="x", exchange=f"{name}-missing", body=b""),
        7: Event(id="7", target="full", exchange=name, body=b""),
        8: Event(id="8", target="x", exchange=f"{name}-missing", body=b""),
    }
    park(amqp_url, dead, [bad.get(n, event) for n, event in enumerate(made(12, name))])
    put(inspector, dead, b"foreign", message_id="foreign")
    outcome = replay_all(queues, dead)
    good = [str(n) for n in range(12) if n not in bad]
    assert ids(outcome.done) == good
    reasons = {message.id: reason for message, reason in outcome.left}
    assert reasons.keys() == {"3", "5", "7", "8", "foreign"}
    assert "312 NO_ROUTE" in reasons["3"]
    assert f"no exchange '{name}-missing'" in reasons["5"]
    assert "basic.nack" in reasons["7"]
    assert "no header that says" in reasons["foreign"]
    assert ids(inspector.messages(target, 20, 0.3)) == good
    assert ids(inspector.all(dead)) == ["3", "5", "7", "8", "foreign"]


def test_a_poison_message_does_not_hold_back_its_siblings(
    queues: ParkedQueues, inspector: Inspector, amqp_url: str, dead: str, name: str
) -> None:
    target = inspector.queue(name, name)
    address = {"outbox-parked-exchange": name, "outbox-parked-target": "x"}
    for event_id in ("1", "2", "3"):
        put(inspector, dead, b"{}", message_id=event_id, headers=address)
    with queues.browse(dead, 3) as browsing:
        [window] = browsing.windows()
        poisoned = [_with_reply_to(message) if message.id == "2" else message for message in window]
        outcome = queues.replay(poisoned, to_origin=False)
        browsing.remove(outcome.done)
    assert ids(outcome.done) == ["1", "3"]
    [(left, reason)] = outcome.left
    assert (left.id, reason[:3]) == ("2", "406")
    assert sorted(set(ids(inspector.messages(target, 9, 0.3)))) == ["1", "3"]
    assert ids(inspector.all(dead)) == ["2"]


def _with_reply_to(message: Any) -> Any:
    header = message.header.with_text(reply_to="amq.rabbitmq.reply-to")
    return dataclasses.replace(message, header=header)


def test_properties_and_headers_of_any_kind_are_the_same_after_a_replay(
    queues: ParkedQueues,
    inspector: Inspector,
    dead: str,
    name: str,
) -> None:
    target = inspector.queue(name, name, arguments={"x-queue-type": "classic"})
    mine = {"tenant": "acme", "outbox-key": "k", "list": [1, {"a": None}]}
    headers = {**mine, "outbox-parked-exchange": name, "outbox-parked-target": "x"}
    options: dict[str, Any] = {
        "message_id": "7",
        "correlation_id": "c",
        "content_type": "text/plain",
        "content_encoding": "gzip",
        "app_id": "shop",
        "type": "its type",
        "priority": 3,
        "timestamp": 5,
        "expiration": "60000",
        "user_id": "guest",
    }
    put(inspector, dead, b"\xff\x00", headers=headers, delivery_mode=1, **options)
    assert ids(replay_all(queues, dead).done) == ["7"]
    message = inspector.get(target)
    assert message.properties == properties_of(headers=mine, delivery_mode=2, **options)
    assert (message.exchange, message.target, message.body) == (name, "x", b"\xff\x00")


def test_a_double_among_the_headers_stays_a_double(
    queues: ParkedQueues, inspector: Inspector, dead: str, name: str
) -> None:
    target = inspector.queue(name, name)
    headers = {"outbox-parked-exchange": name, "outbox-parked-target": "x"}
    with Unwritten.written():
        ratio = Unwritten(b"d" + struct.pack(">d", 0.5))
        put(inspector, dead, b"", headers={**headers, "ratio": ratio})
    assert len(replay_all(queues, dead).done) == 1
    # Seen by the same eyes, in a queue that is not for them: pika itself would read a 0.
    with queues.browse(target, 1) as browsing:
        [[message]] = browsing.windows()
    assert message.header.header("ratio") == 0.5  # type: ignore[attr-defined]


def test_a_message_that_pika_cannot_read_is_seen_and_stays(
    queues: ParkedQueues, inspector: Inspector, dead: str, name: str
) -> None:
    odd = Unwritten(b"T" + b"\x7f" * 8)
    headers = {"outbox-parked-exchange": name, "outbox-parked-target": "x", "odd": odd}
    with Unwritten.written():
        put(inspector, dead, b"1", message_id="odd", headers=headers)
    outcome = replay_all(queues, dead)
    [(message, reason)] = outcome.left
    assert (message.id, message.origin, message.body) == ("odd", (name, "x"), b"1")
    assert reason == "its properties cannot be read"
    assert queues.count(dead) == 1


def test_a_message_that_returns_during_a_run_is_not_replayed_again(
    queues: ParkedQueues, inspector: Inspector, amqp_url: str, dead: str, name: str
) -> None:
    inspector.queue(dead, name)  # whatever is published to the exchange comes right back
    park(amqp_url, dead, made(250, name))
    assert len(replay_all(queues, dead).done) == 250
    assert queues.count(dead) == 250


def test_a_consumer_sees_the_first_address_of_a_replayed_dead_letter(
    queues: ParkedQueues, inspector: Inspector, publisher: Publisher, name: str
) -> None:
    seen: list[ReceivedEvent] = []

    @consumer(name, topics=["order.*"], exchange=name)
    def fails_twice(event: ReceivedEvent) -> None:
        seen.append(event)
        if len(seen) < 3:
            raise Reject("not yet")

    inspector.clean_up(queue=name, exchange=name)
    inspector.clean_up(queue=f"{name}.dead")
    worker = Worker([fails_twice], publisher=publisher)
    worker.start()
    try:
        inspector.wait_for_queue(name)
        wait_until(lambda: bool(inspector.consumers(name)))
        with auto_publishing(publisher=publisher):
            event = enqueue_event({"n": 1}, "order.placed", headers={"a": "b"}, key="k")
        for attempt in (1, 2):
            wait_until(lambda: queues.count(f"{name}.dead") == 1)
            [message] = replay_all(queues, f"{name}.dead").done
            assert message.origin == (name, "order.placed"), attempt
        wait_until(lambda: len(seen) == 3)
    finally:
        worker.stop(10)
    for one in seen:
        assert (one.id, one.exchange, one.target) == (event.id, name, "order.placed")
        assert (one.payload, one.headers, one.key) == ({"n": 1}, {"a": "b"}, "k")
        assert one.occurred_at == event.occurred_at


def test_a_dead_letter_replayed_to_its_original_address_reaches_every_queue_again(
    queues: ParkedQueues, inspector: Inspector, dead: str, name: str
) -> None:
    one = inspector.queue(name, name, ("order.*",))
    other = inspector.queue(f"{name}-other", name, ("order.*",))
    headers = {
        "outbox-dead-queue": name,
        "outbox-dead-exchange": name,
        "outbox-dead-target": "order.placed",
    }
    for to_origin in (False, True):
        put(inspector, dead, b"", message_id="7", headers=headers)
        assert replay_all(queues, dead, to_origin=to_origin).left == ()
    assert ids(inspector.messages(one, 2)) == ["7", "7"]
    assert ids(inspector.messages(other, 2, 0.3)) == ["7"]


@pytest.mark.slow
def test_a_broker_that_stops_answering_ends_the_replay_and_keeps_the_messages(
    private_broker: PrivateBroker,
) -> None:
    inspector = Inspector(private_broker.url)
    queue = inspector.queue("stalled.dead", arguments={"x-queue-type": "classic"})
    inspector.queue("stalled", "stalled", arguments={"x-queue-type": "classic"})
    park(private_broker.url, queue, made(20, "stalled"))
    with opened(private_broker.url, stall_timeout=0.5) as queues:
        with queues.browse(queue, 20) as browsing:
            [window] = browsing.windows()
            assert ids(queues.replay(window[:1], to_origin=False).done) == ["0"]
            private_broker.pause()
            try:
                outcome = queues.replay(window, to_origin=False)
            finally:
                private_broker.resume()
            assert isinstance(outcome.error, ConnectionLost)
            assert (outcome.done, outcome.left) == ((), ())
    assert ids(inspector.messages(queue, 20)) == [str(n) for n in range(20)]
    inspector.close()


def test_a_broker_that_dies_is_reported_as_a_lost_connection(private_broker: PrivateBroker) -> None:
    with pytest.raises(BrokerError, match=re.escape(f"127.0.0.1:{private_broker.port}")):
        with opened(private_broker.url) as queues:
            private_broker.kill()
            queues.count("any.dead")


def test_the_host_that_answers_is_also_used_for_publishing(
    inspector: Inspector, amqp_url: str, dead: str, name: str
) -> None:
    target = inspector.queue(name, name)
    park(amqp_url, dead, made(3, name))
    host = amqp_url.rpartition("@")[2].rstrip("/")
    with opened(f"amqp://guest:guest@127.0.0.1:1,{host}/") as queues:
        assert len(replay_all(queues, dead).done) == 3
    assert len(inspector.messages(target, 3)) == 3


def test_an_unreachable_broker_is_reported() -> None:
    with (
        pytest.raises(ConnectFailed, match=re.escape("127.0.0.1:1: ")),
        opened("amqp://h:h@127.0.0.1:1/"),
    ):
        pass


def test_a_missing_or_exclusively_consumed_queue_is_reported(
    queues: ParkedQueues, inspector: Inspector, name: str
) -> None:
    dead = inspector.queue(f"{name}.dead", arguments={"x-queue-type": "classic"})
    with pytest.raises(UsageError, match=re.escape("has no queue 'nowhere.dead'")):
        queues.count("nowhere.dead")
    inspector.channel.basic_consume(dead, lambda *_: None, exclusive=True)
    with (
        pytest.raises(UsageError, match="refused: 403"),
        queues.browse(dead, 1) as browsing,
    ):
        list(browsing.windows())
    inspector.channel.cancel()


def wait_until(condition: Callable[[], bool], timeout: float = 10) -> None:
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
