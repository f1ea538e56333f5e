"""The transports, and which one a URL names."""

from __future__ import annotations

from collections.abc import Sequence

from outbox import observing
from outbox.errors import NotConfigured, UsageError
from outbox.parked import ParkedQueues
from outbox.runtime import check_threads
from outbox.settings import Settings
from outbox.spread import Spread
from outbox.subscription import QueueSpec, Subscription
from outbox.transport import Transport
from outbox.url import BrokerURL

__all__ = ["open_parked_queues", "open_subscription", "open_transport"]


def open_transport(settings: Settings) -> Transport:
    """Return a transport for ``settings.url``, not yet connected.

    Raises:
        NotConfigured: there is no URL.
        UsageError: the URL cannot be used, or not with the threads that there are.
    """
    if settings.url is None:
        raise NotConfigured
    url = BrokerURL.parse(settings.url)
    spread = Spread(settings)
    if url.scheme == "memory":
        from outbox.transports.memory import MemoryTransport

        return MemoryTransport(spread)
    if url.scheme == "sqlite":
        check_threads()
        from outbox.transports.sqlite import SQLiteTransport

        return SQLiteTransport(url, settings, spread)
    check_threads()
    from outbox.transports.rabbitmq import RabbitMQTransport

    return RabbitMQTransport(url, settings, spread)


def open_subscription(
    settings: Settings, queues: Sequence[QueueSpec], prefetch: int
) -> Subscription:
    """Return a subscription to ``queues`` at ``settings.url``, not yet started.

    Args:
        settings: of the publisher of the same broker.
        queues: to consume from.
        prefetch: how many messages of each queue may be out at a time, 1 to 65535.

    Raises:
        UsageError: the URL cannot be consumed from, or a test records what is published.
    """
    observer = observing.installed()
    if observer is not None:
        settings = observer.consumed_with(settings)
    url = BrokerURL.parse(settings.url or "")
    if url.scheme == "sqlite":
        from outbox.transports.sqlite import SQLiteSubscription

        return SQLiteSubscription(url, settings, queues, prefetch)
    if url.scheme not in ("amqp", "amqps"):
        raise UsageError(f"{url.scheme}:// cannot be consumed from; use amqp:// or sqlite://")
    from outbox.transports.rabbitmq import RabbitMQSubscription

    return RabbitMQSubscription(url, settings, queues, prefetch)


def open_parked_queues(settings: Settings) -> ParkedQueues:
    """Return the parking and dead-letter queues at ``settings.url``, not yet connected.

    Raises:
        NotConfigured: there is no URL.
        UsageError: the URL cannot be used, or its transport has no such queues.
    """
    if settings.url is None:
        raise NotConfigured
    url = BrokerURL.parse(settings.url)
    if url.scheme == "sqlite":
        from outbox.transports.sqlite import SQLiteParkedQueues

        return SQLiteParkedQueues(url, settings)
    if url.scheme not in ("amqp", "amqps"):
        raise UsageError(
            f"{url.scheme}:// has no queues to look into from outside; use amqp:// or sqlite://"
        )
    from outbox.transports.rabbitmq import RabbitMQParkedQueues

    return RabbitMQParkedQueues(url, settings)
