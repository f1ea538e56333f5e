"""A kombu ``Consumer`` over py-amqp that acks each message."""

from __future__ import annotations

import kombu

from benchmarks.peers.consuming import PREFETCH, QUEUE, Countdown


def consume(url: str, messages: int) -> float:
    countdown = Countdown(messages)

    def on_message(message: kombu.Message) -> None:
        countdown.handle()
        message.ack()

    with kombu.Connection(url) as connection, connection.channel() as channel:
        queue = kombu.Queue(QUEUE, no_declare=True)
        with kombu.Consumer(channel, [queue], on_message=on_message, prefetch_count=PREFETCH):
            while not countdown.is_over:
                connection.drain_events(timeout=60)
    return countdown.rate
