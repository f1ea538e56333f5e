"""No message is given up by the broker only because it was sent ahead, or given back, often.

RabbitMQ 4 counts how often a message came back to a quorum queue, and gives it up after 20 times;
in earlier versions a queue or a policy may have such a limit. The tests make queues with it, so
they say the same on every version.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import pika.exceptions
import pytest

from outbox import Publisher, UsageError
from outbox.consumers import ReceivedEvent, Worker, consumer
from outbox.consumers.outcome import Return
from outbox.messages.delivery import dead_letter_queue
from outbox.settings import Settings
from outbox.transports.rabbitmq.topology import DELIVERY_LIMIT
from outbox.transports.registry import open_parked_queues
from proving.proxy import FaultProxy
from tests.amqp import Inspector, properties_of
from tests.integration.test_worker import Seen, running, send
from tests.waiting import wait_until

MESSAGES = 20
LIMIT = 20
TIMES = 24
"""More than the limit."""


def arguments_of(queue: str, limit: int | None = None) -> dict[str, Any]:
    """Return the arguments of a consumer's queue, as earlier versions declared it or limited."""
    limited = {} if limit is None else {"x-delivery-limit": limit}
    return {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": dead_letter_queue(queue),
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
        **limited,
    }


def refusal(inspector: Inspector, queue: str, arguments: dict[str, Any]) -> str:
    """Return why the broker refuses to declare ``queue`` with these arguments; empty if not."""
    inspector.channel.queue_declare(queue, passive=True)  # so that none is made
    try:
        inspector.channel.queue_declare(queue, durable=True, arguments=arguments)
    except pika.exceptions.ChannelClosedByBroker as error:
        inspector.channel = inspector.channel.connection.channel()
        return str(error.reply_text)
    return ""


@pytest.fixture
def limited(inspector: Inspector, name: str) -> str:
    """A queue that gives a message up after 20 returns, as RabbitMQ 4 does without an argument."""
    inspector.queue(dead_letter_queue(name))
    return inspector.queue(name, name, (name,), arguments_of(name, LIMIT))


@pytest.fixture
def passive(amqp_url: str, name: str) -> Iterator[Publisher]:
    """A publisher whose worker takes queues as they are."""
    with Publisher(amqp_url, exchange=name, declare="passive") as publisher:
        yield publisher


