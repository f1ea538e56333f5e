"""Events that are published when their unit of work has succeeded, and only then."""

from typing import TYPE_CHECKING

from outbox.backlog.stats import Latency, Stats
from outbox.configuration import configure
from outbox.credentials import Credentials
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
    NoResults,
    NotConfigured,
    OutboxError,
    PublishTimeout,
    ResultLost,
    ResultTimeout,
    TaskCancelled,
    TaskError,
    TaskFailed,
    UnpublishedEvents,
    UsageError,
)
from outbox.event import Event
from outbox.publisher import Publisher
from outbox.report import PublishFailed, PublishReport, Rejection
from outbox.unit_of_work.auto_publishing import AutoPublishingEventCollector, auto_publishing
from outbox.unit_of_work.collector import (
    EventCollector,
    clear_events,
    enqueue_event,
    publish,
    publish_async,
)

if TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name: str) -> str:
        if name != "__version__":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from outbox.system.version import installed_version

        return installed_version()


__all__ = [
    # Collecting
    "AutoPublishingEventCollector",
    "Event",
    "EventCollector",
    "auto_publishing",
    "clear_events",
    "enqueue_event",
    # Publishing
    "Credentials",
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
    "NoResults",
    "NotConfigured",
    "OutboxError",
    "PublishFailed",
    "PublishTimeout",
    "ResultLost",
    "ResultTimeout",
    "TaskCancelled",
    "TaskError",
    "TaskFailed",
    "UnpublishedEvents",
    "UsageError",
]
