"""Which transport a URL names. Adding one means adding a line to the table."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from outbox.backlog.notifier import Notifier
from outbox.errors import NotConfigured, UsageError
from outbox.messages.delivery import QueueSpec
from outbox.settings import Settings
from outbox.system.threads import check_threads
from outbox.transports.parked_queues import ParkedQueues
from outbox.transports.subscription import Subscription
from outbox.transports.transport import Transport
from outbox.url import BrokerURL

__all__ = ["open_parked_queues", "open_subscription", "open_transport"]

_PACKAGES = {
    "amqp": "outbox.transports.rabbitmq",
    "amqps": "outbox.transports.rabbitmq",
    "memory": "outbox.transports.memory",
    "sqlite": "outbox.transports.sqlite",
}
"""Where the doors of a scheme are: ``Transport``, and if it can be consumed from ``Subscription``
and ``ParkedQueues``. Imported when used, so that nobody needs the drivers of the others."""


def open_transport(settings: Settings) -> Transport:
    """Return a transport for ``settings.url``, not yet connected.

    Raises:
        NotConfigured: there is no URL.
        UsageError: the URL cannot be used, or not with the threads that there are.
    """
    if settings.url is None:
        raise NotConfigured
    url = BrokerURL.parse(settings.url)
    if url.scheme != "memory":
        check_threads()
    transport: Transport = _door(url, "Transport")(url, settings, Notifier(settings))
    return transport


def open_subscription(
    settings: Settings, queues: Sequence[QueueSpec], prefetch: int
) -> Subscription:
    """Return a subscription to ``queues`` at ``settings.url``, not yet started.

    Args:
        settings: of the publisher of the same broker.
        queues: to consume from.
        prefetch: how many messages of each queue may be out at a time, 1 to 65535.

    Raises:
        UsageError: the URL cannot be consumed from.
    """
    url = BrokerURL.parse(settings.url or "")
    door = _door(url, "Subscription")
    if door is None:
        raise UsageError(f"{url.scheme}:// cannot be consumed from; use amqp:// or sqlite://")
    subscription: Subscription = door(url, settings, queues, prefetch)
    return subscription


def open_parked_queues(settings: Settings) -> ParkedQueues:
    """Return the parking and dead-letter queues at ``settings.url``, not yet connected.

    Raises:
        NotConfigured: there is no URL.
        UsageError: the URL cannot be used, or its transport has no such queues.
    """
    if settings.url is None:
        raise NotConfigured
    url = BrokerURL.parse(settings.url)
    door = _door(url, "ParkedQueues")
    if door is None:
        raise UsageError(
            f"{url.scheme}:// has no queues to look into from outside; use amqp:// or sqlite://"
        )
    parked_queues: ParkedQueues = door(url, settings)
    return parked_queues


def _door(url: BrokerURL, name: str) -> Any:
    """Return the class ``name`` of the transport that ``url`` names, or None if it has none."""
    return getattr(importlib.import_module(_PACKAGES[url.scheme]), name, None)
