"""The engine of plain consumers: a pool of threads, each with one message at a time.

A thread that has nothing left to do for a message but wait goes on with another message; the first
is then held in ``in_flight``.

A thread can't be stopped. So a handler that exceeds its timeout is *late*: its message is given up
and ended by a *successor*, a new thread that usually takes over the late thread's place. The watch
decides, for each call, whether it ended in time or its successor ends the message; never both do.
"""

from __future__ import annotations

import contextvars
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from queue import SimpleQueue
from typing import TypeAlias

from outbox.consumers.hooks import Hook
from outbox.consumers.message.hook_call import run_hook
from outbox.consumers.message.message import Message
from outbox.consumers.message.steps import (
    Abandoned,
    Blocking,
    Call,
    Confirm,
    Parked,
    Pause,
    Step,
    Steps,
    Written,
    call,
)
from outbox.consumers.message.tally import ThreadTally
from outbox.consumers.outcome import Outcome, ProcessTimeout, Unconfirmed, of_handler
from outbox.consumers.worker.deadlines import Deadlines
from outbox.consumers.worker.in_flight import InFlight
from outbox.consumers.worker.life import Life
from outbox.consumers.worker.places import Places
from outbox.consumers.worker.worker_context import WorkerContext
from outbox.messages.delivery import Delivery

__all__ = ["ThreadEngine"]

logger = logging.getLogger("outbox.consumer")

_Result: TypeAlias = Outcome | Unconfirmed | Pause | Parked | None


class _Late(BaseException):
    """Raised in the steps of a message when a call ends after its timeout."""


