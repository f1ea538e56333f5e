"""A queue that can't be had for now is waited for, and holds up no other queue of its worker."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import pika
import pika.exceptions
import pytest

from outbox import Publisher, UsageError
from outbox.consumers import Worker, consumer
from outbox.messages.delivery import dead_letter_queue
from outbox.testing.broker import PrivateBroker
from outbox.transports.rabbitmq.topology import is_wrong_usage
from proving.proxy import FaultProxy, Frame, Way
from tests.amqp import Inspector
from tests.integration.test_worker import Seen, send
from tests.waiting import wait_until

_OF_QUEUE = """
{{ok, Queue}} = rabbit_amqqueue:lookup(rabbit_misc:r(<<"/">>, queue, <<"{name}">>)),
ra:{what}(quorum_queues, amqqueue:get_pid(Queue)).
"""


@contextlib.contextmanager
def working(publisher: Publisher, inspector: Inspector, *consumers: Any) -> Iterator[Worker]:
    worker = Worker(consumers, publisher=publisher)
    for queue in worker.consumers:
        inspector.clean_up(queue=queue, exchange=publisher.settings.exchange)
        inspector.clean_up(queue=dead_letter_queue(queue))
    worker.start()
    try:
        yield worker
    finally:
        worker.stop(5)


@contextlib.contextmanager
def other_client(url: str) -> Iterator[Any]:
    """The channel of a connection that isn't outbox's."""
    connection = pika.BlockingConnection(pika.URLParameters(url))
    try:
        yield connection.channel()
    finally:
        connection.close()


@pytest.fixture
def queues(name: str) -> tuple[str, str]:
    """The names of a queue that can't be had, and of another one."""
    return f"{name}-sick", f"{name}-well"


