"""Lists, replays and deletes parked messages over RabbitMQ."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Self

import pika
import pika.exceptions

from outbox.backlog.notifier import Notifier
from outbox.errors import BrokerError, ConnectFailed, Nacked, OutboxError
from outbox.event import Event
from outbox.messages.parked_message import ParkedMessage, ReplayResult
from outbox.settings import Settings
from outbox.transports.rabbitmq import pika_connection, pika_errors
from outbox.transports.rabbitmq.amqp.encoder import Encoder
from outbox.transports.rabbitmq.browser import Browser, broker_errors
from outbox.transports.rabbitmq.link import quiet_pika
from outbox.transports.rabbitmq.login import Login
from outbox.transports.rabbitmq.parameters import connection_parameters
from outbox.transports.rabbitmq.replayed import Replayed, replayed
from outbox.transports.rabbitmq.transport import RabbitMQTransport
from outbox.url import BrokerURL

__all__ = ["RabbitMQParkedQueues", "VerbatimEncoder"]

_NOT_FOUND = 404


class VerbatimEncoder(Encoder):
    """Encodes replayed messages with their original properties. Thread-safe."""

    def encode(self, event: Event) -> bytes:
        """Return the frames of ``event``, joined."""
        if not isinstance(event, Replayed):
            return super().encode(event)
        header = event.header.encode(len(event.body))
        return self.frames(event.exchange, event.target, header, event.body)


class RabbitMQParkedQueues:
    """The parking and dead-letter queues of a broker. For one thread.

    A context manager: entering it opens the connection that holds messages. The first replay opens
    another one to publish with.
    """

    def __init__(self, url: BrokerURL, settings: Settings) -> None:
        self._url = url
        # Replays go to the messages' exchanges; none must be created here.
        self._settings = dataclasses.replace(settings, declare="never", unroutable="fail")
        self._hosts = connection_parameters(url, self._settings, "parked")
        self._connection: pika_connection.BlockingConnection | None = None
        self._host = 0
        self._transport: RabbitMQTransport | None = None
        self._exchanges: dict[str, str | None] = {"": None}

    def __enter__(self) -> Self:
        """Connect to the first host that answers.

        Raises:
            ConnectFailed: no host does; the message is about the last one.
        """
        quiet_pika()
        for number, host in enumerate(self._hosts):
            self._host = number
            try:
                if self._settings.credentials is not None:
                    Login(self._settings.credentials).prepare(host, self._address)
                self._connection = pika_connection.BlockingConnection(host)
            except ConnectFailed as error:
                failure: BrokerError = error
            except Exception as error:
                failure = pika_errors.connect_failed(error, self._address)
            else:
                return self
        raise failure

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Ctrl-C may have interrupted pika in the middle of a call, so that it can't do the closing
        # handshake; for the broker, the end of the socket is enough.
        interrupted = kind is not None and not issubclass(kind, Exception)
        transport, self._transport = self._transport, None
        if transport is not None:
            transport.close(graceful=not interrupted)
        if self._connection is None or not self._connection.is_open:
            return
        if interrupted:
            self._connection.abandon()
            return
        with contextlib.suppress(pika.exceptions.AMQPError, OSError):
            self._connection.close()

    def count(self, queue: str) -> int:
        """Return the number of messages waiting in ``queue``.

        Raises:
            UsageError: the queue doesn't exist, or access is denied.
            BrokerError: the connection was lost.
        """
        with self.channel(queue) as channel:
            return int(channel.queue_declare(queue, passive=True).method.message_count)

    @contextlib.contextmanager
    def browse(self, queue: str, bound: int) -> Iterator[Browser]:
        """Hold up to ``bound`` messages of ``queue`` for a block; the rest then goes back.

        Raises:
            UsageError: the broker refuses to deliver from the queue.
            BrokerError: the connection was lost; the broker has requeued the messages.
        """
        browser = Browser(self._opened, self._address, queue, bound)
        try:
            yield browser
        except Exception:
            with contextlib.suppress(OutboxError):
                browser.give_back()
            raise
        # Anything else, such as Ctrl-C, ends the connection, which requeues the messages as well.
        browser.give_back()

    def obstacle(self, message: ParkedMessage, *, to_origin: bool) -> str | None:
        """Return why a replay of ``message`` would fail, as far as that is known beforehand.

        This detects a missing exchange: publishing to it would close the channel, and nothing would
        be known about the other messages in flight (AMQP 0-9-1, basic.publish).
        """
        event = replayed(message, to_origin=to_origin)
        return event if isinstance(event, str) else self._missing(event.exchange)

    def replay(self, messages: Sequence[ParkedMessage], *, to_origin: bool) -> ReplayResult:
        """Publish ``messages`` as one chunk and wait for the confirms, answering heartbeats.

        If the connection for publishing is lost, the result has the ``error``; messages without a
        confirm are then neither ``done`` nor ``left``.

        Raises:
            BrokerError: the connection that holds the messages was lost.
        """
        failed: list[tuple[ParkedMessage, str]] = []
        events = []
        for message in messages:
            event = replayed(message, to_origin=to_origin)
            reason = event if isinstance(event, str) else self._missing(event.exchange)
            if isinstance(event, Replayed) and reason is None:
                events.append(event)
            else:
                failed.append((message, str(reason)))
        if not events:
            return ReplayResult((), tuple(failed))
        publisher = self._publisher()
        chunk = publisher.prepare(events, keep=False)
        publisher.hand_in(chunk)
        future = chunk.future
        # An empty callback wakes process_data_events() once the report is there.
        future.add_done_callback(lambda _: self._opened.add_callback_threadsafe(lambda: None))
        with broker_errors(self._address):
            while not future.done():
                self._opened.process_data_events(1.0)
        report = future.result()
        lost = report.error if not isinstance(report.error, Nacked) else None
        for rejected, why in report.rejected:
            if isinstance(rejected, Replayed) and (lost is None or why != f"withdrawn: {lost}"):
                failed.append((rejected.message, why.removeprefix("withdrawn: ")))
        done = tuple(event.message for event in report.published if isinstance(event, Replayed))
        return ReplayResult(done, tuple(failed), lost)

    def _publisher(self) -> RabbitMQTransport:
        if self._transport is None:
            # Begin with the host that has answered.
            hosts = (*self._url.hosts[self._host :], *self._url.hosts[: self._host])
            url = dataclasses.replace(self._url, hosts=hosts)
            self._transport = RabbitMQTransport(
                url, self._settings, Notifier(self._settings), VerbatimEncoder()
            )
        return self._transport

    def _missing(self, exchange: str) -> str | None:
        """Return the broker's reply if ``exchange`` doesn't exist, or None."""
        if exchange not in self._exchanges:
            self._exchanges[exchange] = None
            with broker_errors(self._address):
                channel = self._opened.channel()
                try:
                    channel.exchange_declare(exchange, passive=True)
                except pika.exceptions.ChannelClosedByBroker as error:
                    if error.reply_code == _NOT_FOUND:
                        self._exchanges[exchange] = f"{error.reply_code} {error.reply_text}"
                else:
                    channel.close()
        return self._exchanges[exchange]

    @contextlib.contextmanager
    def channel(
        self, queue: str = ""
    ) -> Iterator[pika.adapters.blocking_connection.BlockingChannel]:
        """Use a channel for a block.

        Raises:
            UsageError: the broker refuses something; if ``queue`` is given, perhaps since that
                doesn't exist.
            BrokerError: the connection was lost.
        """
        with broker_errors(self._address, queue):
            channel = self._opened.channel()
            yield channel
            channel.close()

    def work(self, seconds: float) -> None:
        """Wait at most ``seconds`` for messages of consumers, and have them handled.

        Raises:
            BrokerError: the connection was lost.
        """
        with broker_errors(self._address):
            self._opened.process_data_events(seconds)

    @property
    def _opened(self) -> pika_connection.BlockingConnection:
        if self._connection is None:
            raise ConnectFailed("not connected")
        return self._connection

    @property
    def _address(self) -> str:
        host = self._hosts[self._host]
        return f"{host.host}:{host.port}"
