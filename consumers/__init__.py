"""Consumers of queues, and the worker that runs them."""

from outbox.consumers.current import current_message
from outbox.consumers.definition import Consumer, FunctionConsumer, consumer
from outbox.consumers.filters import after, around, before
from outbox.consumers.hooks import on_worker_start, on_worker_stop, worker_state
from outbox.consumers.logs import MessageFilter
from outbox.consumers.outcome import ACK, REJECT, REQUEUE, Outcome, ProcessTimeout, Reject, Requeue
from outbox.consumers.retry import Retry, RetryPolicy, exponential
from outbox.consumers.worker.worker import Worker
from outbox.consumers.worker.worker_stats import QueueStats, WorkerStats
from outbox.messages.received_event import ReceivedEvent

__all__ = [
    # Writing consumers
    "Consumer",
    "FunctionConsumer",
    "ReceivedEvent",
    "after",
    "around",
    "before",
    "consumer",
    # Outcomes
    "ACK",
    "REJECT",
    "REQUEUE",
    "Outcome",
    "ProcessTimeout",
    "Reject",
    "Requeue",
    # Retries
    "Retry",
    "RetryPolicy",
    "exponential",
    # Running them
    "QueueStats",
    "Worker",
    "WorkerStats",
    "on_worker_start",
    "on_worker_stop",
    "worker_state",
    # Logging
    "MessageFilter",
    "current_message",
]
