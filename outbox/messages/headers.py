"""Headers that are not the application's: outbox's own, and the broker's."""

from __future__ import annotations

__all__ = [
    "ATTEMPT",
    "FIRST_FAILURE",
    "DELAY_EXCHANGE",
    "DELAY_HEADERS",
    "FORMAT_VERSION",
    "HEADER_FORMAT",
    "HEADER_KEY",
    "HEADER_OCCURRED_AT",
    "ORIGIN_EXCHANGE",
    "ORIGIN_TARGET",
    "is_brokers_own",
]

# docs/wire-format.md tells what they mean.
FORMAT_VERSION = 1
HEADER_FORMAT = "outbox-format"
HEADER_KEY = "outbox-key"
HEADER_OCCURRED_AT = "outbox-occurred-at-us"
ATTEMPT = "outbox-attempt"
FIRST_FAILURE = "outbox-first-failed-at"
ORIGIN_EXCHANGE = "outbox-origin-exchange"
ORIGIN_TARGET = "outbox-origin-target"
DELAY_HEADERS = "outbox-delay-"
DELAY_EXCHANGE = "outbox-delay-exchange"

# What the broker wrote about earlier stations of the message; sent back to it, some of it is
# believed (RabbitMQ 4.0 release notes, x-death).
_WRITTEN = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-")
_INTERPRETED = ("CC", "BCC")


def is_brokers_own(name: str) -> bool:
    """Return whether the broker wrote the header, or would act on it: it is never sent on."""
    return name in _INTERPRETED or name.startswith(_WRITTEN)
