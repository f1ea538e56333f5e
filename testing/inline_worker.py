"""Processes and settles one message in a test, through the life it has in a worker."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import datetime
import inspect
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from outbox import Event, Publisher, UsageError, sinks, surroundings
from outbox.consumers import Consumer, ProcessTimeout, ReceivedEvent
from outbox.consumers.event_loop import lasting_loop
from outbox.consumers.message import databases
from outbox.consumers.message.message import Message
from outbox.consumers.message.steps import (
    Blocking,
    Call,
    Confirm,
    Pause,
    Step,
    Steps,
    call,
    cancelled_in_time,
    drive,
)
from outbox.consumers.message.tally import Tally
from outbox.consumers.outcome import Failed, Outcome
from outbox.messages.delivery import Delivery
from outbox.messages.remembered import window_of
from outbox.results.memory_results import MemoryResults
from outbox.system.steady_clock import monotonic
from outbox.testing.recorder import Recorder

__all__ = [
    "InlineMessage",
    "InlineWorker",
    "MemoryInbox",
    "check_loop",
    "process",
    "process_async",
]


class InlineMessage(Message):
    """A message that notes how it ended.

    Attributes:
        sent: the event, as it was published.
        outcome: the outcome; None until it is known.
        is_settled: False if the message is still in its queue: it is held, or was returned.
        follow_ons: the events that it has published.
    """

    def __init__(
        self,
        consumer: Consumer,
        delivery: Delivery,
        worker: InlineWorker,
        event: Event,
        recorder: Recorder,
    ) -> None:
        """Create the message of ``event``, which ``worker`` will process."""
        super().__init__(consumer, delivery, worker)
        self.sent = event
        self.worker = worker
        self.outcome: Outcome | None = None
        self.is_settled = False
        self.follow_ons: tuple[Event, ...] = ()
        self._recorder = recorder
        self._before = len(recorder.published)

    def conclude(self, result: Outcome | Failed) -> Steps[Outcome]:
        """Decide what follows, and note it: a message that is held is never settled."""
        self.outcome = yield from super().conclude(result)
        self.follow_ons = self._recorder.published[self._before :]
        return self.outcome

    def settle(self, outcome: Outcome) -> Steps[Outcome | None]:
        """Settle the message, and note its last outcome."""
        settled = yield from super().settle(outcome)
        if settled is not None:
            self.outcome, self.is_settled = settled, True
        return settled

    def abandon(self) -> None:
        """Leave the message to ``give_up()``; from now on its attempt can publish nothing."""
        super().abandon()
        if self._attempt is not None:
            self._attempt.close()


class MemoryInbox:
    """Remembers for one test what its consumers have done. Thread-safe.

    It knows nothing of the handlers' transactions, so none of them notes a message.
    """

    def __init__(self) -> None:
        """Create an empty inbox."""
        self.done: dict[tuple[str, str], datetime.datetime] = {}

    def entry(self, consumer: Consumer, event: ReceivedEvent) -> _Entry:
        """Return the entry of ``event``."""
        return _Entry(self, (consumer.queue, event.id), window_of(consumer))


class _Entry:
    """The entry of one message; see ``outbox.consumers.message.deduplication.InboxEntry``."""

    committed = False
    failure = None

    def __init__(
        self, inbox: MemoryInbox, key: tuple[str, str], window: datetime.timedelta
    ) -> None:
        self._inbox = inbox
        self._key = key
        self._window = window
        self._given_up = False

    def is_done(self) -> bool:
        at = self._inbox.done.get(self._key)
        return at is not None and datetime.datetime.now(datetime.UTC) - at <= self._window

    def join(self) -> None:
        pass

    def accompany(self, write: Callable[[Any], None]) -> None:
        pass

    def leave(self) -> None:
        pass

    def note(self) -> None:
        if not self._given_up:
            self._inbox.done[self._key] = datetime.datetime.now(datetime.UTC)

    def give_up(self) -> bool:
        self._given_up = True
        return False


class _Settled:
    """What a message that no broker has delivered asks of its subscription: nothing."""

    limits_processing = False
    keeps_order = False

    def ack(self, delivery: Delivery) -> None:
        pass

    def requeue(self, delivery: Delivery, delay: float) -> None:
        pass

    def is_stale(self, delivery: Delivery) -> bool:
        return False

    def ping(self, answer: Callable[[], None]) -> bool:
        """Return False: there is no thread."""
        return False

    def declare_again(self) -> None:
        pass


class _Late(BaseException):
    """Raised in the steps of a message when a call ends after its timeout."""


class InlineWorker:
    """An engine that processes and settles one message in its caller; see ``Services``.

    The handler runs in the caller's thread or event loop. A message that would have to wait is
    left, as when a worker stops. A plain handler that exceeds its timeout can't be stopped, as in a
    worker: the message is given up in time, and ended when the handler returns.
    """

    overlaps = False

    def __init__(self, publisher: Publisher, inbox: MemoryInbox, results: MemoryResults) -> None:
        """Create an engine whose message publishes with ``publisher``."""
        self.publisher = publisher
        self.inbox = inbox
        self.results = results
        self.surroundings = surroundings.here()
        self.subscription: Any = _Settled()
        self.tally = Tally({})
        self.is_stopping = False
        self._abandon: Callable[[], None] = _do_nothing
        self._timeout: ProcessTimeout | None = None
        self._keeps_session: bool | None = None
        self._interruption: BaseException | None = None

    def run(self, message: InlineMessage) -> None:
        """Process and settle ``message``."""
        self._abandon = message.abandon
        with contextlib.suppress(_Late):
            self._take_all(message.live())
        if self._timeout is not None:
            self._take_all(message.give_up(self._timeout))

    async def run_async(self, message: InlineMessage) -> None:
        """Process and settle ``message`` in this task."""
        steps = message.live()
        ended: object = await drive(steps, self._take_async)
        while isinstance(ended, Pause):
            self.is_stopping = True
            ended = await drive(steps, self._take_async)
        if self._interruption is not None:
            message.is_settled = False
            raise self._interruption

    def _take_all(self, steps: Steps[Any]) -> None:
        ended: object = call(steps, self._take)
        while isinstance(ended, Pause):  # a wait ends at once, and the message is left
            self.is_stopping = True
            ended = call(steps, self._take)

    def _take(self, step: Step) -> Any:
        match step:
            case Call(function) if self._is_refresh(function):
                return None
            case Call(timeout=seconds) if seconds is not None:
                return self._call_in_time(step, seconds)
            case Call():
                return step.run()
            case Confirm(chunk):
                return self.publisher.wait_for(chunk)
            case Blocking(function):
                return function()

    async def _take_async(self, step: Step) -> Any:
        try:
            if isinstance(step, Confirm):
                return await self.publisher.wait_for_async(step.chunk)
            if not isinstance(step, Call):
                return self._take(step)
            value = self._take(step._replace(timeout=None))
            if value is None or not inspect.isawaitable(value):
                return value
            seconds = step.timeout
            return await (value if seconds is None else cancelled_in_time(value, seconds))
        except (Exception, SystemExit, asyncio.CancelledError):
            raise
        except BaseException as error:  # pytest.fail() or a simulated crash: it ends the test
            self._interruption = error
            raise

    def _call_in_time(self, step: Call, seconds: float) -> Any:
        limit = _TimeLimit(seconds, self._abandon)
        error: BaseException | None = None
        result = None
        try:
            result = step.run()
        except BaseException as raised:
            error = raised
        if not limit.leave():
            self._timeout = ProcessTimeout.after(seconds)
            raise _Late from error
        if error is not None:
            raise error
        return result

    def _is_refresh(self, function: Callable[..., Any]) -> bool:
        """Return whether the call would clean up database connections that are the test's own.

        A session that the test has opened in this scope is left as it is. One that the handler has
        opened is the handler's, and is removed.
        """
        function = getattr(function, "func", function)  # asgiref's sync_to_async() has wrapped it
        if getattr(function, "__module__", None) in ("django.db", databases.__name__):
            return True
        if function is not sinks.remove or sinks.has_session is None:
            return False
        if self._keeps_session is None:
            self._keeps_session = sinks.has_session()
        return self._keeps_session


def check_loop(consumers: Iterable[Consumer]) -> None:
    """Check that the calling test can run ``consumers``.

    Raises:
        UsageError: one is asynchronous, and an event loop is running, in which it should run.
    """
    for consumer in consumers:
        if consumer.is_async and _loop_runs():
            raise UsageError(
                f"{consumer!r} is asynchronous, and so is the test: await deliver_async(), "
                "deliver_all_async() or perform_async(), which run it in the test's event loop"
            )


def process(message: InlineMessage) -> None:
    """Process and settle ``message`` in a new context; call ``check_loop()`` before."""
    context = contextvars.Context()
    if message.consumer.is_async and _django_runs():
        context.run(_asgiref().async_to_sync(message.worker.run_async), message)
    elif message.consumer.is_async:
        # Given a factory, it leaves the current event loop of the thread alone.
        work = message.worker.run_async(message)
        lasting_loop.run(work, loop_factory=_new_loop, context=context)
    elif _loop_runs():  # there is none in a worker's thread, and publish() would refuse to block it
        with ThreadPoolExecutor(1) as executor:
            executor.submit(context.run, message.worker.run, message).result()
    else:
        context.run(message.worker.run, message)


async def process_async(message: InlineMessage) -> None:
    """Process and settle ``message`` in a new context: a coroutine as a task of this loop."""
    context = contextvars.Context()
    if message.consumer.is_async:
        await asyncio.create_task(message.worker.run_async(message), context=context)
        return
    if _django_runs():
        await _asgiref().sync_to_async(context.run)(message.worker.run, message)
    else:
        await asyncio.to_thread(context.run, message.worker.run, message)


def _asgiref() -> Any:
    """Return what crosses between threads and event loops for Django.

    Its connections belong to a thread: with these, to that of the test's own queries.
    """
    return sys.modules["asgiref.sync"]


def _new_loop() -> asyncio.AbstractEventLoop:
    """Return an event loop whose timeouts end even where the test has frozen the time."""
    loop = asyncio.new_event_loop()
    with contextlib.suppress(AttributeError):  # uvloop's are measured in C anyway
        loop.time = monotonic  # type: ignore[method-assign]
    return loop


def _django_runs() -> bool:
    """Return whether this process runs a Django project, not only imports some of Django."""
    conf: Any = sys.modules.get("django.conf")
    return "django.db" in sys.modules and conf is not None and conf.settings.configured


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _do_nothing() -> None:
    pass


class _TimeLimit:
    """A time limit on one call. Thread-safe.

    ``threading`` waits by the real clock even where a test has frozen the time.
    """

    def __init__(self, seconds: float, on_expired: Callable[[], None]) -> None:
        self._lock = threading.Lock()
        self._is_over = False
        self._on_expired = on_expired
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.daemon = True
        self._timer.start()

    def leave(self) -> bool:
        """End the call; return whether it was in time."""
        self._timer.cancel()
        with self._lock:
            in_time = not self._is_over
            self._is_over = True
        self._timer.join()
        return in_time

    def _expire(self) -> None:
        with self._lock:
            if self._is_over:
                return
            self._is_over = True
        self._on_expired()