@pytest.mark.slow
def test_a_quorum_queue_without_a_leader_leaves_the_others_alone(
    private_broker: PrivateBroker,
    name: str,
    queues: tuple[str, str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    sick, well = queues
    seen_sick, seen_well = Seen(), Seen()
    url = private_broker.url
    with (
        contextlib.closing(Inspector(url)) as inspector,
        Publisher(url, exchange=name) as publisher,
    ):
        both = (consumer(sick)(seen_sick), consumer(well)(seen_well))
        with working(publisher, inspector, *both) as worker:
            wait_until(lambda: worker.is_consuming)
            send(publisher, sick, 1)
            seen_sick.wait(1)
        private_broker.ctl("eval", _OF_QUEUE.format(what="stop_server", name=sick))
        try:
            with working(publisher, inspector, *both) as worker:
                # Consuming from such a queue ends the connection (541).
                wait_until(lambda: worker.is_consuming, 20)
                assert f"while '{sick}' was to be consumed" in caplog.text
                subscription: Any = worker._subscription
                connection = subscription._connection
                for number in range(15):
                    send(publisher, well, number)
                    time.sleep(0.2)
                assert len(seen_well.wait(15)) == 15
                assert subscription._connection is connection  # nothing has ended it again
                assert not any(event.redelivered for event in seen_well.events)
                private_broker.ctl("eval", _OF_QUEUE.format(what="restart_server", name=sick))
                wait_until(lambda: subscription._consumers[sick].is_consuming, 30)
                send(publisher, sick, 2)
                assert seen_sick.wait(2)[1].payload == 2
                assert subscription._connection is connection
        finally:
            private_broker.ctl("eval", _OF_QUEUE.format(what="restart_server", name=sick))


@pytest.mark.parametrize("how", ["exclusive queue", "exclusive consumer"])
def test_a_queue_that_another_connection_has_for_itself_is_waited_for(
    amqp_url: str,
    publisher: Publisher,
    inspector: Inspector,
    queues: tuple[str, str],
    how: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    sick, well = queues
    seen_sick, seen_well = Seen(), Seen()
    classic = consumer(sick, max_priority=2)(seen_sick)
    with contextlib.ExitStack() as stack:
        if how == "exclusive queue":
            other = stack.enter_context(other_client(amqp_url))
            other.queue_declare(sick, exclusive=True)
        else:
            with working(publisher, inspector, classic) as worker:
                wait_until(lambda: worker.is_consuming)
            other = stack.enter_context(other_client(amqp_url))
            other.basic_consume(sick, print, exclusive=True)
        with working(publisher, inspector, classic, consumer(well)(seen_well)) as worker:
            wait_until(lambda: worker.is_consuming)
            sent = send(publisher, well, *range(5))
            assert [event.id for event in seen_well.wait(5)] == sent
            assert not worker.wait(0.5)  # it goes on
            assert f"cannot consume from '{sick}'" in caplog.text
            stack.close()
            subscription: Any = worker._subscription
            wait_until(lambda: subscription._consumers[sick].is_consuming, 20)
            send(publisher, sick, 1)
            seen_sick.wait(1)


def test_a_deleted_queue_takes_no_delivery_from_the_others(
    publisher: Publisher, inspector: Inspector, queues: tuple[str, str]
) -> None:
    sick, well = queues
    seen_sick = Seen()
    seen_well = Seen(lambda event: time.sleep(1) if event.payload == "slow" else None)
    both = (consumer(sick)(seen_sick), consumer(well)(seen_well))
    with working(publisher, inspector, *both) as worker:
        wait_until(lambda: worker.is_consuming)
        send(publisher, well, "slow")
        seen_well.wait(1)
        inspector.channel.queue_delete(sick)
        send(publisher, well, "other")
        seen_well.wait(2)
        inspector.wait_for_queue(sick)
        wait_until(lambda: worker.is_consuming)
        send(publisher, sick, 1)
        seen_sick.wait(1)
        wait_until(lambda: worker._subscription.out(well) == 0)
    assert [event.payload for event in seen_well.events] == ["slow", "other"]


def test_one_queue_that_must_be_changed_still_ends_the_start(
    publisher: Publisher, inspector: Inspector, queues: tuple[str, str]
) -> None:
    sick, well = queues
    inspector.queue(sick, arguments={"x-queue-type": "classic"})
    with (
        working(publisher, inspector, consumer(sick)(Seen()), consumer(well)(Seen())) as worker,
        pytest.raises(UsageError, match=r"PRECONDITION_FAILED.*x-"),
    ):
        worker.wait(10)


@pytest.mark.slow
def test_missing_queues_are_declared_again_once_in_two_seconds_for_all_that_miss_them(
    proxy: FaultProxy, inspector: Inspector, name: str
) -> None:
    declared = []

    def is_declaration(frame: Frame) -> bool:
        if frame.way is Way.UP and frame.method == (50, 10):
            declared.append(frame)
        return False

    with (
        Publisher(proxy.url, exchange=name) as publisher,
        working(publisher, inspector, consumer(name)(Seen())) as worker,
    ):
        wait_until(lambda: worker.is_consuming)
        inspector.channel.queue_delete(dead_letter_queue(name))
        proxy.cut_at(is_declaration)
        for _ in range(20):
            worker._subscription.declare_again()
            time.sleep(0.01)
        inspector.wait_for_queue(dead_letter_queue(name))
        assert 1 <= len(declared) <= 4  # the queue, and its dead letters


@pytest.mark.parametrize(
    ("refused", "create", "passive"),
    [
        ("PRECONDITION_FAILED - inequivalent arg 'x-max-priority' for queue 'q'", True, True),
        ("ACCESS_REFUSED - access to queue 'q' in vhost '/' refused for user 'u'", True, True),
        ("ACCESS_REFUSED - queue 'q' in vhost '/' in exclusive use", False, False),
        ("NOT_FOUND - no queue 'q' in vhost '/'", False, True),
        ("NOT_FOUND - no exchange 'e' in vhost '/'", False, True),
        (
            "NOT_FOUND - home node 'rabbit@b' of durable queue 'q' in vhost '/' is down or "
            "inaccessible",
            False,
            False,
        ),
        ("RESOURCE_LOCKED - cannot obtain exclusive access to locked queue 'q'", False, False),
        ("INTERNAL_ERROR", False, False),
    ],
)
def test_only_what_a_user_must_change_is_wrong_usage(
    refused: str, create: bool, passive: bool
) -> None:
    assert is_wrong_usage(refused, "create") == create
    assert is_wrong_usage(refused, "passive") == passive
    assert is_wrong_usage(refused, "never") == passive
