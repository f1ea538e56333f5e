"""A bare loop over pika's ``BlockingConnection`` that acks each message."""

from __future__ import annotations

from typing import Any

import pika

from benchmarks.peers.consuming import PREFETCH, QUEUE, Countdown


def consume(url: str, messages: int) -> float:
    countdown = Countdown(messages)
    connection = pika.BlockingConnection(pika.URLParameters(url))
    channel: Any = connection.channel()
    channel.basic_qos(prefetch_count=PREFETCH)

    def on_message(_channel: Any, method: Any, _properties: Any, _body: bytes) -> None:
        countdown.handle()
        channel.basic_ack(method.delivery_tag)
        if countdown.is_over:
            channel.stop_consuming()

    channel.basic_consume(QUEUE, on_message)
    channel.start_consuming()
    connection.close()
    return countdown.rate
