"""Consumers of RabbitMQ queues, and the worker that runs them."""

from outbox.consumers.consumer import Consumer, FunctionConsumer, consumer
from outbox.consumers.current import current_message
from outbox.consumers.logs import MessageFilter
from outbox.consumers.outcome import ACK, REJECT, REQUEUE, Outcome, Reject, Requeue
from outbox.consumers.received import ReceivedEvent
from outbox.consumers.worker import Worker

__all__ = [
    # Writing consumers
    "Consumer",
    "FunctionConsumer",
    "ReceivedEvent",
    "consumer",
    # Outcomes
    "ACK",
    "REJECT",
    "REQUEUE",
    "Outcome",
    "Reject",
    "Requeue",
    # Running them
    "Worker",
    # Logging
    "MessageFilter",
    "current_message",
]
