"""Lists and deletes the queues of recurring tasks, also of tasks that no program has any more."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Sequence
from typing import Self

import pika
import pika.spec
from pika.adapters.blocking_connection import BlockingChannel

from outbox.errors import UsageError
from outbox.recurring.recurring_task import TickRecord
from outbox.settings import Settings
from outbox.transports.rabbitmq.parked_queues import RabbitMQParkedQueues
from outbox.transports.rabbitmq.recurring.schedule_messages import (
    Hello,
    Planned,
    read_message,
    register_queue,
    tick_queue_name,
)
from outbox.url import BrokerURL

__all__ = ["RabbitMQTickRecords"]

_MOST = 100_000  # messages
_PATIENCE = 1.0
"""Seconds to wait for a schedule: there may be none."""


class RabbitMQTickRecords:
    """The register of a queue of tasks, and the queues that it names. For one thread.

    AMQP can't list queues. So the worker that writes the first schedule of a task adds its name to
    the register, a queue of names.
    """

    def __init__(self, url: BrokerURL, settings: Settings) -> None:
        """Create it, without connecting yet."""
        self._queues = RabbitMQParkedQueues(url, settings)

    def __enter__(self) -> Self:
        """Connect.

        Raises:
            ConnectFailed: no host answers.
        """
        self._queues.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._queues.__exit__(kind)

    def all(self, queue: str) -> Sequence[TickRecord]:
        """Return the records of ``queue``, by name; a schedule is held by the task's worker."""
        records: list[TickRecord] = []
        for name in sorted(self._names(queue)):
            workers = self._workers(tick_queue_name(queue, name))
            if workers is not None:
                record = TickRecord(name, has_worker=workers > 0)
                records.append(record if workers else self._with_schedule(queue, record))
        return records

    def forget(self, queue: str, name: str) -> bool:
        """Delete the queue of a task; return whether there was one."""
        tick_queue = tick_queue_name(queue, name)
        is_there = self._workers(tick_queue) is not None
        if is_there:
            with self._queues.channel() as channel:
                channel.queue_delete(tick_queue)
        self._names(queue, without=name)
        return is_there

    def _names(self, queue: str, *, without: str | None = None) -> set[str]:
        """Return the names in the register, and delete one there."""
        names: set[str] = set()
        register = register_queue(queue)
        if self._workers(register) is None:
            return names
        with self._queues.browse(register, _MOST) as browsing:
            for window in browsing.windows():
                read = [(message, read_message(message.body)) for message in window]
                known = [(message, each.id) for message, each in read if isinstance(each, Hello)]
                browsing.remove([message for message, name in known if name == without])
                names.update(name for _, name in known)
        return names - {without}

    def _workers(self, queue: str) -> int | None:
        """Return the number of consumers of a queue, or None if it doesn't exist."""
        try:
            with self._queues.channel(queue) as channel:
                declared = channel.queue_declare(queue, passive=True)
                return int(declared.method.consumer_count)
        except UsageError as error:
            if "has no queue" not in str(error):
                raise
            return None

    def _with_schedule(self, queue: str, record: TickRecord) -> TickRecord:
        """Return a record with what is in the queue of a task that no worker has.

        The consumer ends with its channel, never before: a worker that starts meanwhile must not be
        active while the schedule is held here.
        """
        tick_queue = tick_queue_name(queue, record.name)
        found: list[Planned] = []

        def receive(
            channel: BlockingChannel,
            method: pika.spec.Basic.Deliver,
            properties: pika.BasicProperties,
            body: bytes,
        ) -> None:
            planned = read_message(body)
            if isinstance(planned, Planned):
                found.append(planned)
                if method.redelivered:  # RabbitMQ 4 drops what came back 20 times
                    channel.basic_publish("", tick_queue, body, properties)
                    channel.basic_ack(method.delivery_tag)

        with self._queues.channel(tick_queue) as channel:
            channel.tx_select()
            channel.basic_consume(tick_queue, receive)
            deadline = time.monotonic() + _PATIENCE
            while not found and time.monotonic() < deadline:
                self._queues.work(_PATIENCE / 10)
            channel.tx_commit()
        if not found:
            return record
        planned = functools.reduce(Planned.merged, found)
        return dataclasses.replace(
            record, schedule=planned.text, next_at=planned.next_at, last_at=planned.last_at
        )
