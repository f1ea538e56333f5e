"""The worker: takes messages from a subscription and has every one processed and settled."""

from __future__ import annotations

import contextvars
import dataclasses
import inspect
import logging
import math
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any

from outbox import Publisher, UsageError, surroundings
from outbox.configuration import default_publisher
from outbox.consumers import logs
from outbox.consumers.definition import Consumer
from outbox.consumers.hooks import Hook, Hooks, begin_state, declared, end_state
from outbox.consumers.isolation.process_pool import ProcessPool
from outbox.consumers.losses.begun_table import BegunTable, key_of
from outbox.consumers.losses.guarded_message import (
    Guard,
    message_maker,
)
from outbox.consumers.message.deduplication import Inbox, open_inbox
from outbox.consumers.message.tally import Tally
from outbox.consumers.tasks.task_queue import open_results
from outbox.consumers.worker.assignment import Assignment
from outbox.consumers.worker.dispatch_queue import make_dispatch_queue
from outbox.consumers.worker.hook_runner import HookRunner
from outbox.consumers.worker.renewal import Renewal
from outbox.consumers.worker.task_engine import TaskEngine
from outbox.consumers.worker.thread_engine import ThreadEngine
from outbox.consumers.worker.vitals import Vitals
from outbox.consumers.worker.worker_context import MakeMessage, Quota, WorkerContext
from outbox.consumers.worker.worker_stats import QueueStats, WorkerStats
from outbox.messages.delivery import Delivery, QueueSpec
from outbox.observer import seam
from outbox.recurring.recurring_task import RecurringTask
from outbox.system.resident_memory import resident_bytes
from outbox.telemetry import sources
from outbox.telemetry.sources import Samples
from outbox.transports.registry import open_subscription, open_ticker

__all__ = ["Worker"]

logger = logging.getLogger("outbox.consumer")

_RESULTS = 1.0  # seconds for what was handed in last to be written


