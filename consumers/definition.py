"""Consumers: what a message of a queue means to the application."""

from __future__ import annotations

import dataclasses
import datetime
import difflib
import functools
import inspect
import warnings
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, get_args

from outbox import InvalidEvent, UsageError
from outbox.consumers.filters import Filters, filters_of
from outbox.consumers.retry import RetryPolicy, seconds_of
from outbox.header_values import check_name
from outbox.messages.delivery import Delivery, QueueSpec, QueueType
from outbox.messages.received_event import ReceivedEvent
from outbox.recurring.recurring_task import RecurringTask
from outbox.system.signatures import takes_no_arguments

__all__ = ["Consumer", "FunctionConsumer", "consumer"]

_LONGEST_QUEUE = 250  # "<queue>.dead" is at most 255 bytes


def _check(consumer: type[Consumer] | Consumer, what: str) -> None:
    queue, topics = consumer.queue, consumer.topics
    if not isinstance(queue, str) or len(queue.encode(errors="replace")) > _LONGEST_QUEUE:
        raise UsageError(f"{what}: queue is {queue!r}, not a name of at most 250 bytes in UTF-8")
    if isinstance(topics, str) or not isinstance(topics, Sequence):
        raise UsageError(f"{what}: topics are {topics!r}, not a list such as ['order.*']")
    try:
        for topic in topics:
            check_name("topic", topic)
        if consumer.exchange is not None:
            check_name("exchange", consumer.exchange)
    except InvalidEvent as error:
        raise UsageError(f"{what}: {error}") from None
    if consumer.retry is not None and not isinstance(consumer.retry, RetryPolicy):
        raise UsageError(f"{what}: retry is {consumer.retry!r}, not a RetryPolicy")
    for name in ("auto_publish", "ordered"):
        if not isinstance(getattr(consumer, name), bool):
            raise UsageError(f"{what}: {name} is {getattr(consumer, name)!r}, not a bool")
    for name in ("timeout", "deduplicate"):
        value = getattr(consumer, name)
        if value is None or (name == "deduplicate" and isinstance(value, bool)):
            continue
        if name == "deduplicate" and not isinstance(value, datetime.timedelta):
            raise UsageError(f"{what}: deduplicate is {value!r}, not a bool or a timedelta")
        try:
            if not seconds_of(value):
                raise UsageError(f"{name} is 0 seconds")
        except UsageError as error:
            raise UsageError(f"{what}: {name}: {error}") from None

    highest = consumer.max_priority
    if highest is not None and (type(highest) is not int or not 1 <= highest <= 255):
        raise UsageError(f"{what}: max_priority is {highest!r}, not an int from 1 to 255")
    if consumer.queue_type is not None and consumer.queue_type not in get_args(QueueType):
        raise UsageError(
            f"{what}: queue_type is {consumer.queue_type!r}, not 'quorum' or 'classic'"
        )


def instance_of(consumer: Consumer | type[Consumer]) -> Consumer:
    """Return ``consumer``, or an instance of it if it is a class.

    Raises:
        UsageError: it isn't a consumer, or a class of which no instance can be made.
    """
    if isinstance(consumer, Consumer):
        return consumer
    if not (isinstance(consumer, type) and issubclass(consumer, Consumer)):
        raise UsageError(f"{consumer!r} is not a consumer: a class derived from Consumer, or one")
    what = f"the consumer {consumer.__qualname__}"
    if inspect.isabstract(consumer):
        missing = ", ".join(
            f"{name}()" for name in sorted(getattr(consumer, "__abstractmethods__", ()))
        )
        raise UsageError(f"{what} is abstract: it has no {missing}")
    if not takes_no_arguments(consumer):
        raise UsageError(
            f"{what} takes arguments: make an instance, and give that to Worker() or to "
            "outbox-consume (MODULE:NAME) instead of the class"
        )
    return consumer()


def has_process(consumer: type[Consumer]) -> bool:
    """Return whether the class or a base of it defines ``process``."""
    return consumer.process is not Consumer.process


def check_process(consumer: Consumer) -> None:
    """Check that ``process`` exists and takes an event, and what ``__init__`` has set.

    Raises:
        UsageError: it doesn't, or an attribute is invalid; the message names the consumer.
    """
    handler: Callable[..., Any]
    if isinstance(consumer, FunctionConsumer):
        handler, what = consumer._function, f"the consumer {_name_of(consumer._function)}()"
    else:
        handler, what = consumer.process, f"the consumer {type(consumer).__qualname__}"
        if not has_process(type(consumer)):
            raise UsageError(f"{what} has no process()")
        _check(consumer, what)
    try:
        signature = inspect.signature(handler)
    except (TypeError, ValueError):  # a callable without a signature, such as some built-ins
        return
    try:
        signature.bind(None)
    except TypeError:
        raise UsageError(f"{what} must take one argument, the event, not {signature}") from None


