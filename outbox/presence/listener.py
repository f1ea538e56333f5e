"""Listens to what worker and relay processes announce."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import AsyncIterator, Callable

from outbox.presence.announcement import ENDED, Announcement
from outbox.settings import Settings

__all__ = ["heard", "listen"]

WHOLE_INTERVAL = 13.0
"""Seconds in which each process that is there announces itself once, and a little more."""


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


def listen(seconds: float = WHOLE_INTERVAL, *, settings: Settings) -> list[Announcement]:
    """Return the latest announcement of each process that is heard, by host and process id.

    Those that announce their end meanwhile are left out. ``ago`` is by the clock of this process.

    Args:
        seconds: how long to listen, 0 or more. Every process announces itself within 12.
        settings: see :func:`heard`.

    Raises:
        UsageError, ConnectFailed: see :func:`heard`.
    """
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
    latest = [
        dataclasses.replace(announcement, ago=now - at)
        for at, announcement in found.values()
        if announcement.phase != ENDED
    ]
    return sorted(latest, key=lambda each: (each.host, each.pid, each.process))
