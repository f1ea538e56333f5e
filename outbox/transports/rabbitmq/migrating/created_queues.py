"""Creates the queues of consumers without consuming from them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pika.exceptions

from outbox.errors import UsageError
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.messages.delivery import QueueSpec, dead_letter_queue
from outbox.settings import Settings
from outbox.transports.rabbitmq import topology
from outbox.transports.rabbitmq.parked_queues import RabbitMQParkedQueues
from outbox.transports.rabbitmq.topology import Step
from outbox.url import BrokerURL

__all__ = ["create"]


def create(specs: Sequence[QueueSpec], url: BrokerURL, settings: Settings) -> None:
    """Create the queues and bindings that are missing, and the queue of parked events.

    A queue that exists gets the bindings it lacks, and stays as it is otherwise: its arguments may
    be others.

    Raises:
        UsageError: the broker refuses something.
        BrokerError: the broker can't be reached.
    """
    with RabbitMQParkedQueues(url, settings) as broker:
        for spec in specs:
            dead, consumed, *bound = topology.queue(spec, "create")
            steps = topology.exchange(spec.exchange, "create")
            steps += [] if _exists(dead_letter_queue(spec.name), broker) else [dead]
            steps += [] if _exists(spec.name, broker) else [consumed]
            _run([*steps, *bound], broker)
        if not _exists(PARKING_QUEUE, broker):
            _run(topology.parking_queue(PARKING_QUEUE, "create"), broker)


class _Answering:
    """A blocking channel that is used like one with callbacks, as steps use it."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, callback: Any, **options: Any) -> None:
            callback(getattr(self._channel, name)(*arguments, **options))

        return call


def _run(steps: Sequence[Step], broker: RabbitMQParkedQueues) -> None:
    with broker.channel() as channel:
        answering: Any = _Answering(channel)
        for step in steps:
            step(answering, lambda answer: None)


def _exists(queue: str, broker: RabbitMQParkedQueues) -> bool:
    try:
        broker.count(queue)
    except UsageError as error:
        match error.__cause__:
            case pika.exceptions.ChannelClosedByBroker(reply_code=404):
                return False
        raise
    return True