_CALLBACKS = ("on_success", "on_failure", "on_timeout", "on_dead")
_SETTINGS = (
    "queue",
    "topics",
    "exchange",
    "auto_publish",
    "retry",
    "timeout",
    "deduplicate",
    "skip",
    "max_priority",
    "queue_type",
    "ordered",
)
_COMPUTED = ("filters", "callbacks", "is_async", "time_limit")
_LIKENESS = 0.85


def _check_names(consumer: type[Consumer], what: str) -> None:
    """Refuse or warn of names that look like an attribute of consumers, and have no effect."""
    for name, value in vars(consumer).items():
        if name in _COMPUTED:
            raise UsageError(f"{what}: {name} can't be set, it is computed; choose another name")
        if name.startswith("_") or hasattr(Consumer, name):
            continue
        known = _CALLBACKS if callable(value) else _SETTINGS
        [meant] = difflib.get_close_matches(name.lower(), known, 1, _LIKENESS) or [""]
        if name == "topic":
            raise UsageError(f"{what}: topic is not an attribute of consumers; set topics = [...]")
        if meant:
            warnings.warn(
                f"{what}: {name} is not an attribute of consumers; do you mean {meant}?",
                stacklevel=3,
            )


def _is_coroutine_function(function: Any, what: str) -> bool:
    """Return whether calls of ``function`` must be awaited, as far as can be seen.

    Raises:
        UsageError: it is a generator function, which a call doesn't even start.
    """
    inner = function
    while not inspect.isfunction(inner):
        if isinstance(inner, functools.partial | functools.partialmethod):
            inner = inner.func
        elif isinstance(inner, staticmethod | classmethod):
            inner = inner.__func__
        else:
            break
    if not isinstance(inner, type) and not inspect.isroutine(inner):
        inner = getattr(type(inner), "__call__", inner)  # noqa: B004  a callable object
    if inspect.isgeneratorfunction(inner) or inspect.isasyncgenfunction(inner):
        raise UsageError(f"{what}: process() has a yield, so that calling it does nothing")
    return inspect.iscoroutinefunction(inner)


