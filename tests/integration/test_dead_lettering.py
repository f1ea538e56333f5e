"""Dead letters when queues of the broker have been deleted."""

from __future__ import annotations

import threading

import pytest

from outbox import Publisher
from outbox.consumers import ReceivedEvent, Reject, consumer
from outbox.consumers.worker.worker import Worker
from tests.amqp import Inspector
from tests.places import events_for
from tests.waiting import wait_until


@pytest.mark.hazard("C13")
def test_if_the_dead_letter_queue_is_deleted_a_poison_message_waits_until_it_exists_again(
    publisher: Publisher, inspector: Inspector, name: str
) -> None:
    begun, deleted = threading.Event(), threading.Event()

    @consumer(name)
    def poisoned(event: ReceivedEvent) -> None:
        begun.set()
        assert deleted.wait(10)
        raise Reject("poison")

    inspector.clean_up(exchange=name)
    worker = Worker([poisoned], publisher=publisher)
    worker.start()
    try:
        inspector.wait_for_queue(name)
        inspector.wait_for_queue(f"{name}.dead")
        [event] = events_for(publisher, [name], exchange="")
        assert publisher.publish([event]).ok
        assert begun.wait(10)
        inspector.channel.queue_delete(f"{name}.dead")
        deleted.set()
        inspector.wait_for_queue(f"{name}.dead")  # declared again, by the worker
        letter = inspector.get(f"{name}.dead")
    finally:
        worker.stop(5)
    assert letter.id == event.id
    assert letter.properties.headers["outbox-dead-reason"] == "poison"
    wait_until(lambda: inspector.count(name) == 0)
