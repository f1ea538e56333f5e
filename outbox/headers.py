"""Headers that are the broker's own, and not the sender's."""

from __future__ import annotations

__all__ = ["is_brokers_own"]

# What the broker wrote about earlier stations of the message; sent back to it, some of it is
# believed (RabbitMQ 4.0 release notes, x-death).
_WRITTEN = ("x-death", "x-first-death-", "x-last-death-", "x-delivery-count", "x-acquired-")
_INTERPRETED = ("CC", "BCC")


def is_brokers_own(name: str) -> bool:
    """Return whether the broker wrote the header, or would act on it: it is never sent on."""
    return name in _INTERPRETED or name.startswith(_WRITTEN)
