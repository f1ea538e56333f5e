"""The names of all metrics: a public interface, listed in ``docs/metrics.md``."""

from __future__ import annotations

from typing import Literal, NamedTuple

from outbox.telemetry.histogram import BOUNDS

__all__ = ["METRICS", "PUBLISH_BOUNDS", "Metric"]

PUBLISH_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper bounds of the buckets for the durations of chunks, in seconds."""


class Metric(NamedTuple):
    """What a metric is.

    Attributes:
        kind: its type in Prometheus.
        text: what it means, for ``# HELP``.
        labels: the names of its labels.
        named_by_users: how many labels, from the first, have values that users choose.
        is_maximum: whether the value of several processes is the highest of theirs, not the sum.
        bounds: the upper bounds of a histogram's buckets.
    """

    kind: Literal["counter", "gauge", "histogram"]
    text: str
    labels: tuple[str, ...] = ()
    named_by_users: int = 0
    is_maximum: bool = False
    bounds: tuple[float, ...] = ()


METRICS: dict[str, Metric] = {
    # Publishing
    "outbox_events_collected_total": Metric(
        "counter", "Events whose unit of work has ended: published, stored or cleared."
    ),
    "outbox_events_total": Metric(
        "counter", "Events by what became of them; kept ones count again when they end.", ("fate",)
    ),
    "outbox_publish_duration_seconds": Metric(
        "histogram",
        "Seconds from the submission of a chunk of events until the last one was confirmed.",
        bounds=PUBLISH_BOUNDS,
    ),
    "outbox_events_kept": Metric("gauge", "Events that are kept now, in memory or in the spool."),
    "outbox_events_kept_bytes": Metric("gauge", "Bytes of the events that are kept now."),
    "outbox_oldest_kept_age_seconds": Metric(
        "gauge", "Age of the oldest event that is kept now; 0 without any.", is_maximum=True
    ),
    "outbox_spool_bytes": Metric("gauge", "Bytes of the events that are in the spool now."),
    # Connections
    "outbox_connected": Metric("gauge", "Connections that can be used now.", ("link",)),
    "outbox_connects_total": Metric("counter", "Connections that were opened.", ("link",)),
    # Messages
    "outbox_messages_total": Metric(
        "counter",
        "Messages by how their processing ended.",
        ("queue", "consumer", "outcome"),
        named_by_users=2,
    ),
    "outbox_message_duration_seconds": Metric(
        "histogram",
        "Seconds from the begin of a message until it was settled.",
        ("queue", "consumer"),
        named_by_users=2,
        bounds=BOUNDS,
    ),
    "outbox_message_wait_seconds": Metric(
        "histogram",
        "Seconds from the time an event occurred, or was due, until a consumer first began it.",
        ("queue",),
        named_by_users=1,
        bounds=BOUNDS,
    ),
    "outbox_messages_in_flight": Metric(
        "gauge", "Messages that have begun and not ended.", ("queue",), named_by_users=1
    ),
    "outbox_handlers_late": Metric("gauge", "Handlers that go on after their timeout."),
    # Stored events
    "outbox_relay_rows_total": Metric(
        "counter", "Stored events by what the relay has done with them.", ("fate",)
    ),
    "outbox_store_oldest_age_seconds": Metric(
        "gauge", "Age of the oldest stored event in the relay's last claim.", is_maximum=True
    ),
    # What waits in a database
    "outbox_backlog_messages": Metric(
        "gauge",
        "Rows in the database by queue and state, of each priority up to 10,000.",
        ("queue", "state"),
        named_by_users=1,
        is_maximum=True,
    ),
    "outbox_backlog_age_seconds": Metric(
        "gauge",
        "Age of the oldest row that waits in the queue; 0 without any.",
        ("queue",),
        named_by_users=1,
        is_maximum=True,
    ),
    # Processes
    "outbox_workers": Metric("gauge", "Worker processes by their state.", ("state",)),
    "outbox_worker_restarts_total": Metric(
        "counter", "Worker processes that were replaced.", ("reason",)
    ),
    "outbox_worker_resident_bytes": Metric(
        "gauge", "Resident memory of the largest worker process.", is_maximum=True
    ),
    "outbox_build_info": Metric(
        "gauge", "Always 1, with the version of outbox.", ("version",), is_maximum=True
    ),
}
"""All metrics, by name."""
