"""A queue that gets copies of what exchanges route, over aio-pika, until its reader leaves.

The queue belongs to one connection, and goes with it. It is bounded twice: in the broker, which
drops the oldest messages while the network or the event loop is slow, and here, while the reader
is. aio-pika's own reconnecting isn't used: it declares what it has declared before, under the same
name, while the broker may still hold that for the connection that was lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import aio_pika
import aio_pika.abc
import aio_pika.exceptions
import pika

from outbox.credentials import Credentials, CredentialsProvider, credentials_of
from outbox.errors import BrokerError, ConnectFailed, NotConfigured, UsageError
from outbox.settings import Settings
from outbox.system.backoff import backoff
from outbox.transports.rabbitmq.parameters import connection_parameters
from outbox.url import BrokerURL

__all__ = ["Refused", "TappedQueue", "on_rabbitmq"]

logger = logging.getLogger("outbox.tap")

_MOST_MESSAGES = 10_000
_MOST_BYTES = 64 * 1024 * 1024
_ARGUMENTS: dict[str, Any] = {
    "x-queue-type": "classic",  # a vhost may have another default, which can't be exclusive
    "x-max-length": _MOST_MESSAGES,
    "x-max-length-bytes": _MOST_BYTES,
    "x-overflow": "drop-head",
}
_FAILURES = (*aio_pika.exceptions.CONNECTION_EXCEPTIONS, TimeoutError)


class Refused(UsageError):
    """The broker refuses what is to be tapped; the text is its reason."""


def on_rabbitmq(settings: Settings) -> BrokerURL:
    """Return the URL of ``settings``.

    Raises:
        NotConfigured: there is none.
        UsageError: it isn't that of a RabbitMQ.
    """
    if settings.url is None:
        raise NotConfigured
    url = BrokerURL.parse(settings.url)
    if url.scheme not in ("amqp", "amqps"):
        raise UsageError(
            f"a tap watches the exchanges of a RabbitMQ, and {url.scheme}:// has none; use amqp:// "
            "or amqps://"
        )
    return url


class TappedQueue:
    """The messages that the exchanges route from now on. For one event loop, and one reader.

    Attributes:
        dropped: the number of messages that were dropped here because the reader was too slow.
    """

    def __init__(
        self,
        settings: Settings,
        bindings: Sequence[tuple[str, str]],
        *,
        declared: Mapping[str, str],
        on_gap: Callable[[str], object] = lambda text: None,
    ) -> None:
        """Make a queue that isn't connected yet.

        Args:
            settings: the settings with the URL.
            bindings: the exchanges and patterns that it is bound with.
            declared: the type of each exchange that is created if it doesn't exist, and if the
                settings allow that.
            on_gap: called with a sentence when messages may be missing, or are.

        Raises:
            UsageError: there is no URL, or it isn't that of a RabbitMQ.
        """
        self._hosts = connection_parameters(on_rabbitmq(settings), settings, "tap")
        self._bindings = bindings
        self._declared = declared if settings.declare == "create" else {}
        self._credentials = settings.credentials
        self._timeout = settings.connect_timeout
        self._on_gap = on_gap
        self._connection: aio_pika.abc.AbstractConnection | None = None
        self._messages: deque[aio_pika.abc.AbstractIncomingMessage] = deque()
        self._bytes = 0
        self._news = asyncio.Event()
        self._lost = ""
        self._lost_at = 0.0
        self._closed = False
        self.dropped = 0
        self._reported = 0

    async def open(self) -> None:
        """Connect to the first host that can be reached, and bind the queue.

        Raises:
            Refused: an exchange doesn't exist, or a permission is missing.
            ConnectFailed: no host can be reached.
        """
        for number, host in enumerate(self._hosts, 1):
            try:
                await self._connect(host)
                return
            except ConnectFailed:
                if number == len(self._hosts):
                    raise

    async def messages(self) -> AsyncIterator[aio_pika.abc.AbstractIncomingMessage]:
        """Yield the messages, in their order, until it is closed; reconnect where that is needed.

        While the caller works on a message no connection is opened.
        """
        while True:
            if self.dropped > self._reported:
                count, self._reported = self.dropped - self._reported, self.dropped
                self._report(f"{count} message(s) were dropped, because they are read too slowly")
            if self._messages:
                message = self._messages.popleft()
                self._bytes -= len(message.body)
                yield message
            elif self._closed:
                return
            elif self._lost:
                await self._reconnect()
            else:
                self._news.clear()
                await self._news.wait()

    async def close(self) -> None:
        """End ``messages()``, delete the queue and disconnect."""
        self._closed = True
        self._news.set()
        connection, self._connection = self._connection, None
        if connection is not None:
            await self._disconnect(connection)

    async def _reconnect(self) -> None:
        self._report(f"the connection was lost: {self._lost}; reconnecting")
        failures = 0
        while not self._closed:
            host = self._hosts[failures % len(self._hosts)]
            rounds, position = divmod(failures, len(self._hosts))
            if not position and await self._closes_within(backoff(rounds)):
                return
            try:
                await self._connect(host)
            except (BrokerError, Refused) as error:
                logger.debug("%s", error)
                failures += 1
                continue
            seconds = time.monotonic() - self._lost_at
            self._report(f"connected again; messages of the last {seconds:.1f} s may be missing")
            return

    async def _closes_within(self, seconds: float) -> bool:
        self._news.clear()  # nothing else sets it without a connection
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._news.wait(), seconds)
        return self._closed

    async def _connect(self, host: pika.ConnectionParameters) -> None:
        address = f"{host.host}:{host.port}"
        arguments = _arguments(host)
        if self._credentials is not None:
            given = await asyncio.to_thread(_asked, self._credentials)
            if isinstance(given, Exception):
                reason = f"no credentials: {type(given).__qualname__}: {given}"
                raise ConnectFailed(f"cannot connect to {address}: {reason}") from given
            arguments |= {"login": given.user, "password": given.password}
        try:
            # The timeout of connect() isn't enough: aio-pika also waits where it takes none.
            async with asyncio.timeout(self._timeout):
                connection = await aio_pika.connect(**arguments, timeout=self._timeout)
        except aio_pika.exceptions.InvalidFrameError as error:
            reason = "the broker refuses the connection; check the vhost, and the user's access"
            raise ConnectFailed(f"cannot connect to {address}: {reason}") from error
        except _FAILURES as error:
            raise ConnectFailed(f"cannot connect to {address}: {self._cause(error)}") from error
        try:
            async with asyncio.timeout(self._timeout):
                await self._consume(connection)
        except aio_pika.exceptions.ChannelClosed as error:
            await self._disconnect(connection)
            raise Refused(f"cannot tap {address}: {error}") from error
        except _FAILURES as error:
            await self._disconnect(connection)
            raise ConnectFailed(f"cannot tap {address}: {self._cause(error)}") from error
        except BaseException:
            await self._disconnect(connection)
            raise
        if self._closed:
            await self._disconnect(connection)
            return
        self._connection, self._lost = connection, ""

    async def _consume(self, connection: aio_pika.abc.AbstractConnection) -> None:
        for name, kind in self._declared.items():
            try:
                channel = await connection.channel(publisher_confirms=False)
                await channel.declare_exchange(name, kind, durable=True)
                await channel.close()
            except aio_pika.exceptions.ChannelClosed as error:
                # It may exist with another type, or may not be created; binding shows the rest.
                logger.debug("cannot declare the exchange %r: %s", name, error)

        async def on_message(message: aio_pika.abc.AbstractIncomingMessage) -> None:
            self._add(message)

        def on_end(_sender: object, error: BaseException | None = None) -> None:
            self._end(connection, str(error or "") or "it was closed")

        channel = await connection.channel(publisher_confirms=False)
        queue = await channel.declare_queue(exclusive=True, arguments=_ARGUMENTS)
        for exchange, pattern in self._bindings:
            await queue.bind(exchange, pattern)
        connection.close_callbacks.add(on_end)
        channel.close_callbacks.add(on_end)
        underlay = await channel.get_underlay_channel()
        underlay.on_consumer_cancel_callbacks.add(lambda frame: on_end(None))
        self._connection = connection
        await queue.consume(on_message, no_ack=True)

    def _add(self, message: aio_pika.abc.AbstractIncomingMessage) -> None:
        self._messages.append(message)
        self._bytes += len(message.body)
        while len(self._messages) > _MOST_MESSAGES or (
            self._bytes > _MOST_BYTES and len(self._messages) > 1
        ):
            self._bytes -= len(self._messages.popleft().body)
            self.dropped += 1
        self._news.set()

    def _end(self, connection: aio_pika.abc.AbstractConnection, reason: str) -> None:
        if connection is self._connection and not self._lost:
            self._lost, self._lost_at = reason, time.monotonic()
            self._news.set()

    async def _disconnect(self, connection: aio_pika.abc.AbstractConnection) -> None:
        """Close it, whatever its state."""
        if connection is self._connection:
            self._connection = None
        with contextlib.suppress(*_FAILURES):
            async with asyncio.timeout(self._timeout):
                await connection.close()

    def _cause(self, error: BaseException) -> str:
        return str(error) or f"no answer within {self._timeout} s"

    def _report(self, text: str) -> None:
        logger.warning("%s", text)
        self._on_gap(text)


def _asked(provider: CredentialsProvider) -> Credentials | Exception:
    # An exception is returned, since a StopIteration could not be raised from a thread's future.
    try:
        return credentials_of(provider)
    except Exception as error:
        return error


def _arguments(host: pika.ConnectionParameters) -> dict[str, Any]:
    """Return the arguments of ``aio_pika.connect`` for pika's parameters."""
    arguments: dict[str, Any] = {
        "host": host.host,
        "port": host.port,
        "virtualhost": host.virtual_host,
        "heartbeat": host.heartbeat,
        "client_properties": host.client_properties,
    }
    if isinstance(host.credentials, pika.PlainCredentials):
        arguments |= {"login": host.credentials.username, "password": host.credentials.password}
    else:
        arguments["auth"] = "external"
    if host.ssl_options is not None:
        arguments |= {"ssl": True, "ssl_context": host.ssl_options.context}
    return arguments