class Worker:
    """A worker, which runs plain consumers on threads and asynchronous ones as tasks.

    A message is acked after it has been processed and its follow-on events have been confirmed, on
    another connection. While the broker or a database is unavailable, messages are held, not
    failed. The worker reconnects to the broker until it is stopped.

    A plain handler that exceeds its consumer's ``timeout`` can't be stopped. Its message is given
    up, a new thread replaces its thread, and what it publishes from then on is refused: so it may
    still be running beside the next attempt. As many late handlers as there are threads are
    replaced; each further one leaves the worker a thread short until a late handler ends.
    Coroutines are cancelled.

    ``start``, ``stop`` and ``wait`` may be called from any thread, but not from a signal handler.

    Attributes:
        consumers: the consumers, by the name of their queue.
        publisher: the publisher of follow-on events and dead letters.
        threads: the number of messages of plain consumers processed at a time.
        concurrency: the number of messages of asynchronous consumers processed at a time.
        prefetch: the number of messages of each queue that the broker sends ahead.
    """

    def __init__(
        self,
        consumers: Iterable[Consumer | type[Consumer]],
        *,
        publisher: Publisher | None = None,
        threads: int = 8,
        concurrency: int = 100,
        prefetch: int | None = None,
        max_messages: int | None = None,
        ranks: Mapping[str, int] | None = None,
        inbox: Inbox | None = None,
        isolation: ProcessPool | None = None,
        begun: BegunTable | None = None,
    ) -> None:
        """Create a worker, without connecting yet.

        Args:
            consumers: the consumers, as classes or instances, one per queue.
            publisher: the publisher of follow-on events and dead letters; the worker consumes from
                its URL. The default is the process's.
            threads: the number of messages of plain consumers processed at a time, 1 or more.
            concurrency: the number of messages of asynchronous consumers processed at a time, 1 or
                more.
            prefetch: the number of messages of each queue that the broker sends ahead, 1 to 65535.
                The default keeps the worker busy while acks travel: four per thread, at least 50,
                and twice the concurrency if there are asynchronous consumers. Lower it if messages
                take long, so that other workers get their share.
            max_messages: the number of messages to process, 1 or more; then ``wait`` returns True,
                and the caller should stop the worker. None for no limit.
            ranks: the ranks of queues, 0 or more, 0 by default; a message starts only while no
                message of a lower-ranked queue waits.
            inbox: the record of what consumers that ``deduplicate`` have done; the default is in
                the database ``OUTBOX_DATABASE_URL``, or in the file that is consumed from.
            isolation: the subprocesses for plain handlers; None to run them on the threads.
            begun: the table in which worker processes of one parent note what they have begun.

        Raises:
            UsageError: there is no consumer, two have the same queue, one has no ``process`` that
                takes an event, one deduplicates without a database for that, or a number is out of
                range.
        """
        assignment = Assignment(
            consumers,
            threads=threads,
            concurrency=concurrency,
            prefetch=prefetch,
            max_messages=max_messages,
            ranks=ranks,
        )
        self.consumers = assignment.consumers
        self.threads = threads
        self.concurrency = concurrency
        self.prefetch = assignment.prefetch
        self.publisher = publisher or default_publisher()
        settings = self.publisher.settings
        specs = assignment.specs(settings.exchange)
        observer = seam.observer
        consumed = settings if observer is None else observer.consumed_with(settings)
        self._subscription = open_subscription(consumed, specs, self.prefetch)
        recurring = self._recurring()
        self._ticker = open_ticker(consumed, recurring) if recurring else None
        self._quota = None if max_messages is None else Quota(max_messages)
        self._isolation = isolation
        self._begun = begun
        self._guard = Guard(begun)
        self._stopping = threading.Event()
        self._refused = ""
        self._failed = ""
        self._start_failed: Exception | None = None
        self._started = threading.Lock()  # taken for good by start()
        self._tally = Tally(
            {queue: _name_of(consumer) for queue, consumer in self.consumers.items()}
        )
        self._opening = threading.Lock()
        self._is_open = False
        self._results = open_results(consumed, self.consumers.values())
        resting = dict.fromkeys(self.consumers, 0)
        work = WorkerContext(
            consumers=self.consumers,
            publisher=self.publisher,
            subscription=self._subscription,
            inbox=open_inbox(settings, self.consumers.values()) if inbox is None else inbox,
            results=self._results,
            surroundings=surroundings.here(),
            tally=self._tally,
            quota=self._quota,
            on_used_up=self._stopping.set,
            on_failed=self._on_failed,
            make_message=self._message_maker(),
            resting=resting,
            make_dispatch_queue=lambda: make_dispatch_queue(
                _with_priorities(specs) if self._subscription.keeps_order else specs,
                lambda queue: self._subscription.out(queue) - resting[queue],
                self.prefetch,
            ),
        )
        hooks = self._declared_hooks()
        self._threads = (
            ThreadEngine(work, threads, has_hooks=bool(hooks)) if assignment.plain else None
        )
        has_loop = assignment.asynchronous or hooks.need_loop
        self._tasks = TaskEngine(work, concurrency, has_hooks=bool(hooks)) if has_loop else None
        self._hooks = (
            HookRunner(hooks, self._call_hook, self._open, self._on_start_failed) if hooks else None
        )
        self._state: dict[str, Any] = {}
        self._renewal = Renewal(self.publisher, self._subscription, self._receiver())
        sources.register(self, self._tally.samples, _gauges)

    @property
    def has_worked(self) -> bool:
        """Whether a message was started."""
        return any(engine.in_flight.any_begun for engine in self._engines())

    @property
    def used_up(self) -> bool:
        """Whether the worker has processed ``max_messages`` messages."""
        return self._quota is not None and self._quota.used_up

    @property
    def has_begun_all(self) -> bool:
        """Whether ``max_messages`` messages were started; some may still be processed."""
        return self._quota is not None and self._quota.all_begun

    @property
    def is_idle(self) -> bool:
        """Whether a retired worker processes no message any more, except in late handlers."""
        return all(engine.is_idle for engine in self._engines())

    @property
    def is_stopping(self) -> bool:
        """Whether the worker begins no more messages, because it was retired or stopped."""
        return self._stopping.is_set()

    def running(self) -> list[Delivery]:
        """Return the deliveries of the messages that have begun and not ended, held or not."""
        return [delivery for engine in self._engines() for delivery in engine.in_flight.running()]

    def stats(self) -> WorkerStats:
        """Return the worker's counters. Thread-safe; also while it runs, and when it has ended."""
        running = Counter(delivery.queue for delivery in self.running())
        ended = self._tally.read()
        return WorkerStats(
            queues=tuple(
                QueueStats(
                    queue,
                    _name_of(consumer),
                    ended[queue].outcomes,
                    ended[queue].durations,
                    ended[queue].waits,
                    running[queue],
                )
                for queue, consumer in self.consumers.items()
            ),
            late=self.late,
            is_consuming=self.is_consuming,
        )

    def vitals(self) -> Vitals:
        """Return what looks at this worker from a thread, once a second."""
        return Vitals(self._engines(), self._subscription, self.publisher)

    def log_tasks(self) -> None:
        """Log where each task of the event loop waits, if there is one."""
        if self._tasks is not None:
            self._tasks.log_tasks()

    @property
    def late(self) -> int:
        """The number of handlers that go on after their timeout."""
        return sum(engine.late for engine in self._engines())

    @property
    def is_consuming(self) -> bool:
        """Whether the broker delivers messages as soon as there are any.

        A queue that can't be had for now, such as one whose node is down, is left out, unless there
        is no other.
        """
        return self._is_open and self._subscription.is_consuming and not self._failed

    def start(self) -> None:
        """Start consuming, in the background; before that, run the start hooks there.

        Raises:
            UsageError: it was started or stopped before.
        """
        if self._stopping.is_set() or not self._started.acquire(blocking=False):
            raise UsageError("a worker can be started only once; make another Worker()")
        if disabled := logs.disabled_loggers():
            warnings.warn(
                f"the logger {disabled[0].name!r} is disabled, so dead letters go unseen; "
                "configure logging with disable_existing_loggers=False",
                stacklevel=2,
            )
        if self._hooks is None:
            self._start_engines()
            self._open()
        else:
            contextvars.copy_context().run(self._start_engines, with_state=True)
            self._hooks.start()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait at most ``timeout`` seconds for a reason to stop; return whether there is one.

        Raises:
            UsageError: the broker has a queue or exchange with other arguments; its message
                names the argument.
            RuntimeError: the worker can't go on, because a handler has broken its event loop; or a
                start hook has failed, and what it raised is the cause.
        """
        stopped = self._stopping.wait(timeout)
        if self._start_failed is not None:
            raise self._start_failed
        if self._failed:
            raise RuntimeError(f"the worker has failed: {self._failed}")
        if self._refused:
            raise UsageError(f"cannot consume: {self._refused}")
        return stopped

    def take_over(self) -> None:
        """Have what dead siblings of this process held delivered now, if it would come later."""
        begun = self._begun
        if begun is not None and self._is_open and (owners := begun.dead_owners()):

            def was_running(queue: str, message_id: str) -> bool:
                loss = begun.loss_of(key_of(queue, message_id))
                return loss is not None and loss.times > 0

            self._subscription.release_of(owners, was_running)

    def retire(self) -> None:
        """Start no more messages, but let those being processed go on; then call ``stop``.

        What has not started is given back, for other workers.
        """
        self._begin_to_stop()
        for engine in self._engines():
            engine.ask_to_stop(math.inf)
        if self._is_open:
            self._subscription.cancel()
        self.give_back()

    def give_back(self) -> None:
        """Requeue what a retired worker has received and not started, such as what came late."""
        for engine in self._engines():
            engine.in_flight.give_back()

    def stop(self, timeout: float = 30.0) -> bool:
        """Start no more messages, finish those being processed, requeue the rest, disconnect.

        The stop hooks run after the last message.

        Args:
            timeout: seconds for the messages being processed to finish. The others are redelivered
                later; coroutines are cancelled. The stop hooks have what is left of it, at least a
                second.

        Returns:
            Whether all of them finished.
        """
        deadline = time.monotonic() + timeout
        self._begin_to_stop()
        if self._hooks is not None:
            self._hooks.end_start(deadline)
        for engine in self._engines():
            engine.ask_to_stop(deadline)
            engine.begin()
        if self._is_open:
            self._subscription.cancel()
        ends = [engine.stop(deadline) for engine in self._engines()]
        if self._hooks is not None:
            self._hooks.stop(deadline)
            for engine in self._engines():
                engine.end()
            end_state(self._state)
        if self._results is not None:
            self._results.stop(max(deadline, time.monotonic() + _RESULTS))
        self._renewal.stop(deadline)
        if self._isolation is not None:
            self._isolation.end()
        finished = all(ends)
        if not finished:
            logger.warning(
                "some messages did not finish within %.1f s; they will be redelivered", timeout
            )
        if self._begun is not None:
            self._begun.close()  # first: what still runs is redelivered, but not lost
        self._subscription.close()
        return finished

    def _start_engines(self, *, with_state: bool = False) -> None:
        if with_state:
            self._state = begin_state()  # in the context whose copies messages run in
        if self._results is not None:
            self._results.start()
        for engine in self._engines():
            engine.start()
        self.publisher.make_ready()

    def _open(self) -> None:
        """Begin to consume, unless the worker stops already."""
        with self._opening:
            if not self._stopping.is_set():
                self._is_open = True
                if self._begun is not None:
                    self._begun.own(self._subscription.owner)
                    self.take_over()
                self._subscription.start(self._renewal.receiver(), self._on_refused)
                if self._ticker is not None:
                    self._ticker.start()
        for engine in self._engines():
            engine.begin()

    def _begin_to_stop(self) -> None:
        with self._opening:
            self._stopping.set()
            if self._ticker is not None:
                self._ticker.stop()

    def _call_hook(self, hook: Hook) -> Future[None]:
        """Have a hook called on a thread of handlers, or on their loop if it needs one."""
        if self._threads is None or (self._tasks is not None and inspect.iscoroutinefunction(hook)):
            [engine] = self._engines()[-1:]
            return engine.call_hook(hook)
        return self._threads.call_hook(hook)

    def _declared_hooks(self) -> Hooks:
        """Return the hooks to run; the testing kit runs none."""
        return declared()

    def _recurring(self) -> list[RecurringTask]:
        """Return the recurring tasks to tick for; the testing kit ticks for none."""
        return [task for each in self.consumers.values() for task in each._recurring()]

    def _message_maker(self) -> MakeMessage:
        """Return what makes messages; the testing kit makes others."""
        return message_maker(self._guard, self._isolation)

    def _engines(self) -> list[ThreadEngine | TaskEngine]:
        return [engine for engine in (self._threads, self._tasks) if engine is not None]

    def _receiver(self) -> Callable[[Delivery], None]:
        put_of = {
            queue: self._mixed(consumer) if consumer._is_mixed else self._put(consumer)
            for queue, consumer in self.consumers.items()
        }
        puts = list(set(put_of.values()))
        if len(puts) == 1:
            return puts[0]
        return lambda delivery: put_of[delivery.queue](delivery)

    def _put(self, consumer: Consumer) -> Callable[[Delivery], None]:
        """Return what gives a message of ``consumer`` to its engine."""
        engine = self._tasks if consumer.is_async else self._threads
        if engine is None:
            raise RuntimeError(f"there is no engine for {consumer!r}")
        return engine.put

    def _mixed(self, consumer: Consumer) -> Callable[[Delivery], None]:
        """Return what gives each message of a queue to the engine that it needs."""
        on_thread, on_loop = (engine.put for engine in self._engines())

        def put(delivery: Delivery) -> None:
            if consumer._for(delivery).is_async:
                on_loop(delivery)
            else:
                on_thread(delivery)

        return put

    def _on_failed(self, reason: str) -> None:
        self._failed = reason
        self._stopping.set()

    def _on_start_failed(self, error: Exception) -> None:
        self._start_failed = error
        self._stopping.set()

    def _on_refused(self, reason: str) -> None:
        self._refused = reason
        self._stopping.set()


def _gauges(worker: Worker) -> Samples:
    stats = worker.stats()
    return {
        "outbox_connected": {("consumer",): int(stats.is_consuming)},
        "outbox_handlers_late": {(): stats.late},
        "outbox_messages_in_flight": {(each.queue,): each.in_flight for each in stats.queues},
        "outbox_worker_resident_bytes": {(): resident_bytes()},
    }


def _with_priorities(specs: Sequence[QueueSpec]) -> list[QueueSpec]:
    """Return ``specs``, with any priority in queues of tasks: there the urgent overtakes."""
    return [
        dataclasses.replace(spec, max_priority=255)
        if spec.places and not spec.max_priority
        else spec
        for spec in specs
    ]


def _name_of(consumer: Consumer) -> str:
    """Return the name of a consumer's class or function, without where it is local to."""
    name: str = getattr(consumer, "__qualname__", None) or type(consumer).__qualname__
    return name.rpartition("<locals>.")[2]
