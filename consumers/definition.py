"""Consumers: what a message of a queue means to the application."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, get_args

from outbox import InvalidEvent, UsageError
from outbox.consumers.filters import Filters, filters_of
from outbox.consumers.received_event import ReceivedEvent
from outbox.consumers.retry import RetryPolicy, seconds_of
from outbox.header_values import check_name
from outbox.messages.delivery import QueueSpec, QueueType

__all__ = ["Consumer", "FunctionConsumer", "consumer"]

_LONGEST_QUEUE = 250  # "<queue>.dead" is at most 255 bytes


def _check(found: type[Consumer] | Consumer, what: str) -> None:
    queue, topics = found.queue, found.topics
    if not isinstance(queue, str) or len(queue.encode(errors="replace")) > _LONGEST_QUEUE:
        raise UsageError(f"{what}: the queue {queue!r} is not a name of at most 250 bytes")
    if isinstance(topics, str) or not isinstance(topics, Sequence):
        raise UsageError(f"{what}: topics are {topics!r}, not a list such as ['order.*']")
    try:
        for topic in topics:
            check_name("topic", topic)
        if found.exchange is not None:
            check_name("exchange", found.exchange)
    except InvalidEvent as error:
        raise UsageError(f"{what}: {error}") from None
    if found.retry is not None and not isinstance(found.retry, RetryPolicy):
        raise UsageError(f"{what}: retry is {found.retry!r}, not a RetryPolicy")
    for name in ("timeout", "deduplicate"):
        value = getattr(found, name)
        if value is None or (name == "deduplicate" and isinstance(value, bool)):
            continue
        if name == "deduplicate" and not isinstance(value, datetime.timedelta):
            raise UsageError(f"{what}: deduplicate is {value!r}, not a bool or a timedelta")
        try:
            if not seconds_of(value):
                raise UsageError(f"{name} is 0 seconds")
        except UsageError as error:
            raise UsageError(f"{what}: {name}: {error}") from None

    highest = found.max_priority
    if highest is not None and (type(highest) is not int or not 1 <= highest <= 255):
        raise UsageError(f"{what}: max_priority is {highest!r}, not an int from 1 to 255")
    if found.queue_type is not None and found.queue_type not in get_args(QueueType):
        raise UsageError(f"{what}: queue_type is {found.queue_type!r}, not 'quorum' or 'classic'")


def check_process(found: Consumer) -> None:
    """See that ``process`` is there and takes an event.

    Raises:
        UsageError: names the consumer and what is wrong.
    """
    called: Callable[..., Any]
    if isinstance(found, FunctionConsumer):
        called, what = found._function, f"the consumer {found._function.__qualname__}()"
    else:
        called, what = found.process, f"the consumer {type(found).__qualname__}"
        if type(found).process is Consumer.process:
            raise UsageError(f"{what} has no process()")
    try:
        signature = inspect.signature(called)
    except (TypeError, ValueError):  # of a callable that does not tell
        return
    try:
        signature.bind(None)
    except TypeError:
        raise UsageError(f"{what} has to take one argument, the event, not {signature}") from None


_CALLBACKS = ("on_success", "on_failure", "on_timeout", "on_dead")


class Consumer:
    """Handles the messages of one queue; subclass it and write ``process``.

    One instance serves all threads of a worker: ``process`` must be thread-safe.

    Attributes:
        queue: the queue's name, 1 to 250 bytes in UTF-8. It is declared durable.
        topics: patterns of targets that the queue is bound to, beside its own name: ``*`` stands
            for one word between dots, ``#`` for any number of words.
        exchange: the exchange it is bound to; None for the publisher's own.
        auto_publish: publish the follow-on events when ``process`` has succeeded; the next message
            begins while they are being confirmed, unless the worker has a single thread (or task).
            By default ``process`` publishes them itself, with ``publish()``.
        retry: what is done about failed attempts; None for no retry.
        timeout: seconds, or a timedelta, that ``process`` has; None for any time. Then the attempt
            has failed. A coroutine is cancelled. A thread cannot be: it goes on, without being able
            to publish, beside the next attempt; see ``Worker``.
        deduplicate: process a message id once, and remember it for seven days, or for a timedelta;
            in a database, see ``Worker``.
        skip: names of inherited filters that are not to run.
        filters: what :func:`before`, :func:`after` and :func:`around` have made, with the bases'.
        callbacks: which of the ``on_`` methods are overridden.
        is_async: whether ``process`` is a coroutine function.
        max_priority: 1 to 255: messages are processed by their priority, higher ones first; those
            above it count as it. On RabbitMQ the queue is then a classic one, not replicated; 10
            is plenty there. None leaves priorities to the broker (``docs/consuming.md``).
        queue_type: ``"quorum"`` or ``"classic"``; the default is quorum without ``max_priority``
            and classic with it. Neither can be changed for a queue that is there.
    """

    queue: ClassVar[str] = ""
    topics: ClassVar[Sequence[str]] = ()
    exchange: ClassVar[str | None] = None
    auto_publish: ClassVar[bool] = False
    retry: ClassVar[RetryPolicy | None] = None
    timeout: ClassVar[float | datetime.timedelta | None] = None
    deduplicate: ClassVar[bool | datetime.timedelta] = False
    skip: ClassVar[Sequence[str]] = ()

    filters: ClassVar[Filters] = Filters()
    callbacks: ClassVar[frozenset[str]] = frozenset()
    is_async: ClassVar[bool] = False
    max_priority: ClassVar[int | None] = None
    queue_type: ClassVar[QueueType | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check what the class says.

        Raises:
            UsageError: names the class and what is wrong.
        """
        super().__init_subclass__(**kwargs)
        what = f"the consumer {cls.__qualname__}"
        _check(cls, what)
        cls.filters = filters_of(cls, what=what)
        cls.callbacks = frozenset(
            name for name in _CALLBACKS if getattr(cls, name) is not getattr(Consumer, name)
        )
        cls.is_async = inspect.iscoroutinefunction(cls.process)
        if not cls.is_async and cls.process is not Consumer.process:
            for name in (*cls.callbacks, *sum(dataclasses.astuple(cls.filters), ())):
                member = getattr(cls, name)
                if inspect.iscoroutinefunction(member) or getattr(member, "is_async", False):
                    raise UsageError(f"{what}: {name}() is asynchronous, and process() is not")

    @functools.cached_property
    def time_limit(self) -> float | None:
        """The timeout in seconds; asked for with every message, so worked out once."""
        return None if self.timeout is None else seconds_of(self.timeout)

    def on_success(self, event: ReceivedEvent) -> Any:
        """Be told that a message was processed. Called before it is acked.

        What these four enqueue is published when they return. What they raise is logged, and
        changes nothing. In a consumer of asyncio they may be coroutine functions.
        """

    def on_failure(self, event: ReceivedEvent, error: BaseException) -> Any:
        """Be told of a failed attempt, whether it is retried or not."""

    def on_timeout(self, event: ReceivedEvent) -> Any:
        """Be told that an attempt took longer than ``timeout``; ``on_failure`` is called, too."""

    def on_dead(self, event: ReceivedEvent, reason: str) -> Any:
        """Be told that a message goes to the dead letters."""

    def process(self, event: ReceivedEvent) -> Any:
        """Handle one message; a plain function, or a coroutine function.

        Events enqueued here are follow-ons: ``publish()`` waits until the broker has confirmed
        them, and only then is the message acked. They get the same ids when the same message is
        processed again.

        Returns:
            None or ``ACK``; ``REJECT`` for the dead letters; ``REQUEUE`` to try again in a second.

        Raises:
            Reject: to the dead letters, with a reason.
            Retry: a failed attempt, to be tried again.
            Requeue: back to the queue.
            Exception: any other is a failed attempt: ``retry`` decides what follows, and without
                one the message goes to the dead letters.
        """
        raise NotImplementedError(f"{type(self).__qualname__} has no process()")

    def spec(self, exchange: str) -> QueueSpec:
        """Return what is to be declared, ``exchange`` being the publisher's."""
        bound_to = exchange if self.exchange is None else self.exchange
        usual: QueueType = "quorum" if self.max_priority is None else "classic"
        return QueueSpec(
            self.queue,
            tuple(self.topics),
            bound_to,
            max_priority=self.max_priority,
            queue_type=self.queue_type or usual,
        )


