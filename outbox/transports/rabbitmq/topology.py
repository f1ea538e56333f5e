"""Declares exchanges, queues and bindings, on a separate channel.

The broker closes the channel of a declaration that it refuses (AMQP 0-9-1, 404 and 406), so nothing
else may use that channel.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pika
import pika.channel
import pika.exceptions

from outbox.messages.delivery import QueueSpec, dead_letter_queue
from outbox.settings import Declare
from outbox.transports.rabbitmq.pika_errors import one_line

__all__ = [
    "Step",
    "declare",
    "durable_queue",
    "exchange",
    "existing_exchange",
    "obstacle",
    "parking_queue",
    "queue",
]

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
    (``docs/decisions/0003-queue-arguments.md`` says why, and why the arguments must never change;
    ``0007-priorities.md`` is about queues with priorities).
    """
    if mode == "never":
        return []
    dead = dead_letter_queue(spec.name)
    arguments: dict[str, Any] = {
        "x-queue-type": spec.queue_type,
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": dead,
        "x-overflow": "reject-publish",
    }
    if spec.queue_type == "quorum":
        arguments["x-dead-letter-strategy"] = "at-least-once"
    elif spec.max_priority is not None:
        arguments["x-max-priority"] = spec.max_priority

    def bound(topic: str) -> Step:
        return lambda channel, done: channel.queue_bind(
            spec.name, spec.exchange, topic, callback=done
        )

    passive = mode == "passive"
    steps = [
        durable_queue(dead, {"x-queue-type": "quorum"}, passive=passive),
        durable_queue(spec.name, arguments, passive=passive),
    ]
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


def parking_queue(name: str, mode: Declare) -> list[Step]:
    """Return the step that declares the durable quorum queue for unroutable events.

    There is none unless ``mode`` is ``create``: a passive declaration would be of no use.
    """
    if mode != "create":
        return []
    return [durable_queue(name, {"x-queue-type": "quorum"})]


def durable_queue(name: str, arguments: dict[str, Any], *, passive: bool = False) -> Step:
    """Return the step that declares a durable queue."""
    return lambda channel, done: channel.queue_declare(
        name, passive=passive, durable=True, arguments=arguments, callback=done
    )


def declare(
    connection: pika.SelectConnection,
    steps: Sequence[Step],
    done: Callable[[str | None], None],
) -> None:
    """Run ``steps`` one after the other; then call ``done`` with None or the broker's refusal.

    ``done`` isn't called if the connection ends first.
    """
    if not steps:
        done(None)
        return
    waiting = iter(steps)

    def next_step(channel: pika.channel.Channel) -> None:
        step = next(waiting, None)
        if step is None:
            channel.close()
        else:
            step(channel, lambda _answer: next_step(channel))

    def on_close(_channel: pika.channel.Channel, reason: Exception) -> None:
        match reason:
            case pika.exceptions.ChannelClosedByBroker():
                connection.ioloop.call_later(0, lambda: done(one_line(reason.reply_text)))
            case pika.exceptions.ChannelClosedByClient():
                connection.ioloop.call_later(0, lambda: done(None))

    def on_open(channel: pika.channel.Channel) -> None:
        channel.add_on_close_callback(on_close)
        next_step(channel)

    connection.channel(on_open_callback=on_open)