class ThreadEngine:
    """An engine that runs the messages of plain consumers on threads.

    Successors take over the places of late threads, for as many late threads as there are places.
    Beyond that, a place stays empty until a late thread comes back.

    Attributes:
        publisher, subscription, inbox, results, surroundings, tally: see ``Services``.
        overlaps: False with a single thread, which processes its messages one after the other.
        in_flight: the messages that were started.
        size: the number of messages that it processes at a time.
    """

    def __init__(self, work: WorkerContext, threads: int, *, has_hooks: bool = False) -> None:
        """Create the engine, without starting threads yet.

        With ``has_hooks``, the first thread runs hooks (``call_hook``) until ``begin``, and the
        last one until ``end``.
        """
        self.publisher = work.publisher
        self.subscription = work.subscription
        self.inbox = work.inbox
        self.results = work.results
        self.surroundings = work.surroundings
        self.tally = work.tally
        self._shared = work
        self.overlaps = threads > 1
        self.size = threads
        self._places = Places(threads)
        self._waiting = work.make_dispatch_queue()
        self._stopping = threading.Event()
        self._deadlines = Deadlines()
        self.in_flight = InFlight(work, self, self, threads)
        self._context = contextvars.Context()
        self._has_hooks = has_hooks
        self._is_begun = not has_hooks
        self._hooks: SimpleQueue[tuple[Hook, Future[None]] | None] = SimpleQueue()

    @property
    def late(self) -> int:
        """The number of threads in handlers that exceeded their timeout."""
        return self._places.late

    @property
    def late_ended(self) -> int:
        """The number of late handlers that have ended, since the start."""
        return self._places.came_back

    @property
    def is_stopping(self) -> bool:
        """Whether the engine is stopping."""
        return self._stopping.is_set()

    @property
    def is_idle(self) -> bool:
        """Whether all threads have ended after ``ask_to_stop``, except for late handlers."""
        return self._places.wait_until_empty(0)

    def start(self) -> None:
        """Start the threads; messages run in copies of the caller's context."""
        self._context = contextvars.copy_context()
        self._places.take_all()
        self.in_flight.start()
        for number in range(1, self.size + 1):
            run = self._work_first if number == 1 and self._has_hooks else self._work
            self._start_thread(f"outbox-worker-{number}", run)

    def call_hook(self, hook: Hook) -> Future[None]:
        """Have ``hook`` called by the first thread, or by the last one after ``stop``.

        If a thread hasn't ended then, a thread for it alone calls it.
        """
        future: Future[None] = Future()
        if self.is_stopping and not self._places.wait_until_empty(0):
            self._start_thread("outbox-worker-stop", partial(self._run_hook, hook, future))
        else:
            self._hooks.put((hook, future))
        return future

    def begin(self) -> None:
        """Let the first thread begin with messages; do nothing if it has."""
        if not self._is_begun:
            self._is_begun = True
            self._hooks.put(None)

    def end(self) -> None:
        """Let the last thread end."""
        if self._has_hooks:
            self._hooks.put(None)

    def put(self, delivery: Delivery) -> None:
        """Add a message, to be processed when a thread is free."""
        self._waiting.put(delivery)

    def put_ahead(self, delivery: Delivery) -> None:
        """Add a message, to be processed before others when a thread is free."""
        self._waiting.put_ahead(delivery)

    def waiting(self) -> list[Delivery]:
        """Return the messages that wait for a thread."""
        return self._waiting.waiting()

    def ask_to_stop(self, _deadline: float) -> None:
        """Start no further message."""
        self._stopping.set()
        for _ in range(2 * self.size):  # enough for all threads, late ones included
            self._waiting.put(None)

    def stop(self, deadline: float) -> bool:
        """Wait for the messages being processed, until ``deadline``; return whether all finished.

        Call ``ask_to_stop`` first. It does not wait for late handlers: their messages have been
        given up already.
        """
        finished = self._places.wait_until_empty(max(0.0, deadline - time.monotonic()))
        finished = self.in_flight.stop(deadline) and finished
        self._deadlines.close()
        return finished

    def _start_thread(self, name: str, run: Callable[[], None]) -> None:
        threading.Thread(target=run, name=name, daemon=True).start()

    def _work(self) -> None:
        has_place = True
        tally = self.tally.of_thread()
        try:
            while has_place and (delivery := self._waiting.get()) is not None:
                has_place = self._process(delivery, tally)
        finally:
            if has_place and self._places.leave() and self._has_hooks:
                self._run_hooks()

    def _work_first(self) -> None:
        self._run_hooks()
        self._work()

    def _run_hooks(self) -> None:
        while (called := self._hooks.get()) is not None:
            self._run_hook(*called)

    def _run_hook(self, hook: Hook, future: Future[None]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            self._context.copy().run(run_hook, hook, self.surroundings)
        except BaseException as error:
            future.set_exception(error)
        else:
            future.set_result(None)

    def _process(self, delivery: Delivery, tally: ThreadTally) -> bool:
        """Process a message; return whether this thread still has its place."""
        if self._stopping.is_set():
            self.in_flight.set_aside(delivery)  # requeued, or when the subscription closes
            return True
        life = self.in_flight.of(delivery, self._context)
        return True if life is None else self._go_on(life, tally)

    def _go_on(self, life: Life, tally: ThreadTally) -> bool:
        """Take the steps of a message; return whether this thread still has its place."""
        message = life.message
        message.tally = tally
        result: _Result = None
        try:
            result = life.context.run(self._live, message, life.steps)
        except (_Late, Abandoned):
            pass  # its successor ends it, or it is redelivered when the subscription closes
        except BaseException:  # a bug in outbox must end neither the thread nor the message
            if not message.is_given_up or life.is_after_timeout:
                self.in_flight.failed(life)
                return True
            logger.exception("could not handle message %r", message.delivery.message_id)
        if message.is_given_up and not life.is_after_timeout:
            return self._places.come_back()  # even if an around filter has swallowed _Late
        self._after(life, result)
        return True

    def _after(self, life: Life, result: _Result) -> None:
        """Let a message wait as ``result`` says, or note that it has ended."""
        if isinstance(result, Unconfirmed):
            self.in_flight.leave(life, result.chunk)
        elif isinstance(result, Pause):
            self.in_flight.park(life, result)
        elif isinstance(result, Parked):
            self.in_flight.wait_for(life, result)
        else:
            self.in_flight.ends(life.message)

    def _live(self, message: Message, steps: Steps[Outcome | Unconfirmed | None]) -> _Result:
        return call(steps, partial(self._take_step, message))

    def _take_step(self, message: Message, step: Step) -> object:
        try:
            match step:
                case Call():
                    if step.timeout is not None:
                        return self._call_watched(message, step, step.timeout)
                    return step.run()
                case Confirm(chunk):
                    return self.publisher.wait_for(chunk)
                case Blocking(function):
                    return function()
                case Written(write):
                    write.wait()
                    return None
            raise AssertionError("a pause is not a step to take")
        except (_Late, Abandoned):
            raise
        except BaseException as error:
            raise of_handler(error)  # noqa: B904  it has a cause, or is the error itself

    def _call_watched(self, message: Message, step: Call, seconds: float) -> object:
        late = partial(self._on_late, message, threading.current_thread(), seconds)
        ticket = self._deadlines.enter(seconds, late)
        try:
            result: object = step.run()
        except BaseException as error:
            if not self._deadlines.leave(ticket):
                message.abandon()  # the successor may not have done so yet
                raise _Late from error
            raise
        if not self._deadlines.leave(ticket):
            message.abandon()
            raise _Late
        return result

    def _on_late(self, message: Message, thread: threading.Thread, seconds: float) -> None:
        goes_on = self._places.lose()
        logger.error(
            "message %r of %r exceeded its timeout of %.1f s and is given up; its handler can't be "
            "stopped, and goes on in thread %s",
            message.delivery.message_id,
            message.delivery.queue,
            seconds,
            thread.name,
        )
        if not goes_on:
            logger.error("%d handlers are late; the worker is a thread short", self.late)
        error = ProcessTimeout.after(seconds)
        try:
            self._start_thread(thread.name, partial(self._succeed, message, error, goes_on))
        except RuntimeError:  # no more threads can be started: requeue the message instead
            message.abandon()
            self._shared.give_back(message.delivery)
            self.in_flight.ends(message)
            self._places.leave(to_late=goes_on)
            raise

    def _succeed(self, message: Message, error: ProcessTimeout, goes_on: bool) -> None:
        """End a message whose handler is late, and take over its thread's place."""
        life = Life(message, message.give_up(error), self._context.copy())
        life.is_after_timeout = True
        message.tally = self.tally.of_thread()
        try:
            result = life.context.run(self._live, message, life.steps)
        except BaseException:
            self.in_flight.failed(life)
        else:
            self._after(life, result)
        if goes_on:
            self._work()
        elif self._places.leave() and self._has_hooks:
            self._run_hooks()
