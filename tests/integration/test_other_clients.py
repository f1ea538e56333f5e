"""outbox consumes messages of other AMQP clients, and they can read its events."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
from typing import Any

import pytest

from outbox import Publisher, auto_publishing, enqueue_event
from outbox.consumers import ReceivedEvent, RetryPolicy
from tests.amqp import Inspector
from tests.integration.test_worker import Seen, running

kombu: Any = importlib.import_module("kombu")  # it has no types

CONFIRMED = {"confirm_publish": True}  # else a busy broker may lose what kombu sends


def tool(name: str) -> str:
    """Return where a program of amqp-tools is."""
    found = shutil.which(name)
    if found is None:
        reason = f"there is no {name}: scripts/bootstrap installs amqp-tools"
        if "CI" in os.environ:
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def run(name: str, url: str, *options: str) -> str:
    # To these programs a URL that ends with a slash names the virtual host "".
    command = [tool(name), "-u", url.removesuffix("/"), *options]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=20).stdout


def published(publisher: Publisher, target: str) -> str:
    with auto_publishing(publisher=publisher):
        event = enqueue_event({"photo": "käse.jpg"}, target, headers={"tenant": 7}, key="k")
    return event.id


@pytest.mark.hazard("H1")
def test_a_message_published_by_kombu_is_consumed(
    amqp_url: str, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    seen = Seen()
    with running(publisher, inspector, seen, name, threads=1, topics=["photo.*"]):
        with kombu.Connection(amqp_url, transport_options=CONFIRMED) as connection:
            producer = connection.Producer()
            exchange = kombu.Exchange(name, "topic", durable=True)
            body = {"photo": "käse.jpg"}
            producer.publish(
                body, "photo.new", exchange=exchange, declare=[exchange], message_id="k-1",
                headers={"tenant": 7, "deep": {"a": [1, None]}}, priority=3, expiration=60,
                correlation_id="c", reply_to="r",
            )  # fmt: skip
            producer.publish(body, name, headers={"n": 2})
            producer.publish(body, name, serializer="pickle")
        first, second = seen.wait(2)
        letter = inspector.get(f"{name}.dead")
    assert (first.id, first.target, first.exchange) == ("k-1", "photo.new", name)
    assert first.payload == second.payload == body
    assert first.headers == {"tenant": 7, "deep": {"a": [1, None]}}
    assert first.priority == 3
    assert second.id  # it brought none
    reason = letter.properties.headers["outbox-dead-reason"]
    assert reason == "undecodable: its content encoding 'binary' is not supported"  # of a pickle


def test_a_message_published_by_kombu_is_retried_and_keeps_its_headers(
    amqp_url: str, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    def fail_at_first(event: Any) -> None:
        if event.attempt == 1:
            raise ValueError

    seen = Seen(fail_at_first)
    with running(publisher, inspector, seen, name, retry=RetryPolicy(delay=0)):
        with kombu.Connection(amqp_url, transport_options=CONFIRMED) as connection:
            connection.Producer().publish({"n": 1}, name, message_id="k-1", headers={"tenant": 7})
        first, second = seen.wait(2)
    assert (first.id, first.payload, first.headers) == (second.id, second.payload, second.headers)
    assert (first.attempt, second.attempt) == (1, 2)


def test_kombu_reads_events_of_outbox(
    amqp_url: str, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name, ("photo.*",))
    sent = published(publisher, "photo.new")
    found: list[Any] = []

    def take(body: Any, message: Any) -> None:
        found.append((body, message))
        message.ack()

    with kombu.Connection(amqp_url) as connection:
        queue = kombu.Queue(name, no_declare=True)
        with connection.Consumer(queue, callbacks=[take], accept=["json"]):
            connection.drain_events(timeout=10)
    [(body, message)] = found
    assert body == {"photo": "käse.jpg"}  # kombu decodes it by its content type
    assert message.properties["message_id"] == sent
    assert message.headers["tenant"] == 7
    assert message.headers["outbox-key"] == "k"
    assert message.delivery_info["routing_key"] == "photo.new"


def test_a_message_sent_by_amqp_publish_is_consumed(
    amqp_url: str, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    seen = Seen()
    with running(publisher, inspector, seen, name):
        body = ("-b", '{"photo": 1}', "-H", "tenant: 7")
        run("amqp-publish", amqp_url, "-p", "-r", name, *body)
        [event] = seen.wait(1)
        run("amqp-publish", amqp_url, "-r", name, "-C", "text/csv", "-b", "a;b")
        letter = inspector.get(f"{name}.dead")
    assert event.payload == {"photo": 1}
    assert event.headers == {"tenant": "7"}
    assert letter.body == b"a;b"


def test_a_message_without_a_content_type_is_json_at_every_attempt_and_replay(
    amqp_url: str, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    def fail(event: ReceivedEvent) -> None:
        raise ValueError(event.payload)

    with running(publisher, inspector, fail, name, retry=RetryPolicy(max_attempts=2, delay=0)):
        inspector.publish(name, b"[1]")
        letter = inspector.get(f"{name}.dead")
    assert letter.properties.headers["outbox-dead-reason"] == "ValueError: [1]"
    assert letter.properties.headers["outbox-attempt"] == 2
    assert letter.properties.content_type == "application/json"


def test_amqp_get_reads_events_of_outbox(
    amqp_url: str, publisher: Publisher, inspector: Inspector, name: str
) -> None:
    inspector.queue(name, name, ("photo.*",))
    published(publisher, "photo.new")
    assert json.loads(run("amqp-get", amqp_url, "-q", name)) == {"photo": "käse.jpg"}
