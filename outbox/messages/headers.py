"""The names of headers that are not the application's: outbox's own, and the broker's."""

from __future__ import annotations

__all__ = [
    "ATTEMPT",
    "DEAD_AT",
    "DEAD_CONTENT_ENCODING",
    "DEAD_ERROR",
    "DEAD_EXCHANGE",
    "DEAD_FIRST_AT",
    "DEAD_HEADERS",
    "DEAD_PREFIX",
    "DEAD_QUEUE",
    "DEAD_REASON",
    "DEAD_TARGET",
    "DEAD_TRACEBACK",
    "DELAYED",
    "DELAY_EXCHANGE",
    "DELAY_HEADERS",
    "DELAY_UNTIL",
    "EXPIRES_AT",
    "FIRST_FAILURE",
    "FORMAT_VERSION",
    "HEADER_FORMAT",
    "HEADER_KEY",
    "HEADER_OCCURRED_AT",
    "KEEP_RESULT",
    "ORIGIN_EXCHANGE",
    "ORIGIN_TARGET",
    "PARKED_AT",
    "PARKED_EXCHANGE",
    "PARKED_PREFIX",
    "PARKED_REASON",
    "PARKED_TARGET",
    "REPLAYED_AT",
    "RETURNED",
    "SCHEDULED_FOR",
    "TASK",
    "TRACEPARENT",
    "is_brokers_own",
]

# docs/wire-format.md says what they mean.
FORMAT_VERSION = 1
HEADER_FORMAT = "outbox-format"
HEADER_KEY = "outbox-key"
HEADER_OCCURRED_AT = "outbox-occurred-at-us"
ATTEMPT = "outbox-attempt"
FIRST_FAILURE = "outbox-first-failed-at"
RETURNED = "outbox-returned"
EXPIRES_AT = "outbox-expires-at-us"
TASK = "outbox-task"
SCHEDULED_FOR = "outbox-scheduled-for-us"
KEEP_RESULT = "outbox-keep-result"
REPLAYED_AT = "outbox-replayed-at"
ORIGIN_EXCHANGE = "outbox-origin-exchange"
ORIGIN_TARGET = "outbox-origin-target"
DELAYED = "outbox-delayed"
DELAY_HEADERS = "outbox-delay-"
DELAY_EXCHANGE = "outbox-delay-exchange"
DELAY_UNTIL = "outbox-delay-until-us"

PARKED_PREFIX = "outbox-parked-"
PARKED_REASON = "outbox-parked-reason"
PARKED_EXCHANGE = "outbox-parked-exchange"
PARKED_TARGET = "outbox-parked-target"
PARKED_AT = "outbox-parked-at"

DEAD_PREFIX = "outbox-dead-"
DEAD_REASON = "outbox-dead-reason"
DEAD_ERROR = "outbox-dead-error"
DEAD_TRACEBACK = "outbox-dead-traceback"
DEAD_QUEUE = "outbox-dead-queue"
DEAD_EXCHANGE = "outbox-dead-exchange"
DEAD_TARGET = "outbox-dead-target"
DEAD_AT = "outbox-dead-at"
DEAD_FIRST_AT = "outbox-dead-first-at"
DEAD_HEADERS = "outbox-dead-headers"
DEAD_CONTENT_ENCODING = "outbox-dead-content-encoding"

# The broker writes these about the message's history, and believes some of them when they are sent
# back to it (RabbitMQ 4.0 release notes, x-death).
_WRITTEN = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-")
_INTERPRETED = ("CC", "BCC")

TRACEPARENT = "traceparent"  # W3C Trace Context


def is_brokers_own(name: str) -> bool:
    """Return whether the broker wrote the header, or would act on it: don't send it on."""
    return name in _INTERPRETED or name.startswith(_WRITTEN)
