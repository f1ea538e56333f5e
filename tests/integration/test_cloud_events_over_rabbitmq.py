"""CloudEvents through RabbitMQ, written and read by the package ``cloudevents``."""

from __future__ import annotations

from typing import Any

from cloudevents.core.bindings import rabbitmq
from cloudevents.core.v1.event import CloudEvent

from outbox import Publisher, auto_publishing, enqueue_event
from outbox.consumers import ReceivedEvent, RetryPolicy
from tests.amqp import Inspector, properties_of
from tests.integration.test_worker import Seen, running


def test_the_package_reads_an_event_that_was_published(
    amqp_url: str, inspector: Inspector, name: str
) -> None:
    queue = inspector.queue(name, name)
    with Publisher(amqp_url, exchange=name, envelope="cloudevents", source="/shop") as publisher:
        with auto_publishing(publisher=publisher):
            sent = enqueue_event({"photo": "käse.jpg"}, "photo.new", key="k", delay=1)
        message = inspector.get(queue)
    properties = message.properties
    read = rabbitmq.from_rabbitmq_event(
        rabbitmq.RabbitMQMessage(
            {key: value for key, value in properties.headers.items() if key.startswith("ce-")},
            properties.content_type,
            message.body,
        )
    )
    assert (read.get_id(), read.get_source()) == (sent.id, "/shop")
    assert (read.get_type(), read.get_time()) == ("photo.new", sent.occurred_at)
    assert read.get_extension("partitionkey") == "k"
    assert read.get_data() == {"photo": "käse.jpg"}


def test_events_of_the_package_are_consumed_and_retried_and_batches_dead_lettered(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    def fail_at_first(event: ReceivedEvent) -> Any:
        if event.attempt == 1:
            raise ValueError

    seen = Seen(fail_at_first)
    retry = RetryPolicy(max_attempts=2, delay=0)
    event = CloudEvent({"source": "/x", "type": "photo.new", "id": "i-1"}, {"photo": "käse.jpg"})
    messages = [rabbitmq.to_binary_event(event), rabbitmq.to_structured_event(event)]
    messages.append(
        rabbitmq.RabbitMQMessage({}, "application/cloudevents-batch+json", b"[]"),
    )
    with running(publisher, inspector, seen, name, threads=1, retry=retry):
        for message in messages:
            properties = properties_of(
                content_type=message.content_type, headers=message.headers, delivery_mode=2
            )
            inspector.publish(name, message.body, properties=properties)
        read = seen.wait(4)
        letter = inspector.get(f"{name}.dead")
    assert [each.id for each in read] == ["i-1"] * 4
    assert sorted(each.attempt for each in read) == [1, 1, 2, 2]
    for each in read:
        assert each.payload == {"photo": "käse.jpg"}
        assert each.cloudevent is not None
        assert each.cloudevent["source"] == "/x"
    assert "batch of CloudEvents" in letter.properties.headers["outbox-dead-reason"]
