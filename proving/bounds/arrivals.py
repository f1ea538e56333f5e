"""What has arrived in a queue, read with plain pika."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pika

from outbox.testing.broker import PrivateBroker

__all__ = ["EXCHANGE", "TARGET", "Arrivals", "arrivals"]

EXCHANGE, TARGET = "bounds", "thing"


@dataclass
class Arrivals:
    """A broker with a queue to which ``TARGET`` on ``EXCHANGE`` leads.

    Attributes:
        url: the URL of the broker.
        channel: a channel to read the queue.
    """

    url: str
    channel: Any

    def ids(self) -> Counter[str]:
        """Remove all messages from the queue, and return how often each id is among them."""
        found: Counter[str] = Counter()
        for _, properties, _ in self.channel.consume(TARGET, auto_ack=True, inactivity_timeout=1):
            if properties is None:
                break
            found[properties.message_id] += 1
        self.channel.cancel()
        return found


@contextlib.contextmanager
def arrivals() -> Iterator[Arrivals]:
    """Start a broker with the queue."""
    with PrivateBroker() as broker:
        connection = pika.BlockingConnection(pika.URLParameters(f"{broker.url}?heartbeat=0"))
        channel = connection.channel()
        channel.exchange_declare(EXCHANGE, "topic", durable=True)
        channel.queue_declare(TARGET, durable=True)
        channel.queue_bind(TARGET, EXCHANGE, TARGET)
        yield Arrivals(broker.url, channel)
        with contextlib.suppress(Exception):  # pika also raises exceptions outside its tree
            connection.close()