def test_new_queues_have_no_limit_that_a_message_could_reach(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    with running(publisher, inspector, Seen(), name):
        pass
    assert not refusal(inspector, name, arguments_of(name, DELIVERY_LIMIT))
    letters = {"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT}
    assert not refusal(inspector, dead_letter_queue(name), letters)
    assert "x-delivery-limit" in refusal(inspector, name, arguments_of(name))


def test_queues_of_an_earlier_version_are_consumed_from_and_named(
    publisher: Publisher, inspector: Inspector, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "outbox.consumer")
    inspector.queue(dead_letter_queue(name))
    inspector.queue(name, arguments=arguments_of(name))
    seen = Seen()
    with running(publisher, inspector, seen, name) as worker:
        [sent] = send(publisher, name, 1)
        assert seen.wait(1)[0].id == sent
        subscription: Any = worker._subscription
        counts = subscription._connection.version >= (4, 0)
    assert not refusal(inspector, name, arguments_of(name))
    lines = [record.getMessage() for record in caplog.records]
    named = [line for line in lines if "has no x-delivery-limit" in line]
    assert sorted(line.split("'")[1] for line in named) == (
        [name, dead_letter_queue(name)] if counts else []
    )


def test_the_dead_letters_that_the_broker_has_made_are_counted_at_the_start(
    publisher: Publisher, inspector: Inspector, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "outbox.consumer")
    with running(publisher, inspector, Seen(), name):
        pass
    inspector.publish(name, b"{}", properties=properties_of(delivery_mode=2, expiration="1"))
    wait_until(lambda: inspector.count(dead_letter_queue(name)) == 1)
    with running(publisher, inspector, Seen(), name):
        pass
    assert caplog.text.count(f"1 dead letter(s) of '{name}' wait in") == 1
    url = publisher.settings.url
    with open_parked_queues(Settings.load(url, {})) as parked:
        with parked.browse(dead_letter_queue(name), 1) as browsing:
            [[message]] = browsing.windows()
            assert message.reason == "dead-lettered by the broker: expired"


def test_a_queue_with_another_limit_is_refused_in_the_brokers_words(
    publisher: Publisher, limited: str
) -> None:
    worker = Worker([consumer(limited)(Seen())], publisher=publisher)
    worker.start()
    try:
        with pytest.raises(UsageError, match=r"x-delivery-limit.*current is .*20"):
            worker.wait(10)
    finally:
        worker.stop(5)


def test_a_message_may_be_requeued_any_number_of_times(
    passive: Publisher, inspector: Inspector, limited: str
) -> None:
    done = threading.Event()

    def process(event: ReceivedEvent) -> Return | None:
        if len(seen.events) <= 100:
            return Return(0.01)
        done.set()
        return None

    seen = Seen(process)
    with running(passive, inspector, seen, limited):
        [sent] = send(passive, limited, {"n": 1}, headers={"a": 1}, key="k")
        assert done.wait(30)
    assert {event.id for event in seen.events} == {sent}
    events = seen.events
    assert {(event.target, event.exchange, event.attempt) for event in events} == {
        (limited, passive.settings.exchange, 1)
    }
    assert all(event.headers["a"] == 1 and event.key == "k" for event in events)
    assert {event.occurred_at for event in events} == {events[0].occurred_at}
    assert inspector.all(dead_letter_queue(limited)) == []


@contextlib.contextmanager
def stuck(publisher: Publisher, queue: str) -> Iterator[Worker]:
    """Run a worker to which all messages are sent ahead, and that begins only the first."""
    stopping = threading.Event()

    def process(event: ReceivedEvent) -> Return:
        stopping.wait(30)
        return Return(30)

    worker = Worker([consumer(queue)(process)], publisher=publisher, threads=1, prefetch=50)
    worker.start()
    try:
        yield worker
    finally:
        threading.Timer(0.05, stopping.set).start()
        worker.stop(5)


def is_out(subscription: Any, queue: str) -> bool:
    """Return whether all messages were sent ahead."""
    return bool(subscription.out(queue) == MESSAGES)


def all_arrive(publisher: Publisher, inspector: Inspector, queue: str, ids: list[str]) -> None:
    seen = Seen()
    with running(publisher, inspector, seen, queue):
        seen.wait(len(ids))
        wait_until(lambda: {event.id for event in seen.events} == set(ids))
    assert inspector.all(dead_letter_queue(queue)) == []


@pytest.mark.slow
def test_messages_sent_ahead_survive_any_number_of_stops(
    passive: Publisher, inspector: Inspector, limited: str
) -> None:
    ids = send(passive, limited, *range(MESSAGES))
    for _ in range(TIMES):
        with stuck(passive, limited) as worker:
            subscription: Any = worker._subscription
            wait_until(partial(is_out, subscription, limited))
    all_arrive(passive, inspector, limited, ids)


def test_what_is_given_back_at_a_stop_counts_only_where_the_broker_leaves_no_way(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(dead_letter_queue(name))
    inspector.queue(name, name, (name,), arguments_of(name, DELIVERY_LIMIT))
    send(publisher, name, *range(MESSAGES))
    with stuck(publisher, name) as worker:
        subscription: Any = worker._subscription
        wait_until(lambda: is_out(subscription, name))
        is_counted = subscription._connection.version < (4, 3)
    messages = inspector.messages(name, MESSAGES)
    counts = [message.properties.headers.get("x-delivery-count") or 0 for message in messages]
    assert counts == [is_counted] * MESSAGES


@pytest.mark.slow
def test_messages_sent_ahead_survive_any_number_of_cut_links(
    proxy: FaultProxy, inspector: Inspector, passive: Publisher, limited: str
) -> None:
    ids = send(passive, limited, *range(MESSAGES))
    through_proxy = Publisher(proxy.url, exchange=passive.settings.exchange, declare="passive")
    with through_proxy, stuck(through_proxy, limited) as worker:
        subscription: Any = worker._subscription
        for _ in range(TIMES):
            wait_until(lambda: worker.is_consuming and subscription.out(limited) >= MESSAGES, 20)
            time.sleep(0.1)  # a cut between a copy's confirm and its ack makes it a second message
            proxy.cut()
            wait_until(lambda: not worker.is_consuming)
    all_arrive(passive, inspector, limited, ids)
