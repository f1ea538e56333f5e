"""The tap: an asynchronous iterator of the events that pass by."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from typing import Self

from outbox.configuration import configured_publisher, overriding_url, provided_publisher
from outbox.errors import UsageError
from outbox.header_values import check_name
from outbox.messages.received_event import ReceivedEvent
from outbox.settings import Settings
from outbox.tap.tapped_queue import TappedQueue

__all__ = ["Tap"]


class Tap:
    """An asynchronous iterator of the events that pass through a RabbitMQ, and takes none away.

    It gets a copy of each event that exchanges route from when it has connected, through a queue
    that belongs to its connection and disappears with it. What is in the application's queues stays
    there::

        async for event in Tap("order.*"):
            print(event.target, event.payload)

    Copies may be missing, and the tap says so in ``on_gap`` and in its log: while it is not
    connected, and when more than 10,000 events (or 64 MiB) wait for a reader that is slower than
    their publishers, where the oldest are dropped. So a tap is for looking, not for working.

    As a context manager it is connected when the block begins, and closed at its end. Without one
    it connects at the first step of ``async for``, and is closed when that ends. For one event
    loop, and one reader at a time.

    Attributes:
        settings: the settings, of which those of connections and the exchange are used.
    """

    def __init__(
        self,
        *patterns: str,
        url: str | None = None,
        exchange: str | Iterable[str] | None = None,
        on_gap: Callable[[str], object] = lambda text: None,
        settings: Settings | None = None,
    ) -> None:
        """Make a tap that isn't connected yet.

        Args:
            *patterns: the targets, in which ``*`` stands for one word and ``#`` for any number of
                them; all targets without one.
            url: ``amqp(s)://user:password@host[:port][,host2...]/vhost``; the default is that of
                ``configure()``, or ``OUTBOX_URL``.
            exchange: the exchange or exchanges; the default is the one that events are published
                to, which is created if it doesn't exist yet, unless the setting ``declare`` is
                another than ``create``. The default exchange ``""`` can't be tapped.
            on_gap: called with a sentence when events may be missing, or are: when the connection
                is lost, when it is back, when events were dropped.
            settings: the settings to use instead of those, such as ``publisher.settings``.

        Raises:
            NotConfigured: there is no URL.
            UsageError: the URL isn't that of a RabbitMQ, or a pattern or exchange can't be used.
        """
        self.settings = settings = settings or _settings(url)
        own = settings.exchange
        exchanges = [own] if exchange is None else _listed(exchange)
        _check(patterns, exchanges)
        self._queue = TappedQueue(
            settings,
            [(each, pattern) for each in exchanges for pattern in patterns or ("#",)],
            declared={own: "topic"} if own in exchanges else {},
            on_gap=on_gap,
        )
        self._opened = False

    @property
    def dropped(self) -> int:
        """The number of events that were dropped here because they were read too slowly.

        Those that the broker has dropped, which happens only while the event loop or the network
        doesn't keep up, aren't counted.
        """
        return self._queue.dropped

    async def __aenter__(self) -> Self:
        """Connect; events that are published from now on are seen.

        Raises:
            UsageError: an exchange doesn't exist, a permission is missing, or it was opened before.
            ConnectFailed: the broker can't be reached. Once connected, the tap reconnects.
        """
        if self._opened:
            raise UsageError("a tap can be opened only once; make another Tap()")
        self._opened = True
        await self._queue.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def __aiter__(self) -> AsyncIterator[ReceivedEvent]:
        """Yield the events, in the order in which the broker has routed them.

        The payload of one that another client has published may be of any kind: then accessing it
        raises ``ValueError``.

        Raises:
            UsageError: as for a block; likewise ConnectFailed.
        """
        opens = not self._opened
        if opens:
            await self.__aenter__()
        try:
            async for message in self._queue.messages():
                yield ReceivedEvent.from_aio_pika(message)
        finally:
            if opens:
                await self.close()

    async def close(self) -> None:
        """End the iteration and disconnect. Closing twice is harmless."""
        await self._queue.close()


def _settings(url: str | None) -> Settings:
    if url is None and overriding_url() is None:
        publisher = provided_publisher() or configured_publisher()
        if publisher is not None:
            return publisher.settings
    return Settings.load(url or overriding_url(), {})


def _listed(exchange: str | Iterable[str]) -> list[str]:
    return [exchange] if isinstance(exchange, str) else list(dict.fromkeys(exchange))


def _check(patterns: Iterable[str], exchanges: list[str]) -> None:
    for pattern in patterns:
        check_name("pattern", pattern)
        if "://" in pattern:
            raise UsageError("a pattern is a URL; pass that as Tap(..., url=...)")
    if not exchanges:
        raise UsageError("there is no exchange to tap; leave exchange= out for the usual one")
    for exchange in exchanges:
        check_name("exchange", exchange)
        if not exchange:
            raise UsageError(
                "the default exchange can't be tapped: no queue can be bound to it; name another"
            )
