"""The engine of asynchronous consumers: tasks of one event loop, on a separate thread."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import enum
import functools
import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, TypeAlias

from outbox.consumers.event_loop import lasting_loop
from outbox.consumers.event_loop.loop_watch import LoopWatch
from outbox.consumers.hooks import Hook
from outbox.consumers.message.hook_call import run_hook_async
from outbox.consumers.message.steps import (
    Blocking,
    Call,
    Confirm,
    Parked,
    Pause,
    Step,
    Written,
    cancelled_in_time,
    drive,
)
from outbox.consumers.message.tally import ThreadTally
from outbox.consumers.outcome import Outcome, ProcessTimeout, Unconfirmed
from outbox.consumers.worker.dispatch_queue import OrderedDispatchQueue
from outbox.consumers.worker.in_flight import InFlight
from outbox.consumers.worker.life import Life
from outbox.consumers.worker.worker_context import WorkerContext
from outbox.messages.delivery import Delivery
from outbox.results.pending_write import PendingWrite
from outbox.system import process
from outbox.system.forked_child import end_child

__all__ = ["TaskEngine"]

logger = logging.getLogger("outbox.consumer")


class _Failed(enum.Enum):
    FAILED = enum.auto()


_FAILED = _Failed.FAILED
"""The result of a task in which outbox itself has failed: ``in_flight`` knows."""
_Result: TypeAlias = "Outcome | Unconfirmed | Pause | Parked | _Failed | None"
_Task: TypeAlias = "asyncio.Task[_Result]"
_CANCELLED = 1.0  # seconds for a cancelled task to end
_LOOK_EVERY = 0.2  # seconds between two looks at the deadline of a stop


class TaskEngine:
    """An engine that runs the messages of asynchronous consumers as tasks.

    The loop does no I/O with the broker: deliveries come from the subscription's thread, and acks
    go back to it. The message of a handler that is cancelled at the end is redelivered.

    A handler that goes on after its timeout although it was cancelled is *late*, as on a thread: a
    successor task ends its message, and takes over its place, for as many late handlers as there
    are places.

    Attributes:
        publisher, subscription, inbox, results, surroundings, tally: see ``Services``.
        overlaps: False with a concurrency of 1, which processes messages one after the other.
        in_flight: the messages that were started.
        size: the number of messages that it processes at a time.
        late_ended: the number of late handlers that have ended, since the start.
    """

    def __init__(self, work: WorkerContext, concurrency: int, *, has_hooks: bool = False) -> None:
        """Create the engine, without starting its loop yet.

        With ``has_hooks``, the loop goes on after the last message, until ``end``.
        """
        self.publisher = work.publisher
        self.subscription = work.subscription
        self.inbox = work.inbox
        self.results = work.results
        self.surroundings = work.surroundings
        self.tally = work.tally
        self._shared = work
        self.overlaps = concurrency > 1
        self.size = concurrency
        self.late_ended = 0
        self._waiting: deque[Delivery] = deque()
        self._ahead: deque[Delivery] = deque()
        self._woken = False
        arrivals = work.make_dispatch_queue()
        self._ordered = arrivals if isinstance(arrivals, OrderedDispatchQueue) else None
        self._room = threading.Semaphore(concurrency)
        self._tasks: set[_Task] = set()
        self._running: dict[_Task, Delivery] = {}  # late ones, too
        self._watch = LoopWatch(lambda: list(self._running.values()))
        self._late: set[_Task] = set()
        self._loop: asyncio.AbstractEventLoop  # set by its thread, as are the next two
        self._thread_tally: ThreadTally
        self._stopping: asyncio.Event
        self._deadline = 0.0
        self._finished = True
        self._is_cancelling = False
        self._ready = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outbox-worker-loop", daemon=True)
        self._context = contextvars.Context()
        self._has_hooks = has_hooks
        self._ending: asyncio.Event  # set by its thread
        self.in_flight = InFlight(work, self, self, concurrency)

    @property
    def late(self) -> int:
        """The number of handlers that go on although their timeout has cancelled them."""
        return len(self._late)

    @property
    def is_stopping(self) -> bool:
        """Whether the engine is stopping."""
        return self._stopping.is_set()

    @property
    def is_idle(self) -> bool:
        """Whether all tasks have ended after ``ask_to_stop``, except for late handlers."""
        return self._over.is_set()

    def ping(self, answer: Callable[[], None]) -> bool:
        """Have ``answer`` called soon on the loop; return False if it doesn't run. Thread-safe."""
        if not self._ready.is_set() or self._over.is_set():
            return False
        try:
            self._loop.call_soon_threadsafe(answer)
        except RuntimeError:  # it has ended
            return False
        return True

    def log_tasks(self) -> None:
        """Log where each task of the loop waits. Thread-safe."""
        if not self._ready.is_set():
            return
        lines = []
        for task in asyncio.all_tasks(self._loop):
            delivery = self._running.get(task)
            name = task.get_name() if delivery is None else _named(delivery)
            lines.append(f"  {name}: {' > '.join(_places_of(task.get_coro())) or 'not started'}")
        logger.warning("%d task(s) of the event loop:\n%s", len(lines), "\n".join(lines))

    def start(self) -> None:
        """Start the loop; messages run in copies of the caller's context."""
        self._context = contextvars.copy_context()
        self.in_flight.start()
        self._thread.start()
        self._ready.wait()
        if self._ordered is not None:
            pump = threading.Thread(
                target=self._pump, args=(self._ordered,), name="outbox-worker-pump", daemon=True
            )
            pump.start()

    def call_hook(self, hook: Hook) -> Future[None]:
        """Have ``hook`` called and awaited by the loop. Thread-safe.

        Raises:
            RuntimeError: the loop has ended.
        """
        hook_run = run_hook_async(hook, self.surroundings)
        try:
            return self._context.copy().run(asyncio.run_coroutine_threadsafe, hook_run, self._loop)
        except BaseException:
            hook_run.close()
            raise

    def begin(self) -> None:
        """Do nothing: messages are tasks beside the hooks."""

    def end(self) -> None:
        """Let the loop end, and wait for its thread."""
        self._call(lambda: self._ending.set())
        self._thread.join(_CANCELLED)

    def put(self, delivery: Delivery) -> None:
        """Add a message, to be processed when there is room. Thread-safe."""
        if self._ordered is not None:
            self._ordered.put(delivery)
            return
        self._waiting.append(delivery)
        if not self._woken:
            self._woken = True
            self._call(self._dispatch)

    def put_ahead(self, delivery: Delivery) -> None:
        """Add a message, to be processed before others when there is room. Thread-safe."""
        if self._ordered is not None:
            self._ordered.put_ahead(delivery)
            return
        self._ahead.append(delivery)
        self._call(self._dispatch)

    def waiting(self) -> list[Delivery]:
        """Return the messages that wait for room. Thread-safe."""
        return list(self._waiting) if self._ordered is None else self._ordered.waiting()

    def ask_to_stop(self, deadline: float) -> None:
        """Start no further message, and cancel the running ones at ``deadline``. Thread-safe.

        A second call may bring the deadline forward.
        """
        self._deadline = deadline
        if self._ready.is_set():
            self._call(self._stopping.set)
            if self._ordered is not None:
                self._ordered.put(None)
                self._room.release()  # the pump may be waiting for room

    def stop(self, deadline: float) -> bool:
        """Wait for the messages being processed, until ``deadline``; return whether all finished.

        Call ``ask_to_stop`` first. Handlers that have not finished then are cancelled, and their
        messages redelivered.
        """
        if not self._ready.is_set():
            return True
        is_over = self._over.wait(max(0.0, deadline - time.monotonic()) + _CANCELLED + 1)
        if not self._has_hooks:
            self._thread.join(_CANCELLED)  # the thread outlives that only if handlers don't end
        return self.in_flight.stop(deadline) and self._finished and is_over

    def _call(self, function: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(function)

    def _run(self) -> None:
        try:
            lasting_loop.run(self._main())
        except BaseException as error:
            if self._over.is_set():
                return  # only handlers that don't end have outlived the work
            logger.exception("the event loop has ended")
            self._finished = False
            self._over.set()
            self._shared.on_failed(f"the event loop has ended: {error!r}")
        finally:
            self._watch.end()
            _loops.pop(threading.get_ident(), None)

    async def _main(self) -> None:
        self._loop = _loops[threading.get_ident()] = asyncio.get_running_loop()
        self._thread_tally = self.tally.of_thread()
        stopping = self._stopping = asyncio.Event()
        ending = self._ending = asyncio.Event()
        self._ready.set()
        self._watch.start(self._loop, self._thread)
        await lasting_loop.undisturbed(stopping.wait)
        await lasting_loop.undisturbed(self._all_ended)
        self._is_cancelling = True
        for task in self._tasks:
            self._finished = False
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_CANCELLED)
        self._over.set()
        if self._has_hooks:
            await lasting_loop.undisturbed(ending.wait)

    async def _all_ended(self) -> None:
        # The deadline of a worker that retires may be brought forward by a stop.
        while self._tasks and (left := self._deadline - time.monotonic()) > 0:
            await asyncio.wait(self._tasks, timeout=min(left, _LOOK_EVERY))

    def _pump(self, arrivals: OrderedDispatchQueue) -> None:
        """Take a message only when there is room for it: a more urgent one may still arrive."""
        while True:
            self._room.acquire()
            delivery = arrivals.get()
            if delivery is None:
                return
            self._call(functools.partial(self._begin, delivery))

    def _dispatch(self) -> None:
        self._woken = False
        while len(self._tasks) < self.size and (self._ahead or self._waiting):
            self._begin((self._ahead or self._waiting).popleft())

    def _begin(self, delivery: Delivery) -> None:
        # A message that isn't started is requeued, at the latest when the subscription closes.
        if self.is_stopping:
            self.in_flight.set_aside(delivery)
            life = None
        else:
            life = self.in_flight.of(delivery, self._context)
        if life is None:
            self._leave_room()
            return
        self._tasks.add(self._start_task(life))

    def _start_task(self, life: Life) -> _Task:
        life.message.tally = self._thread_tally
        task = self._loop.create_task(self._handle(life), context=life.context)
        self._running[task] = life.message.delivery
        task.add_done_callback(functools.partial(self._on_done, life))
        return task

    def _on_done(self, life: Life, task: _Task) -> None:
        del self._running[task]
        was_late = task in self._late
        self._late.discard(task)
        result = None if task.cancelled() else task.result()
        if task.cancelled() and not self.is_stopping:
            # A handler has cancelled it with all other tasks, maybe before its first step.
            self._shared.give_back(life.message.delivery)
        if was_late:
            self.late_ended += 1  # the successor ends the message
        elif isinstance(result, Unconfirmed):
            self.in_flight.leave(life, result.chunk)
        elif isinstance(result, Pause):
            self.in_flight.park(life, result)
        elif isinstance(result, Parked):
            self.in_flight.wait_for(life, result)
        elif result is not _FAILED:
            self.in_flight.ends(life.message)
        if task in self._tasks:
            self._tasks.discard(task)
            self._leave_room()
            if self._waiting or self._ahead:
                self._dispatch()

    def _leave_room(self) -> None:
        if self._ordered is not None:  # only the pump asks for room
            self._room.release()

    async def _handle(self, life: Life) -> _Result:
        """Take the steps of a message, and return their result."""
        try:
            take_step = functools.partial(self._take_step, life)
            return await drive(life.steps, take_step, lambda: self._is_cancelling)
        except asyncio.CancelledError:
            raise
        except BaseException:  # a bug in outbox must end neither the loop nor the message
            self.in_flight.failed(life)
            return _FAILED

    async def _take_step(self, life: Life, step: Step) -> Any:
        match step:
            case Call():
                value = step.run()
                if value is None or not inspect.isawaitable(value):
                    return value
                if step.timeout is not None:
                    value = self._in_time(life, value, step.timeout)
                return await value
            case Confirm(chunk):
                return await self.publisher.wait_for_async(chunk)
            case Blocking(function):
                return await asyncio.to_thread(function)
            case Written(write):
                await self._until_over(write)
        return None

    async def _until_over(self, write: PendingWrite) -> None:
        over = self._loop.create_future()

        def end() -> None:
            if not over.done():
                over.set_result(None)

        write.when_over(functools.partial(self._call, end))
        await over

    async def _in_time(self, life: Life, value: Awaitable[Any], seconds: float) -> Any:
        task: Any = asyncio.current_task()
        late = self._loop.call_later(seconds + _CANCELLED, self._on_late, life, task, seconds)
        try:
            return await cancelled_in_time(value, seconds)
        finally:
            late.cancel()

    def _on_late(self, life: Life, task: _Task, seconds: float) -> None:
        """Give up a message whose handler goes on although it was cancelled."""
        self._late.add(task)
        message = life.message
        logger.error(
            "message %r of %r exceeded its timeout of %.1f s and is given up; its handler was "
            "cancelled, but goes on",
            message.delivery.message_id,
            message.delivery.queue,
            seconds,
        )
        message.abandon()
        error = ProcessTimeout.after(seconds)
        successor = self._start_task(Life(message, message.give_up(error), self._context.copy()))
        if len(self._late) <= self.size:
            self._tasks.discard(task)
            self._tasks.add(successor)
        else:
            logger.error("%d handlers are late; the worker is a task short", len(self._late))


def _places_of(awaited: Any) -> list[str]:
    """Return where a coroutine waits, and what it waits for, and so on, each as file and line."""
    places: list[str] = []
    while awaited is not None and len(places) < _DEPTH:
        frame = getattr(awaited, "cr_frame", None) or getattr(awaited, "gi_frame", None)
        if frame is not None:
            places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
        awaited = getattr(awaited, "cr_await", None) or getattr(awaited, "gi_yieldfrom", None)
    return places


_DEPTH = 50


def _named(delivery: Delivery) -> str:
    return f"message {delivery.message_id!r} of {delivery.queue!r}"


_loops: dict[int, asyncio.AbstractEventLoop] = {}
"""The loops of running engines, by their threads."""


def _after_fork() -> None:
    """End a child of a coroutine when it first waits: its loop would run copies of all tasks."""
    loop = _loops.get(threading.get_ident())
    _loops.clear()
    if loop is not None:
        loop.call_soon(end_child, RuntimeError("a forked child can't wait in its parent's loop"))
        ready: Any = getattr(loop, "_ready", None)
        if isinstance(ready, deque):  # asyncio's own loop: ahead of the tasks that are ready
            ready.rotate(1)


process.after_fork(_after_fork)