def _name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, a partial or a callable object."""
    while isinstance(function, functools.partial):
        function = function.func
    return str(getattr(function, "__qualname__", type(function).__qualname__))


class Consumer:
    """A consumer of one queue; subclass it and write ``process``.

    One instance serves all threads of a worker: ``process`` must be thread-safe.

    Attributes:
        queue: the queue's name, 1 to 250 bytes in UTF-8. It is declared durable.
        topics: patterns of targets that the queue is bound to, besides its name: ``*`` stands for
            one word between dots, ``#`` for any number of words.
        exchange: the exchange the queue is bound to; None for the publisher's.
        auto_publish: True to publish the follow-on events after ``process`` has succeeded; the next
            message starts while they are being confirmed, unless the worker has a single thread
            (or task). By default ``process`` publishes them with ``publish()``.
        retry: the policy for failed attempts; None to never retry.
        timeout: the time limit of ``process``, in seconds or as a timedelta; None for no limit. An
            attempt that exceeds it has failed. A coroutine is cancelled; a thread can't be stopped:
            it goes on beside the next attempt, but can no longer publish; see ``Worker``.
        deduplicate: True to process a message id only once, and remember it for seven days, or for
            the given timedelta; needs a database, see ``Worker``.
        skip: the names of inherited filters not to run.
        filters: the :func:`before`, :func:`after` and :func:`around` filters, inherited ones
            included.
        callbacks: the names of the ``on_`` methods that are overridden.
        is_async: whether ``process`` is a coroutine function.
        max_priority: 1 to 255: messages are processed by priority, highest first; priorities above
            it count as it. On RabbitMQ the queue is then classic, not replicated; 10 is plenty
            there. None leaves priorities to the broker (``docs/consuming.md``).
        queue_type: ``"quorum"`` or ``"classic"``; the default is quorum without ``max_priority``
            and classic with it. Neither can be changed for an existing queue.
        ordered: True to process messages with the same key one after the other, in the order in
            which they were stored, whatever the number of threads and workers. Only if a database
            is the broker, and only if all workers of the queue have it
            (``docs/consuming.md``).
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
    ordered: ClassVar[bool] = False
    _keeps: ClassVar[float | None] = None
    """The seconds for which the results of a task are kept; None for other messages."""
    _hides_errors: ClassVar[bool] = False
    _is_paced: ClassVar[bool] = False
    """Whether a worker claims little ahead, so that the order of claims is that of processing."""
    _is_mixed: ClassVar[bool] = False
    """Whether some of its messages need a thread, and others the event loop."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Check the class's attributes, and collect its filters and callbacks.

        Raises:
            UsageError: an attribute is invalid; the message names it and the class.
        """
        super().__init_subclass__(**kwargs)
        what = f"the consumer {cls.__qualname__}"
        _check_names(cls, what)
        _check(cls, what)
        cls.filters = filters_of(cls, what=what)
        cls.callbacks = frozenset(
            name for name in _CALLBACKS if getattr(cls, name) is not getattr(Consumer, name)
        )
        process = inspect.getattr_static(cls, "process")  # as it stands there: a partialmethod
        cls.is_async = _is_coroutine_function(process, what)
        if not cls.is_async and has_process(cls):
            for name in (*cls.callbacks, *sum(dataclasses.astuple(cls.filters), ())):
                member = getattr(cls, name)
                if inspect.iscoroutinefunction(member) or getattr(member, "is_async", False):
                    raise UsageError(f"{what}: {name}() is asynchronous, but process() is not")

    @functools.cached_property
    def time_limit(self) -> float | None:
        """The timeout in seconds; computed once, since every message needs it."""
        return None if self.timeout is None else seconds_of(self.timeout)

    def on_success(self, event: ReceivedEvent) -> Any:
        """React to a processed message; called before it is acked.

        What the four ``on_`` callbacks enqueue is published when they return. Their exceptions are
        logged and otherwise ignored. In an asyncio consumer they may be coroutine functions.
        """

    def on_failure(self, event: ReceivedEvent, error: BaseException) -> Any:
        """React to a failed attempt, whether it is retried or not."""

    def on_timeout(self, event: ReceivedEvent) -> Any:
        """React to an attempt that exceeded ``timeout``; ``on_failure`` is called, too."""

    def on_dead(self, event: ReceivedEvent, reason: str) -> Any:
        """React to a message that goes to the dead letters."""

    def process(self, event: ReceivedEvent) -> Any:
        """Handle one message; a plain function, or a coroutine function.

        Events enqueued here are follow-on events: ``publish()`` waits until the broker has
        confirmed them, and only then is the message acked. They get the same ids if the message is
        processed again.

        Returns:
            None or ``ACK``; ``REJECT`` to dead-letter the message; ``REQUEUE`` to try it again in a
            second.

        Raises:
            Reject: to dead-letter the message, with a reason.
            Retry: to fail the attempt, and try again.
            Requeue: to return the message to its queue.
            Exception: any other is a failed attempt: ``retry`` decides what follows, and without a
                policy the message is dead-lettered.
        """
        raise NotImplementedError(f"{type(self).__qualname__} has no process()")

    def _for(self, delivery: Delivery) -> Consumer:
        """Return the consumer for a message of the queue: a task's, in a queue of tasks."""
        return self

    def _recurring(self) -> Sequence[RecurringTask]:
        """Return the recurring tasks of the queue, which a worker ticks for."""
        return ()

    def spec(self, exchange: str) -> QueueSpec:
        """Return the queue to declare; ``exchange`` is the publisher's."""
        bound_to = exchange if self.exchange is None else self.exchange
        default_type: QueueType = "quorum" if self.max_priority is None else "classic"
        return QueueSpec(
            self.queue,
            tuple(self.topics),
            bound_to,
            max_priority=self.max_priority,
            queue_type=self.queue_type or default_type,
            ordered=self.ordered,
        )


class FunctionConsumer(Consumer):
    """A consumer made from a function by :func:`consumer`; calling it calls the function."""

    def __init__(self, function: Callable[[ReceivedEvent], Any], **attributes: Any) -> None:
        """Create a consumer whose handler is ``function``."""
        functools.update_wrapper(self, function)
        self._function = function
        for name, value in attributes.items():
            setattr(self, name, value)
        what = f"the consumer {_name_of(function)}"
        if isinstance(function, type):
            raise UsageError(f"{what} is a class: derive it from Consumer, and set queue in it")
        if not callable(function):
            raise UsageError(f"@consumer needs a function, not {function!r}")
        self.is_async = _is_coroutine_function(function, what)  # type: ignore[misc]
        _check(self, what)
        if not self.queue:
            raise UsageError(f"{what} names no queue")

    def __call__(self, event: ReceivedEvent) -> Any:  # noqa: D102
        return self._function(event)

    def __repr__(self) -> str:
        return f"<consumer {_name_of(self._function)} of {self.queue!r}>"

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
    ordered: bool = False,
) -> Callable[[Callable[[ReceivedEvent], Any]], FunctionConsumer]:
    """Make a consumer from the decorated function; the arguments are ``Consumer``'s attributes.

    Raises:
        UsageError: an argument is invalid; the message names it and the function.
    """
    if callable(queue):
        raise UsageError(
            f"{_name_of(queue)}: @consumer needs the name of a queue: @consumer('name')"
        )

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
            ordered=ordered,
        )

    return decorate
