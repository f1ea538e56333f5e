"""The engine of asynchronous consumers: tasks of one event loop, on a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable
from typing import Any, TypeAlias

from outbox.consumers.message.steps import (
    Blocking,
    Call,
    Confirm,
    Pause,
    Step,
    cancelled_in_time,
    drive,
)
from outbox.consumers.outcome import Outcome, ProcessTimeout, Unconfirmed
from outbox.consumers.worker.dispatch_queue import OrderedArrivals
from outbox.consumers.worker.in_flight import Life, Lives
from outbox.consumers.worker.worker_context import Work
from outbox.messages.delivery import Delivery

__all__ = ["TaskEngine"]

logger = logging.getLogger("outbox.consumer")

_Task: TypeAlias = "asyncio.Task[Outcome | Unconfirmed | None]"
_CANCELLED = 1.0  # seconds that a cancelled task has


class TaskEngine:
    """Runs the messages of asynchronous consumers as tasks.

    The loop knows nothing of the broker: deliveries come in from the subscription's thread, and
    acks go back to it. A handler that is cancelled at the end leaves its message to others.

    A handler that goes on although it was cancelled when its time was over is late, as on a thread:
    its message is given up, and another one takes its place, for as many late ones as there are
    places.

    Attributes:
        publisher, subscription, inbox: see ``Services``.
        overlaps: not with a concurrency of 1, which has its messages one after the other.
        lives: of the messages that were begun.
    """

    def __init__(self, work: Work, concurrency: int) -> None:
        """Nothing runs yet."""
        self.publisher = work.publisher
        self.subscription = work.subscription
        self.inbox = work.inbox
        self._shared = work
        self.overlaps = concurrency > 1
        self._concurrency = concurrency
        self._waiting: deque[Delivery] = deque()
        self._woken = False
        found = work.make_arrivals()
        self._ordered = found if isinstance(found, OrderedArrivals) else None
        self._room = threading.Semaphore(concurrency)
        self._tasks: set[_Task] = set()
        self._late: set[_Task] = set()
        self._loop: asyncio.AbstractEventLoop  # made when it starts, as is what belongs to it
        self._stopping: asyncio.Event
        self._deadline = 0.0
        self._finished = True
        self._ready = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outbox-worker-loop", daemon=True)
        self._context = contextvars.Context()
        self.lives = Lives(work, self, self.put)

    @property
    def late(self) -> int:
        """How many handlers go on although they were cancelled when their time was over."""
        return len(self._late)

    @property
    def is_stopping(self) -> bool:
        """Whether the engine is."""
        return self._stopping.is_set()

    def start(self) -> None:
        """Start the loop; messages run in copies of the caller's context."""
        self._context = contextvars.copy_context()
        self.lives.start()
        self._thread.start()
        self._ready.wait()
        if self._ordered is not None:
            pump = threading.Thread(
                target=self._pump, args=(self._ordered,), name="outbox-worker-pump", daemon=True
            )
            pump.start()

    def put(self, delivery: Delivery) -> None:
        """Have a message processed when there is room. Thread-safe."""
        if self._ordered is not None:
            self._ordered.put(delivery)
            return
        self._waiting.append(delivery)
        if not self._woken:
            self._woken = True
            self._call(self._dispatch)

    def ask_to_stop(self, deadline: float) -> None:
        """Begin no further message, and cancel at ``deadline`` what runs. Thread-safe."""
        self._deadline = deadline
        if self._ready.is_set():
            self._call(self._stopping.set)
            if self._ordered is not None:
                self._ordered.put(None)
                self._room.release()  # if it waits for that

    def stop(self, deadline: float) -> bool:
        """Wait for the messages being processed, until ``deadline``; return whether all finished.

        After ``ask_to_stop``. What is not finished then is cancelled: the message is left to
        others.
        """
        if not self._ready.is_set():
            return True
        is_over = self._over.wait(max(0.0, deadline - time.monotonic()) + _CANCELLED + 1)
        self._thread.join(_CANCELLED)  # longer only while late handlers do not end
        return self.lives.stop(deadline) and self._finished and is_over

    def _call(self, function: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function)

    def _run(self) -> None:
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        stopping = self._stopping = asyncio.Event()
        self._ready.set()
        await stopping.wait()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=max(0.0, self._deadline - time.monotonic()))
        for task in self._tasks:
            self._finished = False
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CANCELLED)
        self._over.set()

    def _pump(self, arrivals: OrderedArrivals) -> None:
        """Take each message no earlier than there is room for it: a better one may come."""
        while True:
            self._room.acquire()
            delivery = arrivals.get()
            if delivery is None:
                return
            self._call(functools.partial(self._begin, delivery))

    def _dispatch(self) -> None:
        self._woken = False
        while self._waiting and len(self._tasks) < self._concurrency:
            self._begin(self._waiting.popleft())

    def _begin(self, delivery: Delivery) -> None:
        # What is not begun is given back when the subscription closes, or was already.
        life = None if self.is_stopping else self.lives.of(delivery, self._context)
        if life is None:
            self._room.release()
            return
        self._tasks.add(self._start_task(life))

    def _start_task(self, life: Life) -> _Task:
        task = self._loop.create_task(self._handle(life), context=life.context)
        task.add_done_callback(functools.partial(self._on_done, life))
        return task

    def _on_done(self, life: Life, task: _Task) -> None:
        was_late = task in self._late
        self._late.discard(task)
        result = None if task.cancelled() else task.result()
        if was_late:
            pass  # its successor ends the message
        elif isinstance(result, Unconfirmed):
            self.lives.leave(life, result.chunk)
        else:
            self.lives.ends()
        if task in self._tasks:
            self._tasks.discard(task)
            self._room.release()
            if self._waiting:
                self._dispatch()

    async def _handle(self, life: Life) -> Outcome | Unconfirmed | None:
        """Take the steps of a message; return what they return."""
        delivery = life.message.delivery
        try:
            take_step = functools.partial(self._take_step, life)
            return await drive(life.steps, take_step, lambda: self.is_stopping)
        except asyncio.CancelledError:
            if not self.is_stopping:  # somebody else has cancelled it: it must come again
                self._shared.give_back(delivery)
            raise
        except BaseException:  # a bug of ours must end neither the loop nor the message
            logger.exception("could not handle message %r", delivery.message_id)
            self._shared.give_back(delivery)
        return None

    async def _take_step(self, life: Life, step: Step) -> Any:
        match step:
            case Call():
                value = step.function(*step.arguments)
                if value is None or not inspect.isawaitable(value):
                    return value
                if step.timeout is not None:
                    value = self._in_time(life, value, step.timeout)
                return await value
            case Confirm(chunk):
                return await self.publisher.wait_for_async(chunk)
            case Blocking(function):
                return await asyncio.to_thread(function)
            case Pause(seconds):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(seconds):
                        await self._stopping.wait()
                return None

    async def _in_time(self, life: Life, value: Awaitable[Any], seconds: float) -> Any:
        task: Any = asyncio.current_task()
        late = self._loop.call_later(seconds + _CANCELLED, self._on_late, life, task, seconds)
        try:
            return await cancelled_in_time(value, seconds)
        finally:
            late.cancel()

    def _on_late(self, life: Life, task: _Task, seconds: float) -> None:
        """Give a message up whose handler goes on although it was cancelled."""
        self._late.add(task)
        message = life.message
        logger.error(
            "message %r of %r takes more than %.1f s and is given up; its handler was cancelled, "
            "and goes on",
            message.delivery.message_id,
            message.delivery.queue,
            seconds,
        )
        message.abandon()
        error = ProcessTimeout.after(seconds)
        successor = self._start_task(Life(message, message.give_up(error), self._context.copy()))
        if len(self._late) <= self._concurrency:
            self._tasks.discard(task)
            self._tasks.add(successor)
        else:
            logger.error("%d handlers are late: the worker has a task less", len(self._late))
