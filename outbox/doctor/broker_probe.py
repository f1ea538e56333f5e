"""A connection that asks RabbitMQ what it knows and permits, and changes nothing.

A permission is tried with a request that is refused in any case, but for another reason once the
user has the permission: the broker checks permissions first (``rabbit_channel.erl``). So nothing is
declared, bound, published or consumed.
"""

from __future__ import annotations

import contextlib
import copy
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import pika
import pika.exceptions
from pika.adapters.blocking_connection import BlockingChannel

from outbox.errors import BrokerError, ConnectFailed
from outbox.messages.dead_letters import PARKING_QUEUE
from outbox.messages.delivery import QueueSpec
from outbox.settings import Settings
from outbox.transports.rabbitmq import pika_errors, topology
from outbox.transports.rabbitmq.browser import broker_errors
from outbox.transports.rabbitmq.login import Login
from outbox.transports.rabbitmq.parameters import connection_parameters
from outbox.transports.rabbitmq.pika_connection import BlockingConnection
from outbox.transports.rabbitmq.topology import QuorumQueue
from outbox.url import BrokerURL

__all__ = ["REFUSED_LOGIN", "BrokerProbe", "Queue", "Refusal", "WriteAttempts"]

ACCESS_REFUSED, NOT_FOUND, PRECONDITION_FAILED = 403, 404, 406
_BLOCKED_FOR = 2.0  # seconds after which pika gives up a blocked connection

REFUSED_LOGIN = (
    pika.exceptions.ProbableAuthenticationError,
    pika.exceptions.ProbableAccessDeniedError,
    pika.exceptions.AuthenticationError,
)
"""Causes of a failed connection that are about the user or the vhost."""


@dataclass(frozen=True, slots=True)
class Queue:
    """What a passive declaration says of a queue."""

    messages: int
    consumers: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """The broker's reply when it closed a channel."""

    code: int
    text: str


@dataclass(slots=True)
class WriteAttempts:
    """The answers to publishing to some exchanges.

    Attributes:
        refused: by exchange, None where the user may publish.
        blocked: why the broker takes no messages from anyone, such as ``low on memory``; None if it
            does.
    """

    refused: dict[str, Refusal | None] = field(default_factory=dict)
    blocked: str | None = None


