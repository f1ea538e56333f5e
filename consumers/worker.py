"""The threaded worker: takes messages from a subscription and settles every one."""

from __future__ import annotations

import contextvars
import dataclasses
import logging
import threading
import time
from collections.abc import Iterable, Mapping

from outbox import Publisher, UsageError
from outbox.configuration import default_publisher
from outbox.consumers import life
from outbox.consumers.consumer import Consumer
from outbox.consumers.dead_letter import dead_letter
from outbox.consumers.inbox import make_inbox
from outbox.consumers.outcome import Ack, Dead, Hold, Outcome, Return
from outbox.subscription import Delivery
from outbox.transports import open_subscription

__all__ = ["Worker"]

logger = logging.getLogger("outbox.consumer")

_PAUSE = 0.5


class Worker:
    """Runs consumers on a pool of threads until it is stopped.

    A message is acked when it has been processed and its follow-on events are confirmed, on
    another connection. While the broker takes no events, messages are held, not failed. The link to
    the broker is reopened for as long as the worker runs.

    ``start``, ``stop`` and ``wait`` may be called from any thread, but not from a signal handler.
    """

    def __init__(
        self,
        consumers: Iterable[Consumer | type[Consumer]],
        *,
        publisher: Publisher | None = None,
        threads: int = 8,
        prefetch: int | None = None,
        ranks: Mapping[str, int] | None = None,
    ) -> None:
        """Make a worker; nothing is connected yet.

        Args:
            consumers: classes or instances, one a queue.
            publisher: of the follow-on events and dead letters; its URL is consumed from. The
                default is the process's own.
            threads: how many messages are processed at a time, 1 or more.
            prefetch: how many messages of each queue the broker sends ahead, 1 to 65535. The
                default keeps the threads busy while acks travel: four a thread, at least 50.
                Lower it when messages take long, so that other workers get their share.
            ranks: of queues, from 0 on, which is that of all others: no message is begun while one
                of a queue with a lower rank waits.

        Raises:
            UsageError: there is no consumer, two have the same queue, or a number is out of range.
        """
        self.consumers: dict[str, Consumer] = {}
        for one in consumers:
            consumer = one() if isinstance(one, type) else one
            if not consumer.queue:
                raise UsageError(f"the consumer {type(consumer).__qualname__} names no queue")
            if consumer.queue in self.consumers:
                raise UsageError(f"two consumers want the queue {consumer.queue!r}")
            self.consumers[consumer.queue] = consumer
        if not self.consumers:
            raise UsageError("a worker needs at least one consumer")
        if threads < 1:
            raise UsageError(f"threads is {threads}, not 1 or more")
        self.threads = threads
        self.prefetch = max(50, 4 * threads) if prefetch is None else prefetch
        if not 1 <= self.prefetch <= 65535:
            raise UsageError(f"prefetch is {prefetch}, not 1 to 65535")
        self.publisher = publisher or default_publisher()
        settings = self.publisher.settings
        specs = [
            dataclasses.replace(one.spec(settings.exchange), rank=(ranks or {}).get(one.queue, 0))
            for one in self.consumers.values()
        ]
        specs.sort(key=lambda spec: spec.rank)
        self._subscription = open_subscription(settings, specs, self.prefetch)
        self._inbox = make_inbox(specs, self._subscription.out, self.prefetch)
        self._pool: list[threading.Thread] = []
        self._stopping = threading.Event()
        self._finished = threading.Event()
        self._refused = ""

    def start(self) -> None:
        """Begin to consume, in the background."""
        context = contextvars.copy_context()
        self._pool = [
            threading.Thread(
                target=self._work, args=(context,), name=f"outbox-worker-{number}", daemon=True
            )
            for number in range(1, self.threads + 1)
        ]
        for thread in self._pool:
            thread.start()
        self.publisher.make_ready()
        self._subscription.start(self._inbox.put, self._on_refused)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the worker is asked to stop, at most ``timeout`` seconds; return whether so.

        Raises:
            UsageError: the broker has a queue or exchange with other arguments; its message
                names the argument.
        """
        stopped = self._stopping.wait(timeout)
        if self._refused:
            raise UsageError(f"the broker refused what the consumers declare: {self._refused}")
        return stopped

    def stop(self, timeout: float = 30.0) -> bool:
        """Take no more messages, finish those being processed, give back the rest, disconnect.

        Args:
            timeout: seconds that the messages being processed have. What is not finished then is
                delivered again, later.

        Returns:
            Whether all of them finished.
        """
        deadline = time.monotonic() + timeout
        self._stopping.set()
        self._subscription.cancel()
        for _ in self._pool:
            self._inbox.put(None)
        for thread in self._pool:
            thread.join(max(0.0, deadline - time.monotonic()))
        finished = not any(thread.is_alive() for thread in self._pool)
        if not finished:
            logger.warning("some messages did not finish within %.1f s: they come again", timeout)
        self._subscription.close()
        return finished

    def settle(self, delivery: Delivery, outcome: Outcome) -> None:
        """Do with ``delivery`` what ``outcome`` says: the one place that settles messages."""
        match outcome:
            case Ack():
                self._subscription.ack(delivery)
            case Dead():
                self._bury(delivery, outcome)
            case Return(delay=delay):
                self._subscription.requeue(delivery, delay)
            case Hold():
                raise AssertionError("a held message is processed again, not settled")

    def _work(self, context: contextvars.Context) -> None:
        while (delivery := self._inbox.get()) is not None:
            if self._stopping.is_set() or self._subscription.is_stale(delivery):
                continue  # it is given back when the subscription closes, or was already
            try:
                self._handle(delivery, context)
            except BaseException:  # a bug of ours must end neither the thread nor the message
                logger.exception("could not handle message %r", delivery.message_id)
                self._subscription.requeue(delivery, _PAUSE)

    def _handle(self, delivery: Delivery, context: contextvars.Context) -> None:
        consumer = self.consumers[delivery.queue]
        while True:
            outcome = context.copy().run(life.run, consumer, delivery, self.publisher)
            if not isinstance(outcome, Hold):
                self.settle(delivery, outcome)
                return
            logger.warning("holding message %r: %s", delivery.message_id, outcome.error)
            if not self._pause(delivery):
                return

    def _pause(self, delivery: Delivery) -> bool:
        """Wait for the publisher; return False if the message is no longer ours to settle."""
        self._stopping.wait(_PAUSE)
        while not self._stopping.is_set() and not self._subscription.is_stale(delivery):
            if self.publisher.connected:
                return True
            self._stopping.wait(_PAUSE)
        return False

    def _bury(self, delivery: Delivery, outcome: Dead) -> None:
        """Publish ``delivery`` to its dead letters, and ack it when that is confirmed."""
        logger.error(
            "message %r of %r goes to the dead letters: %r",
            delivery.message_id,
            delivery.queue,
            outcome.reason,
            exc_info=outcome.error,
        )
        letter = dead_letter(delivery, outcome)
        while True:
            report = self.publisher.publish([letter], keep=False)
            if report.ok:
                self._subscription.ack(delivery)
                return
            logger.error("the dead letter %r is not published yet: %s", letter.id, report)
            if report.error is None:
                self._subscription.declare_again()  # somebody deleted the dead letters' queue
            if not self._pause(delivery):
                return

    def _on_refused(self, reason: str) -> None:
        self._refused = reason
        self._stopping.set()
