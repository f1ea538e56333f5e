"""Queues with priorities on a real RabbitMQ: how they are declared or refused."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pika.exceptions
import pytest

from outbox import Publisher, UsageError
from outbox.consumers import Consumer, ReceivedEvent, Worker
from outbox.transports.rabbitmq.topology import DELIVERY_LIMIT
from tests.amqp import Inspector
from tests.places import RabbitMQPlace, events_for


class Urgent(Consumer):
    max_priority = 10

    def process(self, event: ReceivedEvent) -> None:
        """Be done."""


@pytest.fixture
def place(amqp_url: str, name: str, inspector: Inspector) -> Iterator[RabbitMQPlace]:
    yield RabbitMQPlace(amqp_url, name, inspector)
    inspector.clean_up(queue=name)
    inspector.clean_up(queue=f"{name}.dead")


def consumer_of(name: str, **attributes: Any) -> type[Urgent]:
    return type("Made", (Urgent,), {"queue": name, **attributes})


def refused(publisher: Publisher, consumer: type[Consumer]) -> str:
    """Return with what error a worker ends."""
    worker = Worker([consumer], publisher=publisher)
    worker.start()
    try:
        with pytest.raises(UsageError) as caught:
            worker.wait(10)
        return str(caught.value)
    finally:
        worker.stop(5)


@pytest.mark.hazard("C11")
def test_a_consumer_with_priorities_has_a_durable_classic_queue(
    place: RabbitMQPlace, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    worker = Worker([consumer_of(name)], publisher=publisher)
    worker.start()
    inspector.wait_for_queue(name)
    worker.stop()
    arguments = {
        "x-queue-type": "classic",
        "x-max-priority": 10,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": f"{name}.dead",
        "x-overflow": "reject-publish",
    }
    inspector.channel.queue_declare(name, durable=True, arguments=arguments)
    inspector.channel.queue_declare(
        f"{name}.dead",
        durable=True,
        arguments={"x-queue-type": "quorum", "x-delivery-limit": DELIVERY_LIMIT},
    )


@pytest.mark.hazard("C11")
def test_priorities_a_quorum_queue_does_not_support_are_refused_before_it_is_declared(
    place: RabbitMQPlace, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    properties: Any = inspector._connection._impl.server_properties
    if tuple(map(int, properties["version"].split(".")[:2])) >= (4, 3):
        pytest.skip("this broker has them")
    error = refused(publisher, consumer_of(name, queue_type="quorum"))
    assert "asks for a quorum queue with priorities up to 10" in error
    assert "omit queue_type for a classic queue" in error
    with pytest.raises(pika.exceptions.ChannelClosedByBroker, match="NOT_FOUND"):
        inspector._connection.channel().queue_declare(name, passive=True)
    place.bind(f"{name}-all", name, "#")
    assert publisher.publish(events_for(publisher, ["a"])).ok


@pytest.mark.hazard("C9")
@pytest.mark.parametrize(
    ("there", "argument"),
    [
        ({"x-queue-type": "quorum"}, "x-queue-type"),
        ({"x-queue-type": "classic", "x-max-priority": 5}, "x-max-priority"),
    ],
)
def test_an_existing_queue_with_other_priorities_is_reported_by_its_argument(
    place: RabbitMQPlace,
    publisher: Publisher,
    inspector: Inspector,
    name: str,
    there: dict[str, Any],
    argument: str,
) -> None:
    others = {
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": f"{name}.dead",
        "x-overflow": "reject-publish",
    }
    inspector.queue(name, arguments={**there, **others})
    error = refused(publisher, consumer_of(name))
    assert f"inequivalent arg '{argument}' for queue '{name}'" in error
    assert publisher.publish(events_for(publisher, [name], exchange="")).ok
