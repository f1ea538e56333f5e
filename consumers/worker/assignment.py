"""The assignment of a worker: its consumers, their queues and its limits, all checked."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from outbox import UsageError
from outbox.consumers.definition import Consumer, check_process, instance_of
from outbox.messages.delivery import QueueSpec

__all__ = ["Assignment"]

_LEAST_PREFETCH = 50
_MOST_PREFETCH = 65535  # AMQP 0-9-1, basic.qos: a short integer


class Assignment:
    """The consumers of a worker, and the number of messages it takes at a time.

    Attributes:
        consumers: the consumers, by the name of their queue.
        plain: whether there are consumers for threads.
        asynchronous: whether there are consumers for tasks.
        prefetch: the number of messages of each queue that the broker sends ahead.
    """

    def __init__(
        self,
        consumers: Iterable[Consumer | type[Consumer]],
        *,
        threads: int,
        concurrency: int,
        prefetch: int | None,
        max_messages: int | None,
        ranks: Mapping[str, int] | None,
    ) -> None:
        """Check the arguments of ``Worker``; see there.

        Raises:
            UsageError: an argument is invalid; the message names the consumer or the number.
        """
        self.consumers = _by_queue(consumers)
        self._ranks = ranks or {}
        for name, number in (("threads", threads), ("concurrency", concurrency)):
            if not isinstance(number, int) or number < 1:
                raise UsageError(f"{name} is {number!r}, not 1 or more")
        for queue in self._ranks:
            if queue not in self.consumers:
                raise UsageError(f"ranks has the queue {queue!r}, which no consumer has")
        self.plain = any(
            consumer._is_mixed or not consumer.is_async for consumer in self.consumers.values()
        )
        self.asynchronous = any(
            consumer._is_mixed or consumer.is_async for consumer in self.consumers.values()
        )
        if prefetch is None:
            busy = max(
                4 * threads if self.plain else 0, 2 * concurrency if self.asynchronous else 0
            )
            prefetch = min(max(_LEAST_PREFETCH, busy), _MOST_PREFETCH)
        if not 1 <= prefetch <= _MOST_PREFETCH:
            raise UsageError(f"prefetch is {prefetch}, not 1 to {_MOST_PREFETCH}")
        if max_messages is not None and max_messages < 1:
            raise UsageError(f"max_messages is {max_messages}, not 1 or more")
        # Messages beyond max_messages would only be requeued.
        self.prefetch = prefetch if max_messages is None else min(prefetch, max_messages)
        self._places = threads * self.plain + concurrency * self.asynchronous

    def specs(self, exchange: str) -> list[QueueSpec]:
        """Return the queues by rank, bound to ``exchange`` unless their consumer names another."""
        specs = [
            dataclasses.replace(
                consumer.spec(exchange),
                rank=self._ranks.get(queue, 0),
                # Between queues with ranks, a full window is the sign that more waits.
                places=self._places if consumer._is_paced and not self._ranks else 0,
            )
            for queue, consumer in self.consumers.items()
        ]
        return sorted(specs, key=lambda spec: spec.rank)


def _by_queue(consumers: Iterable[Consumer | type[Consumer]]) -> dict[str, Consumer]:
    by_queue: dict[str, Consumer] = {}
    for given in consumers:
        consumer = instance_of(given)
        if not consumer.queue:
            raise UsageError(f"the consumer {type(consumer).__qualname__} names no queue")
        if consumer.queue in by_queue:
            raise UsageError(f"two consumers have the queue {consumer.queue!r}")
        check_process(consumer)
        by_queue[consumer.queue] = consumer
    if not by_queue:
        raise UsageError("a worker needs at least one consumer")
    return by_queue
