"""The lives of messages that an engine has begun, also of those that nobody waits with.

Where only the confirms of a message's last events are missing, its life is left: the thread or task
goes on with another one.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from contextvars import Context
from functools import partial

from outbox import PublishReport
from outbox.chunk import Chunk
from outbox.consumers.life import Message, Services, Step, Steps, call
from outbox.consumers.outcome import Outcome
from outbox.consumers.watch import Ticket, Watch
from outbox.consumers.work import Work
from outbox.subscription import Delivery

__all__ = ["Life", "Lives"]

logger = logging.getLogger("outbox.consumer")


class Life:
    """The life of one message, which may be left and gone on with, by one at a time.

    Attributes:
        message: whose life it is.
        steps: of it.
        context: in which they are taken.
        left_at: the step that it was left at, now that its result is there.
    """

    __slots__ = ("context", "left_at", "message", "steps")

    def __init__(self, message: Message, steps: Steps[Outcome | None], context: Context) -> None:
        """Nothing is done yet."""
        self.message = message
        self.steps = steps
        self.context = context
        self.left_at: Step | None = None


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
        self._watch = Watch()
        self._left: set[Life] = set()
        self._changed = threading.Condition()
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
        if work.subscription.is_stale(delivery) or not work.begins():
            return None
        self.any_begun = True
        message = work.make_message(work.consumers[delivery.queue], delivery, self._services)
        return Life(message, message.live(), context.copy())

    def leave(self, life: Life, chunk: Chunk) -> None:
        """Hold ``life`` until ``chunk`` is reported, or its time is over.

        Its context must have been left.
        """
        with self._changed:
            self._left.add(life)
        publisher = self._work.publisher
        give_up = partial(publisher.wait_for, chunk, 0)
        ticket = self._watch.enter(publisher.settings.timeout, give_up)
        chunk.on_reported(partial(self._on_reported, life, ticket))

    def _on_reported(self, life: Life, ticket: Ticket, report: PublishReport) -> None:
        self._watch.leave(ticket)
        self._reported.put((life, report))

    def stop(self, deadline: float) -> bool:
        """Wait for the lives that were left, until ``deadline``; return whether all have ended.

        The others stay where they are: their messages come again.
        """
        with self._changed:
            finished = self._changed.wait_for(
                lambda: not self._left, max(0.0, deadline - time.monotonic())
            )
            self._left.clear()
        self._reported.put(None)
        self._watch.close()
        return finished and not self._put_again

    def _run(self) -> None:
        while (one := self._reported.get()) is not None:
            life, report = one
            life.left_at = Step(report.raise_for_failure)
            if report.ok:
                self._end(life)
            else:
                delivery = life.message.delivery
                self._put_again[delivery] = life
                self._put(delivery)
            with self._changed:
                self._left.discard(life)
                if not self._left:
                    self._changed.notify_all()

    def _end(self, life: Life) -> None:
        try:
            life.context.run(call, life.steps, left_at=life.left_at)
        except BaseException:  # a bug of ours must end neither the thread nor the message
            logger.exception("could not handle message %r", life.message.delivery.message_id)
            self._work.give_back(life.message.delivery)
        self._work.ends()
