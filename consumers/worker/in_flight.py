"""The messages that an engine has begun, also those that no thread or task works on.

A message that is ``Unconfirmed`` is held here while its thread or task goes on with another one.
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
from outbox.consumers.worker.worker_context import Work
from outbox.messages.delivery import Delivery

__all__ = ["Life", "Lives"]

logger = logging.getLogger("outbox.consumer")


class Life:
    """A message that was begun; one thread or task at a time works on it.

    Attributes:
        message: itself.
        steps: to be taken next.
        context: in which they are taken.
    """

    __slots__ = ("context", "message", "steps")

    def __init__(
        self, message: Message, steps: Steps[Outcome | Unconfirmed | None], context: Context
    ) -> None:
        """Nothing is done yet."""
        self.message = message
        self.steps = steps
        self.context = context


class Lives:
    """Begins lives, and holds those that are left until their chunk is reported. Thread-safe.

    Those whose events are all confirmed end on a thread of its own. The others have to be seen to:
    their deliveries come to the engine once more. There are no more of them than messages that the
    broker sends ahead.

    Attributes:
        any_begun: whether a message was.
    """

    def __init__(self, work: Work, services: Services, put: Callable[[Delivery], object]) -> None:
        """Hold nothing yet.

        Args:
            work: of the engine.
            services: of the engine.
            put: has the engine take a delivery as if it were new.
        """
        self.any_begun = False
        self._work = work
        self._services = services
        self._put = put
        self._timeout = work.publisher.settings.timeout
        self._left: dict[Life, tuple[float, Chunk]] = {}  # until when, in that order
        self._stopping = False
        self._none_left = threading.Event()
        self._reported: queue.SimpleQueue[tuple[Life, PublishReport] | None] = queue.SimpleQueue()
        self._put_again: dict[Delivery, Life] = {}

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="outbox-worker-confirms", daemon=True).start()

    def of(self, delivery: Delivery, context: Context) -> Life | None:
        """Return the life to begin or to go on with.

        None if there is nothing to do: it has been given back, or will be when the subscription
        closes.

        Args:
            delivery: which message.
            context: a copy of it is the new life's.
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
        """Hold ``life`` until ``chunk`` is reported, or its time is over.

        Its context must have been left.
        """
        self._left[life] = (time.monotonic() + self._timeout, chunk)
        chunk.on_reported(partial(self._on_reported, life))

    def ends(self) -> None:
        """Count a message that has ended; with the last one that is allowed, stop the worker."""
        quota = self._work.quota
        if quota is not None and quota.end():
            self._work.on_used_up()

    def stop(self, deadline: float) -> bool:
        """Wait for the lives that were left, until ``deadline``; return whether all have ended.

        The others stay where they are: their messages come again.
        """
        self._stopping = True
        finished = not self._left or self._none_left.wait(max(0.0, deadline - time.monotonic()))
        self._reported.put(None)
        self._left.clear()
        return finished and not self._put_again

    def _on_reported(self, life: Life, report: PublishReport) -> None:
        self._reported.put((life, report))

    def _run(self) -> None:
        pause = max(0.01, self._timeout / 4)
        look_at = time.monotonic() + pause
        while True:
            with contextlib.suppress(queue.Empty):
                one = self._reported.get(timeout=pause)
                if one is None:
                    return
                self._go_on(*one)
            if time.monotonic() >= look_at:
                self._report_late()
                look_at = time.monotonic() + pause

    def _report_late(self) -> None:
        """Have the chunks reported whose time is over, as waiting for them would have."""
        now = time.monotonic()
        for until, chunk in list(self._left.values()):
            if until > now:
                break
            self._work.publisher.wait_for(chunk, 0)

    def _go_on(self, life: Life, report: PublishReport) -> None:
        life.steps = life.message.confirmed(report)
        if report.ok:
            self._end(life)
            self._left.pop(life, None)
        else:
            delivery = life.message.delivery
            self._put_again[delivery] = life
            self._left.pop(life, None)  # before: it may soon be left again
            self._put(delivery)
        if self._stopping and not self._left:
            self._none_left.set()

    def _end(self, life: Life) -> None:
        try:
            life.context.run(call, life.steps, _refuse)
        except BaseException:  # a bug of ours must end neither the thread nor the message
            logger.exception("could not handle message %r", life.message.delivery.message_id)
            self._work.give_back(life.message.delivery)
        self.ends()


def _refuse(step: Step) -> None:
    raise RuntimeError(f"nothing is left to do for a confirmed message, but it asks for {step!r}")
