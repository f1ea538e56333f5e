"""Listens to what worker and relay processes announce, or reads what they have left."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Callable

from outbox.errors import UsageError
from outbox.presence.announcement import ENDED, Announcement
from outbox.settings import Settings
from outbox.transports.registry import open_presence_records
from outbox.url import BrokerURL

__all__ = ["heard", "listen"]

WHOLE_INTERVAL = 13.0
"""Seconds in which each process that is there announces itself once, and a little more."""


_SILENT_AFTER = 2.5
"""Intervals, each of which may be a fifth longer, after which a process has probably died."""


async def heard(
    settings: Settings, *, on_gap: Callable[[str], object] = lambda text: None
) -> AsyncIterator[Announcement]:
    """Yield the announcements as they arrive, of all processes on the broker's vhost.

    Messages on that exchange that are none are skipped. Close the iterator, or end the task, to
    disconnect.

    Args:
        settings: the settings with the URL. The exchange is created if it is missing and they
            allow that.
        on_gap: see :class:`outbox.tap.Tap`.

    Raises:
        UsageError: the URL isn't that of a RabbitMQ, the exchange doesn't exist, or a permission is
            missing.
        ConnectFailed: the broker can't be reached at the start.
    """
    from outbox.tap.tapped_queue import TappedQueue  # slow, as it imports aio-pika
    from outbox.transports.rabbitmq.presence.announcer import PRESENCE_EXCHANGE

    queue = TappedQueue(
        settings,
        [(PRESENCE_EXCHANGE, "")],
        declared={PRESENCE_EXCHANGE: "fanout"},
        on_gap=on_gap,
    )
    await queue.open()
    try:
        async for message in queue.messages():
            announcement = Announcement.parse(message.body)
            if announcement is not None:
                yield announcement
    finally:
        await queue.close()


def listen(
    seconds: float = WHOLE_INTERVAL,
    *,
    settings: Settings,
    on_wait: Callable[[], object] = lambda: None,
) -> list[Announcement]:
    """Return the latest announcement of each process, by host and process id.

    RabbitMQ passes announcements on and keeps none, so there this listens. A database has the
    latest ones, and this reads those of processes that have not been silent for too long. Those
    that have announced their end are left out. ``ago`` is by the clock of this process, or of the
    database.

    Args:
        seconds: how long to listen, 0 or more. Every process announces itself within 12.
        settings: the settings with the URL.
        on_wait: called before this begins to listen.

    Raises:
        UsageError: see :func:`heard`; or with ``sqlite://``, where nothing is announced.
        BrokerError: the broker can't be reached.
    """
    records = open_presence_records(settings)
    if records is not None:
        latest = [_aged(Announcement.parse(text.encode()), ago) for text, ago in records.read()]
        found = [one for one in latest if one is not None and not _is_silent(one)]
    else:
        _check_announced(settings)
        on_wait()
        found = _listened(seconds, settings)
    present = [one for one in found if one.phase != ENDED]
    return sorted(present, key=lambda each: (each.host, each.pid, each.process))


def _check_announced(settings: Settings) -> None:
    scheme = BrokerURL.parse(settings.url or "").scheme
    if scheme not in ("amqp", "amqps"):
        raise UsageError(
            f"with {scheme}:// nothing is announced, as all processes are on one machine: "
            "`outbox workers status` without --all shows them"
        )


def _listened(seconds: float, settings: Settings) -> list[Announcement]:
    """Return the latest announcement of each process that is heard."""
    import asyncio

    found: dict[str, tuple[float, Announcement]] = {}

    async def collect() -> None:
        async for announcement in heard(settings):
            found[announcement.process] = time.monotonic(), announcement

    async def run() -> None:
        collecting = asyncio.create_task(collect())
        done, _ = await asyncio.wait([collecting], timeout=seconds)
        collecting.cancel()
        if done:
            collecting.result()
        await asyncio.wait([collecting])

    asyncio.run(run())
    now = time.monotonic()
    return [dataclasses.replace(one, ago=now - at) for at, one in found.values()]


def _aged(announcement: Announcement | None, ago: float) -> Announcement | None:
    return announcement and dataclasses.replace(announcement, ago=ago)


def _is_silent(announcement: Announcement) -> bool:
    """Return whether two announcements in a row are missing."""
    return announcement.ago > _SILENT_AFTER * announcement.interval
