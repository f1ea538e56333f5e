"""The messages that an engine has started, including those that no thread or task works on.

An ``Unconfirmed`` message waits here while its thread or task goes on with another message.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from contextvars import Context
from functools import partial

from outbox import PublishReport
from outbox.backlog.chunk import Chunk
from outbox.consumers.message.message import Message
from outbox.consumers.message.services import Services
from outbox.consumers.message.steps import Step, Steps, call
from outbox.consumers.outcome import Outcome, Unconfirmed
from outbox.consumers.worker.worker_context import WorkerContext
from outbox.messages.delivery import Delivery

__all__ = ["Life", "InFlight"]

logger = logging.getLogger("outbox.consumer")


class Life:
    """A message that was started; one thread or task at a time works on it.

    Attributes:
        message: the message.
        steps: the steps to take next.
        context: the context to take them in.
    """

    __slots__ = ("context", "message", "steps")

    def __init__(
        self, message: Message, steps: Steps[Outcome | Unconfirmed | None], context: Context
    ) -> None:
        """Create the life, without taking a step yet."""
        self.message = message
        self.steps = steps
        self.context = context


class InFlight:
    """The lives of an engine, including those that wait until their chunk is reported. Thread-safe.

    Those whose events are all confirmed end on this object's thread, where only an ack is left to
    do. The others may call the application or wait: their deliveries are put into the engine once
    more. There are at most as many waiting lives as the broker sends messages ahead.

    Attributes:
        any_begun: whether a message was started.
    """

    def __init__(
        self, work: WorkerContext, services: Services, put: Callable[[Delivery], object]
    ) -> None:
        """Create the collection, without any life yet.

        Args:
            work: the context of the engine.
            services: the services of the engine.
            put: puts a delivery into the engine as if it were new.
        """
        self.any_begun = False
        self._work = work
        self._services = services
        self._put = put
        self._timeout = work.publisher.settings.timeout
        self._unconfirmed: dict[Life, tuple[float, Chunk]] = {}  # with the deadline, in its order
        self._stopping = False
        self._all_confirmed = threading.Event()
        self._reported: queue.SimpleQueue[tuple[Life, PublishReport] | None] = queue.SimpleQueue()
        self._put_again: dict[Delivery, Life] = {}

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="outbox-worker-confirms", daemon=True).start()

    def of(self, delivery: Delivery, context: Context) -> Life | None:
        """Return the life to start or to go on with.

        None if there is nothing to do: the message has been requeued, or will be when the
        subscription closes.

        Args:
            delivery: the delivery of the message.
            context: the context that a new life gets a copy of.
        """
        life = self._put_again.pop(delivery, None)
        if life is not None:
            return life
        work = self._work
        if work.subscription.is_stale(delivery):
            return None
        if work.quota is not None and not work.quota.begin():
            return None
        self.any_begun = True
        message = work.make_message(work.consumers[delivery.queue], delivery, self._services)
        return Life(message, message.live(), context.copy())

    def leave(self, life: Life, chunk: Chunk) -> None:
        """Hold ``life`` until ``chunk`` is reported, or its timeout is over.

        Call it outside the life's context, which another thread may enter at once.
        """
        self._unconfirmed[life] = (time.monotonic() + self._timeout, chunk)
        chunk.on_reported(partial(self._on_reported, life))

    def ends(self) -> None:
        """Count a message that has ended; with the last one that is allowed, stop the worker."""
        quota = self._work.quota
        if quota is not None and quota.end():
            self._work.on_used_up()

    def stop(self, deadline: float) -> bool:
        """Wait for the unconfirmed lives, until ``deadline``; return whether all are reported.

        The messages of the others are redelivered, and so are those whose events were not
        confirmed: they are left as a held message is.
        """
        self._stopping = True
        remaining = max(0.0, deadline - time.monotonic())
        finished = not self._unconfirmed or self._all_confirmed.wait(remaining)
        self._reported.put(None)
        self._unconfirmed.clear()
        return finished

    def _on_reported(self, life: Life, report: PublishReport) -> None:
        self._reported.put((life, report))

    def _run(self) -> None:
        pause = max(0.01, self._timeout / 4)
        look_at = time.monotonic() + pause
        while True:
            with contextlib.suppress(queue.Empty):
                reported = self._reported.get(timeout=pause)
                if reported is None:
                    return
                self._go_on(*reported)
            if time.monotonic() >= look_at:
                self._report_late()
                look_at = time.monotonic() + pause

    def _report_late(self) -> None:
        """Report the chunks whose timeout is over, as a waiting caller would have done."""
        now = time.monotonic()
        for deadline, chunk in list(self._unconfirmed.values()):
            if deadline > now:
                break
            self._work.publisher.wait_for(chunk, 0)

    def _go_on(self, life: Life, report: PublishReport) -> None:
        life.steps = life.message.confirmed(report)
        if report.ok:
            self._end(life)
            self._unconfirmed.pop(life, None)
        else:
            delivery = life.message.delivery
            self._put_again[delivery] = life
            self._unconfirmed.pop(life, None)  # before put(): the engine may leave it here again
            self._put(delivery)
        if self._stopping and not self._unconfirmed:
            self._all_confirmed.set()

    def _end(self, life: Life) -> None:
        try:
            life.context.run(call, life.steps, _refuse)
        except BaseException:  # a bug in outbox must end neither the thread nor the message
            logger.exception("could not handle message %r", life.message.delivery.message_id)
            self._work.give_back(life.message.delivery)
        self.ends()


def _refuse(step: Step) -> None:
    raise RuntimeError(f"a confirmed message must not ask for another step, but did: {step!r}")
