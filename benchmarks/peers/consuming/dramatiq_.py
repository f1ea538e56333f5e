"""Dramatiq with ``confirm_delivery`` and its default middleware."""

from __future__ import annotations

import dramatiq
from dramatiq.brokers.rabbitmq import RabbitmqBroker

from benchmarks.peers.consuming import DRAMATIQ_QUEUE, THREADS, Countdown

_PADDING = "x" * 40  # so that the whole message, with its envelope, has about 200 bytes


def fill(url: str, messages: int) -> None:
    _fill(url, messages, "last", DRAMATIQ_QUEUE)


def fill_middle(url: str, messages: int) -> None:
    _fill(url, messages, "middle", DRAMATIQ_QUEUE)


def consume(url: str, messages: int) -> float:
    """Consume the messages from ``fill``."""
    countdown = Countdown(messages)
    broker = _broker(url)

    @dramatiq.actor(broker=broker, queue_name=DRAMATIQ_QUEUE, actor_name="last")
    def last(padding: str) -> None:
        countdown.handle()

    return _run(broker, countdown, {DRAMATIQ_QUEUE})


def consume_and_publish(url: str, messages: int, *, threads: int = THREADS) -> float:
    """Consume the messages from ``fill_middle``, and send a message for each."""
    countdown = Countdown(messages)
    broker = _broker(url)

    @dramatiq.actor(broker=broker, queue_name=f"{DRAMATIQ_QUEUE}_last", actor_name="last")
    def last(padding: str) -> None:
        raise NotImplementedError("these are never consumed")

    @dramatiq.actor(broker=broker, queue_name=DRAMATIQ_QUEUE, actor_name="middle")
    def middle(padding: str) -> None:
        last.send(padding)
        countdown.handle()

    return _run(broker, countdown, {DRAMATIQ_QUEUE}, threads)


def _broker(url: str, *, confirm: bool = True) -> RabbitmqBroker:
    return RabbitmqBroker(url=f"{url}?heartbeat=600", confirm_delivery=confirm)


def _run(
    broker: RabbitmqBroker, countdown: Countdown, queues: set[str], threads: int = THREADS
) -> float:
    worker = dramatiq.Worker(broker, queues=queues, worker_threads=threads)
    worker.start()
    countdown.wait()
    worker.stop()
    broker.close()
    return countdown.rate


def _fill(url: str, messages: int, name: str, queue: str) -> None:
    broker = _broker(url, confirm=False)  # faster; the messages are counted afterwards

    @dramatiq.actor(broker=broker, queue_name=queue, actor_name=name)
    def actor(padding: str) -> None:
        """Do nothing here; another process runs the actor."""

    for _ in range(messages):
        actor.send(_PADDING)
    broker.close()
