"""A RabbitMQ that messages are moved from."""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterator
from typing import NamedTuple, Self

import pika.exceptions

from outbox.errors import UsageError
from outbox.event import Event
from outbox.messages.delivery import QueueSpec, restore_delayed
from outbox.messages.headers import (
    DEAD_AT,
    DEAD_EXCHANGE,
    DEAD_QUEUE,
    DEAD_REASON,
    DEAD_TARGET,
    DELAY_EXCHANGE,
    HEADER_KEY,
    PARKED_AT,
    PARKED_EXCHANGE,
    PARKED_REASON,
    PARKED_TARGET,
    RETURNED,
)
from outbox.messages.message_copy import NotCarried, copy_of, senders_headers
from outbox.settings import Settings
from outbox.transports.message_source import Chosen, Moved, Publish, for_queue, published
from outbox.transports.rabbitmq.delay_ladder import LEVELS, due_at, level
from outbox.transports.rabbitmq.parked_queues import RabbitMQParkedQueues
from outbox.transports.rabbitmq.replayed import HeldMessage
from outbox.url import BrokerURL

__all__ = ["QueueSource"]


class _State(NamedTuple):
    messages: int
    consumers: int


class QueueSource:
    """Queues of a broker, whose messages are held until they are published, and then acked.

    AMQP can't list queues or bindings, so the queues are named.
    """

    def __init__(self, url: BrokerURL, settings: Settings, chosen: Chosen) -> None:
        """Connect to nothing yet.

        Raises:
            UsageError: no queue is named.
        """
        if not chosen.specs:
            raise UsageError(
                "RabbitMQ doesn't list its queues: name the modules of the consumers, or --queue"
            )
        self._chosen = chosen
        self._parked = RabbitMQParkedQueues(url, settings)
        self._places: list[str] = []
        self._levels = {level(number): number for number in range(LEVELS)}

    def __enter__(self) -> Self:
        """Connect, and find the queues that exist."""
        self._parked.__enter__()
        try:
            # From the top: what goes down meanwhile is found below, and at last in its queue.
            places = [*reversed(self._levels), *self._chosen.names()]
            self._places = [place for place in places if self._state(place) is not None]
            names = [spec.name for spec in self._chosen.specs]
            if not set(names).intersection(self._places):
                raise UsageError(f"the broker has no queue {names[0]!r}")
        except BaseException as error:
            self._parked.__exit__(type(error))
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._parked.__exit__(kind)

    def users(self) -> str | None:
        """Return the queues that have consumers; who only publishes can't be seen."""
        consumed = [
            place for place in self._places if (self._state(place) or _State(0, 0)).consumers
        ]
        return f"there are consumers on {', '.join(map(repr, consumed))}" if consumed else None

    def specs(self) -> list[QueueSpec]:
        """Return the queues that are named and exist."""
        return [spec for spec in self._chosen.specs if spec.name in self._places]

    def places(self) -> list[str]:
        """Return the queues of delayed events, then those that were named."""
        return self._places

    def count(self, place: str) -> int:
        """Return the number of messages ready in ``place``; of delayed events, of those chosen."""
        state = self._state(place) or _State(0, 0)
        if place not in self._levels or not state.messages:
            return state.messages
        with self._parked.browse(place, state.messages) as browser:
            found = [each for window in browser.windows() for each in window]
            return sum(self._is_chosen(message) for message in found)

    def in_hand(self) -> str | None:
        """Return which queues have consumers: what these have in hand isn't counted by AMQP."""
        users = self.users()
        return None if users is None else f"{users}, with messages that can't be counted"

    def move(self, place: str, publish: Publish) -> Iterator[Moved]:
        """Move the messages that are ready in ``place`` now, in order."""
        state = self._state(place)
        if state is None or not state.messages:
            return
        with self._parked.browse(place, state.messages) as browser:
            for window in browser.windows():
                left: list[tuple[str, str]] = []
                found: list[tuple[HeldMessage, Event]] = []
                for message in window:
                    if place in self._levels and not self._is_chosen(message):
                        continue
                    event = self._event_of(message)
                    if isinstance(event, str):
                        left.append((message.id, event))
                    else:
                        found.append((message, event))
                done = published(found, publish, left)
                browser.remove(done)
                yield Moved(len(done), left)

    def _state(self, queue: str) -> _State | None:
        """Return what is in a queue, or None if it doesn't exist."""
        try:
            with self._parked.channel(queue) as channel:
                found = channel.queue_declare(queue, passive=True).method
                return _State(found.message_count, found.consumer_count)
        except UsageError as error:
            match error.__cause__:
                case pika.exceptions.ChannelClosedByBroker(reply_code=404):
                    return None
            raise

    def _is_chosen(self, message: HeldMessage) -> bool:
        """Return whether a delayed event goes to one of the queues."""
        delivery = message.delivery
        exchange = ((delivery and delivery.headers) or {}).get(DELAY_EXCHANGE)
        if delivery is None or not isinstance(exchange, str):
            return False
        return self._chosen.has_address(exchange, delivery.target)

    def _event_of(self, message: HeldMessage) -> Event | str:
        """Return the event to publish for a message, or why there is none."""
        delivery = message.delivery
        if delivery is None or message.header is None or not message.readable:
            return "its properties cannot be read"
        if delivery.is_encoded:
            return f"its content encoding {delivery.content_encoding!r} would be lost"
        received = delivery.headers or {}
        restore_delayed(delivery)
        try:
            headers = senders_headers(delivery)
        except NotCarried as why:
            return f"its headers can't be carried: {why}"
        key = headers.pop(HEADER_KEY, None)
        if RETURNED in received:
            headers[RETURNED] = received[RETURNED]
        event = copy_of(delivery, message.queue, {**headers, **_history(message)})
        event = dataclasses.replace(
            event,
            exchange=delivery.exchange,
            target=delivery.target,
            key=key if isinstance(key, str) else None,
        )
        if message.queue not in self._levels:
            return for_queue(event, message.queue)
        moment = datetime.datetime.now(datetime.UTC)
        return dataclasses.replace(
            event,
            deliver_at=due_at(received, self._levels[message.queue], moment),
            unroutable="park",
        )


def _history(message: HeldMessage) -> dict[str, str]:
    """Return outbox's headers for what only the broker's own say of a message."""
    received = (message.delivery and message.delivery.headers) or {}
    named: dict[str, str | None] = {}
    if message.kind == "dead" and DEAD_QUEUE not in received:
        named = {DEAD_QUEUE: message.died_in, DEAD_REASON: message.reason, DEAD_AT: message.at}
        if message.origin is not None:
            named |= {DEAD_EXCHANGE: message.origin.exchange, DEAD_TARGET: message.origin.target}
    elif message.kind == "parked" and PARKED_TARGET not in received and message.origin is not None:
        named = {
            PARKED_REASON: message.reason,
            PARKED_AT: message.at,
            PARKED_EXCHANGE: message.origin.exchange,
            PARKED_TARGET: message.origin.target,
        }
    return {name: value for name, value in named.items() if value is not None}
