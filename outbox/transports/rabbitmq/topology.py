"""Declares exchanges, queues and bindings, on a channel of its own.

A declaration that the broker refuses closes the channel it was made on (AMQP 0-9-1, 404 and 406);
nothing else uses this one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pika
import pika.channel
import pika.exceptions

from outbox.settings import Declare
from outbox.subscription import QueueSpec, dead_letter_queue
from outbox.transports.rabbitmq.failures import one_line

__all__ = ["Step", "declare", "durable_queue", "exchange", "parking_queue", "queue"]

Step = Callable[[pika.channel.Channel, Callable[[Any], None]], None]
"""Makes one declaration on a channel and has the callback called with the broker's answer."""


def exchange(name: str, mode: Declare) -> list[Step]:
    """Return the steps that declare the durable topic exchange ``name``.

    The default exchange and the broker's own (``amq.*``) are never declared.
    """
    if mode == "never" or not name or name.startswith("amq."):
        return []
    return [
        lambda channel, done: channel.exchange_declare(
            name, "topic", passive=mode == "passive", durable=True, callback=done
        )
    ]


def queue(spec: QueueSpec, mode: Declare) -> list[Step]:
    """Return the steps that declare a consumer's queue, its dead-letter queue and its bindings.

    Both are durable quorum queues (``docs/decisions/0003-queue-arguments.md`` says why, and why
    their arguments must never change).
    """
    if mode == "never":
        return []
    dead = dead_letter_queue(spec.name)
    arguments = {
        "x-queue-type": "quorum",
        "x-dead-letter-exchange": "",
        "x-dead-letter-routing-key": dead,
        "x-dead-letter-strategy": "at-least-once",
        "x-overflow": "reject-publish",
    }

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


def parking_queue(name: str, mode: Declare) -> list[Step]:
    """Return the step that declares the durable quorum queue for events that no queue would have.

    Only where declaring is asked for; elsewhere it is there already, or it is not.
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
    """Take ``steps`` one after the other; then call ``done``, with what the broker refused, if so.

    ``done`` is not called when the connection ends first.
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
