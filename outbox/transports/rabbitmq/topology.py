"""Declares exchanges, queues and bindings, on a separate channel.

The broker closes the channel of a declaration that it refuses (AMQP 0-9-1, 404 and 406), so nothing
else may use that channel.
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pika
import pika.channel
import pika.exceptions

from outbox.messages.delivery import QueueSpec, dead_letter_queue
from outbox.settings import Declare
from outbox.transports.rabbitmq.pika_errors import one_line

__all__ = [
    "DELIVERY_LIMIT",
    "Step",
    "declare",
    "durable_queue",
    "exchange",
    "existing_exchange",
    "is_wrong_usage",
    "obstacle",
    "parking_queue",
    "queue",
    "quorum_queue",
]

DELIVERY_LIMIT = 2**31 - 1
"""In effect no limit, on every version: RabbitMQ 3.10 takes -1 for a limit that is over at once."""

_LIMIT = "x-delivery-limit"
_QUORUM_HAS_TWO_PRIORITIES = (4, 0)
_QUORUM_HAS_PRIORITIES = (4, 3)
_HIGHEST_OF_QUORUM = 31

Step = Callable[[pika.channel.Channel, Callable[[Any], None]], None]
"""A function that makes one declaration on a channel, and the callback for the broker's answer."""


def exchange(name: str, mode: Declare) -> list[Step]:
    """Return the steps that declare the durable topic exchange ``name``.

    The default exchange and the predefined ones (``amq.*``) are never declared.
    """
    if mode == "never" or not name or name.startswith("amq."):
        return []
    return [
        lambda channel, done: channel.exchange_declare(
            name, "topic", passive=mode == "passive", durable=True, callback=done
        )
    ]


def existing_exchange(name: str) -> Step:
    """Return the step that fails if the exchange ``name`` doesn't exist; it needs no permission."""
    return lambda channel, done: channel.exchange_declare(name, passive=True, callback=done)


def queue(spec: QueueSpec, mode: Declare) -> list[Step]:
    """Return the steps that declare a consumer's queue, its dead-letter queue and its bindings.

    Both are durable; the dead-letter queue is always a quorum queue
    (``docs/decisions/0003-queue-arguments.md`` says why, and why an argument must never change;
    ``0007-priorities.md`` is about queues with priorities).
    """
    if mode == "never":
        return []
    arguments: dict[str, Any] = {
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": dead_letter_queue(spec.name),
        "x-overflow": "reject-publish",
    }
    passive = mode == "passive"
    if spec.queue_type == "quorum":
        arguments["x-dead-letter-strategy"] = "at-least-once"
        consumed = quorum_queue(spec.name, arguments, passive=passive)
    else:
        arguments["x-queue-type"] = "classic"
        if spec.max_priority is not None:
            arguments["x-max-priority"] = spec.max_priority
        consumed = durable_queue(spec.name, arguments, passive=passive)

    def bound(topic: str) -> Step:
        return lambda channel, done: channel.queue_bind(
            spec.name, spec.exchange, topic, callback=done
        )

    steps = [quorum_queue(dead_letter_queue(spec.name), passive=passive), consumed]
    if mode == "create" and spec.exchange:
        steps += [bound(topic) for topic in dict.fromkeys((spec.name, *spec.topics))]
    return steps


def obstacle(spec: QueueSpec, version: tuple[int, ...]) -> str | None:
    """Return why a broker can't give a queue its priorities, or None if it can or that is unknown.

    This is checked because the broker accepts such a queue, and then ignores the priorities.

    Args:
        spec: the queue.
        version: the broker's major and minor version; empty if unknown.
    """
    if spec.max_priority is None or spec.queue_type == "classic" or not version:
        return None
    problem = f"queue {spec.name!r} asks for a quorum queue with priorities up to "
    problem += f"{spec.max_priority}, but in RabbitMQ {'.'.join(map(str, version))} "
    advice = "omit queue_type for a classic queue, which supports them"
    if version < _QUORUM_HAS_TWO_PRIORITIES:
        return f"{problem}quorum queues have no priorities; {advice}"
    if version < _QUORUM_HAS_PRIORITIES:
        return (
            f"{problem}quorum queues have two, up to 4 and above, and deliver them in turns; omit "
            f"max_priority if that is enough, or {advice}"
        )
    if spec.max_priority > _HIGHEST_OF_QUORUM:
        return f"{problem}quorum queues have priorities up to {_HIGHEST_OF_QUORUM}; {advice}"
    return None


