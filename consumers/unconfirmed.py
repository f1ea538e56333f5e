"""Lives of messages whose last events are on their way: nobody waits with them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from contextvars import Context
from functools import partial

from outbox import Publisher
from outbox.chunk import Chunk
from outbox.consumers.life import Message, Step, Steps
from outbox.consumers.outcome import Outcome
from outbox.consumers.watch import Watch

__all__ = ["Life", "Unconfirmed"]


class Life:
    """The life of one message, which may be left and gone on with, by one thread at a time.

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


class Unconfirmed:
    """Holds lives until their chunk is reported, then has them gone on with. Thread-safe.

    Those whose events are all confirmed end on a thread of its own; others have to be seen to, and
    are handed back. There are no more of them than messages that the broker sends ahead.
    """

    def __init__(
        self,
        publisher: Publisher,
        watch: Watch,
        go_on: Callable[[Life], object],
        hand_back: Callable[[Life], object],
    ) -> None:
        """Hold nothing yet.

        Args:
            publisher: of the chunks, with the time that they have.
            watch: over that time.
            go_on: called with a life whose events are confirmed, on a thread of this one's.
            hand_back: called with a life whose events are not, on that thread; must be quick.
        """
        self._publisher = publisher
        self._watch = watch
        self._go_on = go_on
        self._hand_back = hand_back
        self._lives: set[Life] = set()
        self._ended = threading.Condition()
        self._reported: queue.SimpleQueue[tuple[Life, Chunk] | None] = queue.SimpleQueue()

    def start(self) -> None:
        """Start the thread."""
        threading.Thread(target=self._run, name="outbox-worker-confirms", daemon=True).start()

    def add(self, life: Life, chunk: Chunk) -> None:
        """Hold ``life`` until ``chunk`` is reported, or its time is over."""
        with self._ended:
            self._lives.add(life)
        publisher = self._publisher
        ticket = self._watch.enter(
            publisher.settings.timeout, partial(publisher.wait_for, chunk, 0)
        )

        def reported(_: object) -> None:
            self._watch.leave(ticket)
            self._reported.put((life, chunk))

        chunk.future.add_done_callback(reported)

    def stop(self, deadline: float) -> bool:
        """Wait for the lives being held, until ``deadline``; return whether none is left.

        Those that are left stay where they are: their messages come again.
        """
        with self._ended:
            finished = self._ended.wait_for(
                lambda: not self._lives, max(0.0, deadline - time.monotonic())
            )
            self._lives.clear()
        self._reported.put(None)
        return finished

    def _run(self) -> None:
        while (one := self._reported.get()) is not None:
            life, chunk = one
            report = chunk.future.result()
            life.left_at = Step(report.raise_for_failure)
            (self._go_on if report.ok else self._hand_back)(life)
            with self._ended:
                self._lives.discard(life)
                if not self._lives:
                    self._ended.notify_all()