class BrokerProbe:
    """A connection to ask questions over. For one thread.

    Its methods raise ``BrokerError`` if the connection is lost.
    """

    def __init__(
        self, connection: BlockingConnection, parameters: pika.ConnectionParameters
    ) -> None:
        self._connection = connection
        self._parameters = parameters
        self.address = f"{parameters.host}:{parameters.port}"

    @classmethod
    def open(cls, url: BrokerURL, settings: Settings) -> Self:
        """Connect to the first host that answers.

        Raises:
            ConnectFailed: no host does; the message is about the last one.
            UsageError: the options of the URL are wrong.
        """
        failure: BrokerError = ConnectFailed("the URL has no host")
        for parameters in connection_parameters(url, settings, "doctor"):
            address = f"{parameters.host}:{parameters.port}"
            try:
                if settings.credentials is not None:
                    Login(settings.credentials).prepare(parameters, address)
                return cls(BlockingConnection(parameters), parameters)
            except ConnectFailed as error:  # there are no credentials
                failure = error
            except Exception as error:
                failure = pika_errors.connect_failed(error, address)
        raise failure

    def close(self) -> None:
        """Close the connection."""
        with contextlib.suppress(pika.exceptions.AMQPError, OSError):
            self._connection.close()

    @property
    def version(self) -> tuple[int, ...]:
        """The major and minor version; empty if unknown."""
        return self._connection.version

    @property
    def product(self) -> str:
        """The name of the server."""
        return self._property("product")

    @property
    def cluster(self) -> str:
        """The name of the cluster."""
        return self._property("cluster_name")

    @property
    def login(self) -> tuple[str, str]:
        """User and password of the connection; empty where it has logged in with a certificate."""
        credentials = self._parameters.credentials
        if not isinstance(credentials, pika.PlainCredentials):
            return "", ""
        return str(credentials.username), str(credentials.password)

    @property
    def heartbeat(self) -> int:
        """The heartbeat that both sides agreed on, in seconds; 0 for none."""
        return self._connection.tuned[0]

    @property
    def frame_max(self) -> int:
        """The size of a frame that both sides agreed on, in bytes; 0 for no limit."""
        return self._connection.tuned[1]

    def queue(self, name: str) -> Queue | None:
        """Return what the broker says of a queue, or None if there is none."""
        found: list[Queue] = []

        def ask(channel: BlockingChannel) -> None:
            answer = channel.queue_declare(name, passive=True).method
            found.append(Queue(int(answer.message_count), int(answer.consumer_count)))

        self._refusal(ask)
        return found[0] if found else None

    def has_exchange(self, name: str) -> bool:
        """Return whether an exchange exists."""
        return self._refusal(lambda channel: channel.exchange_declare(name, passive=True)) is None

    def differences(self, spec: QueueSpec) -> list[tuple[str, Refusal]]:
        """Return the existing queues of a consumer that are not as they would be declared.

        What exists is declared again as it is expected, which changes nothing.
        """
        return [
            (step.name, refusal)
            for step in _declarations(topology.queue(spec, "create"))
            if self.queue(step.name) is not None
            and (refusal := self._declared(step)) is not None
            and refusal.code != ACCESS_REFUSED
        ]

    def difference_of_exchange(self, name: str) -> Refusal | None:
        """Return why an existing exchange is not as it would be declared."""
        refusal = self._refusal(
            lambda channel: channel.exchange_declare(name, "topic", durable=True)
        )
        return refusal if refusal is not None and refusal.code != ACCESS_REFUSED else None

    def may_declare_queue(self, name: str) -> Refusal | None:
        """Return why the user may not declare a queue: no queue expires after 0 ms."""
        return self._forbidden(
            lambda channel: channel.queue_declare(name, durable=True, arguments={"x-expires": 0})
        )

    def may_declare_exchange(self, name: str) -> Refusal | None:
        """Return why the user may not declare an exchange: no alternate exchange is a number."""
        return self._forbidden(
            lambda channel: channel.exchange_declare(
                name, "topic", durable=True, arguments={"alternate-exchange": 1}
            )
        )

    def may_bind(self, queue: str, exchange: str) -> Refusal | None:
        """Return why the user may not bind a queue: what is not bound can be unbound."""
        key = f"outbox.doctor.{uuid.uuid4().hex}"
        return self._forbidden(lambda channel: channel.queue_unbind(queue, exchange, key))

    def may_consume(self, queue: str) -> Refusal | None:
        """Return why the user may not consume: no priority of a consumer is a text."""
        return self._forbidden(
            lambda channel: channel.basic_consume(
                queue, lambda *_: None, arguments={"x-priority": "doctor"}
            )
        )

    def attempt_writes(self, exchanges: Sequence[str]) -> WriteAttempts:
        """Publish messages that expire at no time that there is, over a connection apart.

        The broker stops reading from a connection that publishes during an alarm.
        """
        attempts = WriteAttempts()
        parameters = copy.copy(self._parameters)
        parameters.blocked_connection_timeout = _BLOCKED_FOR
        with broker_errors(self.address):
            connection = BlockingConnection(parameters)

        def on_blocked(_: object, frame: Any) -> None:
            attempts.blocked = pika_errors.one_line(frame.method.reason) or "blocked"

        connection.add_on_connection_blocked_callback(on_blocked)
        properties = pika.BasicProperties(expiration="doctor")  # type: ignore[no-untyped-call]
        key = f"outbox.doctor.{uuid.uuid4().hex}"
        try:
            for exchange in exchanges:
                if attempts.blocked is not None:
                    break
                channel = connection.channel()
                refused: Refusal | None = None
                try:
                    channel.confirm_delivery()
                    channel.basic_publish(exchange, key, b"", properties, mandatory=True)
                except pika.exceptions.ChannelClosedByBroker as error:
                    refused = _refusal_of(error)
                except pika.exceptions.ConnectionBlockedTimeout:
                    attempts.blocked = attempts.blocked or "blocked"
                    break
                is_refused = refused is not None and refused.code != PRECONDITION_FAILED
                attempts.refused[exchange] = refused if is_refused else None
                connection.process_data_events(0)
        finally:
            connection.abandon()
        return attempts

    def _property(self, name: str) -> str:
        value = self._connection.server_properties.get(name, "")
        return pika_errors.one_line(value) if isinstance(value, str | bytes) else ""

    def _declared(self, step: QuorumQueue) -> Refusal | None:
        def declare(channel: BlockingChannel) -> None:
            limit = {"x-delivery-limit": topology.DELIVERY_LIMIT} if step.is_limited else {}
            channel.queue_declare(step.name, durable=True, arguments={**step.arguments, **limit})

        refusal = self._refusal(declare)
        if refusal is not None and step.is_older(refusal.text):
            return self._declared(step.without_limit())
        return refusal

    def _forbidden(self, request: Callable[[BlockingChannel], object]) -> Refusal | None:
        refusal = self._refusal(request)
        return refusal if refusal is not None and refusal.code == ACCESS_REFUSED else None

    def _refusal(self, request: Callable[[BlockingChannel], object]) -> Refusal | None:
        """Make a request on a separate channel; return why the broker closed it, if it did."""
        with broker_errors(self.address):
            channel = self._connection.channel()
            try:
                request(channel)
            except pika.exceptions.ChannelClosedByBroker as error:
                return _refusal_of(error)
            channel.close()
        return None


def _refusal_of(error: pika.exceptions.ChannelClosedByBroker) -> Refusal:
    return Refusal(error.reply_code, pika_errors.one_line(error.reply_text))


class _Recorder:
    """Stands for a channel, and notes which queues would be declared on it."""

    def __init__(self) -> None:
        self.declared: list[QuorumQueue] = []

    def queue_declare(self, name: str, *, arguments: dict[str, Any], **_: object) -> None:
        self.declared.append(QuorumQueue(name, arguments, passive=False, is_limited=False))

    def queue_bind(self, *_: object, **__: object) -> None:
        pass


def _declarations(steps: Sequence[topology.Step]) -> list[QuorumQueue]:
    recorder: Any = _Recorder()
    for step in steps:
        if isinstance(step, QuorumQueue):
            recorder.declared.append(step)
        else:
            step(recorder, lambda _: None)
    return list(recorder.declared)


def queues_of(specs: Sequence[QueueSpec]) -> list[str]:
    """Return the names of all queues that belong to consumers, and the parking queue."""
    names: dict[str, None] = {}
    for spec in specs:
        names[spec.name] = names[f"{spec.name}.dead"] = None
    return [*names, PARKING_QUEUE]