def is_wrong_usage(refused: str, mode: Declare) -> bool:
    """Return whether the broker refuses a queue until its user changes something.

    All else passes by itself: the node of a classic queue is down (a 404 as well), another
    connection has the queue for itself (a 405, or a 403 "in exclusive use").

    Args:
        refused: the reply text, such as ``NOT_FOUND - no queue 'a' in vhost '/'``.
        mode: whether queues may be declared: a queue that is missing nevertheless was just deleted.
    """
    if refused.startswith("ACCESS_REFUSED"):
        return not refused.endswith("in exclusive use")
    if refused.startswith("NOT_FOUND"):
        return mode != "create" and refused.startswith("NOT_FOUND - no ")
    return refused.startswith("PRECONDITION_FAILED")


def parking_queue(name: str, mode: Declare) -> list[Step]:
    """Return the step that declares the durable quorum queue for unroutable events.

    There is none unless ``mode`` is ``create``: a passive declaration would be of no use.
    """
    if mode != "create":
        return []
    return [quorum_queue(name)]


def durable_queue(name: str, arguments: dict[str, Any], *, passive: bool = False) -> Step:
    """Return the step that declares a durable queue."""
    return lambda channel, done: channel.queue_declare(
        name, passive=passive, durable=True, arguments=arguments, callback=done
    )


def quorum_queue(
    name: str, arguments: dict[str, Any] | None = None, *, passive: bool = False
) -> Step:
    """Return the step that declares a durable quorum queue without a limit of deliveries.

    RabbitMQ 4 otherwise gives up a message that came back 20 times, even if nothing has looked at
    it. A queue that exists without the argument is accepted as it is.
    """
    return QuorumQueue(name, {"x-queue-type": "quorum", **(arguments or {})}, passive)


@dataclass(frozen=True, slots=True)
class QuorumQueue:
    """A step that declares a quorum queue, and what to do where it exists without a limit."""

    name: str
    arguments: dict[str, Any]
    passive: bool
    is_limited: bool = True

    def __call__(self, channel: pika.channel.Channel, done: Callable[[Any], None]) -> None:
        """Declare the queue."""
        limit = {_LIMIT: DELIVERY_LIMIT} if self.is_limited else {}
        durable_queue(self.name, {**self.arguments, **limit}, passive=self.passive)(channel, done)

    def without_limit(self) -> QuorumQueue:
        """Return the step that declares it as earlier versions of outbox did."""
        return dataclasses.replace(self, is_limited=False)

    def is_older(self, refused: str) -> bool:
        """Return whether the broker refused only the limit: it compares that argument last."""
        is_of_limit = refused.startswith("PRECONDITION_FAILED") and f"'{_LIMIT}'" in refused
        return self.is_limited and is_of_limit


def declare(
    connection: pika.SelectConnection,
    steps: Sequence[Step],
    done: Callable[[str | None], None],
    *,
    older: Callable[[str], object] = lambda queue: None,
    counted: Callable[[str, int], object] = lambda queue, messages: None,
) -> None:
    """Run ``steps`` one after the other; then call ``done`` with None or the broker's refusal.

    ``done`` isn't called if the connection ends first.

    Args:
        connection: an open connection.
        steps: the steps.
        done: the callback for the end.
        older: the callback for the name of a queue that exists without our delivery limit.
        counted: the callback for the name of a quorum queue and the number of messages ready in it.
    """
    if not steps:
        done(None)
        return
    waiting = deque(steps)
    current: Step | None = None

    def next_step(channel: pika.channel.Channel) -> None:
        nonlocal current
        current = waiting.popleft() if waiting else None
        if current is None:
            channel.close()
        else:
            current(channel, lambda answer: on_answer(channel, answer))

    def on_answer(channel: pika.channel.Channel, answer: Any) -> None:
        if isinstance(current, QuorumQueue):
            counted(current.name, answer.method.message_count)
        next_step(channel)

    def on_refused(refused: str) -> None:
        if not (isinstance(current, QuorumQueue) and current.is_older(refused)):
            done(refused)
        elif connection.is_open:
            older(current.name)
            waiting.appendleft(current.without_limit())
            connection.channel(on_open_callback=on_open)

    def on_close(_channel: pika.channel.Channel, reason: Exception) -> None:
        match reason:
            case pika.exceptions.ChannelClosedByBroker():
                refused = one_line(reason.reply_text)
                connection.ioloop.call_later(0, lambda: on_refused(refused))
            case pika.exceptions.ChannelClosedByClient():
                connection.ioloop.call_later(0, lambda: done(None))

    def on_open(channel: pika.channel.Channel) -> None:
        channel.add_on_close_callback(on_close)
        next_step(channel)

    connection.channel(on_open_callback=on_open)