class FunctionConsumer(Consumer):
    """A consumer made of a function by :func:`consumer`; calling it calls the function."""

    def __init__(self, function: Callable[[ReceivedEvent], Any], **attributes: Any) -> None:
        """Make a consumer that processes with ``function``."""
        functools.update_wrapper(self, function)
        self._function = function
        for name, value in attributes.items():
            setattr(self, name, value)
        self.is_async = inspect.iscoroutinefunction(function)  # type: ignore[misc]
        _check(self, f"the consumer {function.__qualname__}")
        if not self.queue:
            raise UsageError(f"the consumer {function.__qualname__} names no queue")

    def __call__(self, event: ReceivedEvent) -> Any:  # noqa: D102
        return self._function(event)

    def __repr__(self) -> str:
        return f"<consumer {self._function.__qualname__} of {self.queue!r}>"

    def process(self, event: ReceivedEvent) -> Any:
        """Call the function."""
        return self._function(event)


def consumer(
    queue: str,
    *,
    topics: Sequence[str] = (),
    exchange: str | None = None,
    auto_publish: bool = False,
    retry: RetryPolicy | None = None,
    timeout: float | datetime.timedelta | None = None,
    deduplicate: bool | datetime.timedelta = False,
    max_priority: int | None = None,
    queue_type: QueueType | None = None,
) -> Callable[[Callable[[ReceivedEvent], Any]], FunctionConsumer]:
    """Make a consumer of the function below; the arguments are :class:`Consumer`'s attributes.

    Raises:
        UsageError: names the function and what is wrong.
    """

    def decorate(function: Callable[[ReceivedEvent], Any]) -> FunctionConsumer:
        return FunctionConsumer(
            function,
            queue=queue,
            topics=topics,
            exchange=exchange,
            auto_publish=auto_publish,
            retry=retry,
            timeout=timeout,
            deduplicate=deduplicate,
            max_priority=max_priority,
            queue_type=queue_type,
        )

    return decorate
