"""The table of transports, by URL scheme. A new transport needs a line here."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from outbox.backlog.notifier import Notifier
from outbox.errors import NotConfigured, UsageError
from outbox.messages.delivery import QueueSpec
from outbox.recurring.recurring_task import RecurringTask
from outbox.settings import Settings
from outbox.system.threads import check_threads
from outbox.transports.backlogged import BackloggedTransport
from outbox.transports.parked_queues import ParkedQueues
from outbox.transports.presence_records import PresenceRecords
from outbox.transports.subscription import Subscription
from outbox.transports.tick_records import TickRecords
from outbox.transports.ticker import Ticker
from outbox.transports.transport import Transport
from outbox.url import BrokerURL

if TYPE_CHECKING:
    from outbox.storage.store import Store

__all__ = [
    "open_parked_queues",
    "open_presence_records",
    "open_store",
    "open_subscription",
    "open_tick_records",
    "open_ticker",
    "open_transport",
]

_PACKAGES = {
    "amqp": "outbox.transports.rabbitmq",
    "amqps": "outbox.transports.rabbitmq",
    "mariadb": "outbox.transports.database",
    "memory": "outbox.transports.memory",
    "postgresql": "outbox.transports.database",
    "sqlite": "outbox.transports.database",
}
"""The package of each scheme. It has the class ``Transport``, and if it can be consumed from,
``Subscription``, ``ParkedQueues``, ``Ticker`` and ``TickRecords``; if it is that of databases, also
``PresenceRecords`` and ``store_at``. It is imported on first use, so that an application needs only
the drivers it uses."""

_WITH_QUEUES = "amqp://, postgresql://, mariadb:// or sqlite://"


def open_transport(settings: Settings) -> Transport:
    """Return a transport for ``settings.url``, not yet connected.

    Raises:
        NotConfigured: there is no URL.
        UsageError: the URL is invalid, the spool can't be used, or a publisher's thread can't work
            in this process.
    """
    url = _configured(settings)
    if url.scheme != "memory":
        check_threads()
    notify = Notifier(settings)
    transport: Transport = _member_for(url, "Transport")(url, settings, notify)
    if settings.spool and isinstance(transport, BackloggedTransport):
        from outbox.spool.spooling import Spooling

        transport.use_spool(Spooling(url, settings, transport, notify))
    return transport


def open_subscription(
    settings: Settings, queues: Sequence[QueueSpec], prefetch: int
) -> Subscription:
    """Return a subscription to ``queues`` at ``settings.url``, not yet started.

    Args:
        settings: the settings of the publisher for the same broker.
        queues: the queues to consume from.
        prefetch: the maximum of unsettled messages per queue, 1 to 65535.

    Raises:
        UsageError: the URL is invalid, its transport can't be consumed from, or a queue is ordered
            and its transport keeps no order.
    """
    url = BrokerURL.parse(settings.url or "")
    subscription_class = _class_with_queues(url, "Subscription", "cannot be consumed from")
    if not subscription_class.keeps_order and (ordered := [q.name for q in queues if q.ordered]):
        raise UsageError(
            f"the consumer of {ordered[0]!r} is ordered, but {url.scheme}:// keeps no order of "
            "keys; use a database (postgresql://, mariadb:// or sqlite://), or set ordered = False"
        )
    subscription: Subscription = subscription_class(url, settings, queues, prefetch)
    return subscription


def open_parked_queues(settings: Settings) -> ParkedQueues:
    """Return the parking and dead-letter queues at ``settings.url``, not yet connected.

    Raises:
        NotConfigured: there is no URL.
        UsageError: the URL is invalid, or its transport has no such queues.
    """
    url = _configured(settings)
    parked_class = _class_with_queues(url, "ParkedQueues", "has no parked messages")
    parked_queues: ParkedQueues = parked_class(url, settings)
    return parked_queues


def open_ticker(settings: Settings, tasks: Sequence[RecurringTask]) -> Ticker:
    """Return a ticker for recurring tasks at ``settings.url``, not yet started.

    Raises:
        UsageError: the URL is invalid, or its transport can't do what a task asks for.
    """
    url = BrokerURL.parse(settings.url or "")
    ticker_class = _class_with_queues(url, "Ticker", "has no recurring tasks")
    ticker: Ticker = ticker_class(url, settings, tasks)
    return ticker


def open_tick_records(settings: Settings) -> TickRecords:
    """Return the records of recurring tasks at ``settings.url``, not yet connected.

    Raises:
        NotConfigured: there is no URL.
        UsageError: the URL is invalid, or its transport has no recurring tasks.
    """
    url = _configured(settings)
    records_class = _class_with_queues(url, "TickRecords", "has no recurring tasks")
    records: TickRecords = records_class(url, settings)
    return records


def open_presence_records(settings: Settings) -> PresenceRecords | None:
    """Return the records of processes at ``settings.url``; None where they leave none.

    Raises:
        NotConfigured: there is no URL.
        UsageError: the URL is invalid.
    """
    url = _configured(settings)
    if url.scheme == "sqlite":  # each commit wakes all of its processes, which are on one machine
        return None
    records_class = _member_for(url, "PresenceRecords")
    records: PresenceRecords | None = records_class and records_class(url)
    return records


def open_store(settings: Settings) -> Store | None:
    """Return the store of the rows at ``settings.url``; None where that isn't a database.

    Its engine is its own, and the caller's to dispose of.

    Raises:
        NotConfigured: there is no URL.
        UsageError: the URL is invalid.
    """
    url = _configured(settings)
    store_at = _member_for(url, "store_at")
    store: Store | None = store_at and store_at(url)
    return store


def _configured(settings: Settings) -> BrokerURL:
    if settings.url is None:
        raise NotConfigured
    return BrokerURL.parse(settings.url)


def _class_with_queues(url: BrokerURL, name: str, refusal: str) -> Any:
    """Return the class ``name`` of the transport for ``url``; raise ``UsageError`` without one."""
    found = _member_for(url, name)
    if found is None:
        raise UsageError(f"{url.scheme}:// {refusal}; use {_WITH_QUEUES}")
    return found


def _member_for(url: BrokerURL, name: str) -> Any:
    """Return what the transport for ``url`` has by this name, a class or a function, or None."""
    return getattr(importlib.import_module(_PACKAGES[url.scheme]), name, None)
