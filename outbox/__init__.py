"""Events that are published when their unit of work has succeeded, and only then."""

from outbox.auto_publishing import AutoPublishingEventCollector, auto_publishing
from outbox.collector import EventCollector, clear_events, enqueue_event, publish, publish_async
from outbox.configuration import configure
from outbox.errors import (
    Blocked,
    BrokerError,
    CollectorClosed,
    CollectorFull,
    ConnectFailed,
    ConnectionLost,
    InvalidEvent,
    MissingExtra,
    Nacked,
    NotConfigured,
    OutboxError,
    PublishFailed,
    PublishTimeout,
    UnpublishedEvents,
    UsageError,
)
from outbox.event import Event
from outbox.publisher import Publisher
from outbox.report import PublishReport, Rejection
from outbox.stats import Latency, Stats

__all__ = [
    # Collecting
    "AutoPublishingEventCollector",
    "Event",
    "EventCollector",
    "auto_publishing",
    "clear_events",
    "enqueue_event",
    # Publishing
    "Latency",
    "PublishReport",
    "Publisher",
    "Rejection",
    "Stats",
    "configure",
    "publish",
    "publish_async",
    # Errors
    "Blocked",
    "BrokerError",
    "CollectorClosed",
    "CollectorFull",
    "ConnectFailed",
    "ConnectionLost",
    "InvalidEvent",
    "MissingExtra",
    "Nacked",
    "NotConfigured",
    "OutboxError",
    "PublishFailed",
    "PublishTimeout",
    "UnpublishedEvents",
    "UsageError",
]
