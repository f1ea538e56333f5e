"""One call: its options, its session, and the event that it becomes."""

from __future__ import annotations

import datetime
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from outbox import configuration, sinks
from outbox.errors import InvalidEvent
from outbox.event import Event
from outbox.header_values import check_address
from outbox.messages import task_queues
from outbox.messages.headers import KEEP_RESULT
from outbox.settings import Settings
from outbox.sinks import BOUND
from outbox.tasks import mapped
from outbox.tasks.target import Target, target_of
from outbox.tasks.task_handle import TaskHandle
from outbox.unit_of_work.collector import EventCollector

__all__ = ["LONGEST_KEEP", "CallOptions", "TaskOptions", "checked_priority", "sent"]

R = TypeVar("R")

LATER, SCHEDULED = 5, 3
"""The default priorities."""
_HIGHEST = 9
_SCALARS = frozenset((int, str, float, bool, types.NoneType))
_PASSED_ON = ("delay", "key", "id", "headers", "session", "connection", "using")
_NAMES = ("at", "priority", "queue", "keep_result", *_PASSED_ON)

KEPT = 7 * 86_400.0
"""The seconds for which a result is kept by default."""
LONGEST_KEEP = 36_525 * 86_400.0
"""The seconds for which a result is kept at most: a hundred years."""


def checked_priority(priority: Any, what: str) -> int | None:
    """Return a priority, or None.

    Raises:
        InvalidEvent: it isn't one; the message begins with ``what``.
    """
    if priority is not None and (type(priority) is not int or not 0 <= priority <= _HIGHEST):
        raise InvalidEvent(f"{what}: the priority {priority!r} is not an int from 0 to {_HIGHEST}")
    return priority


def checked_keep(keep: Any, what: str) -> float:
    """Return the seconds for which a result is kept.

    Raises:
        InvalidEvent: it is neither a bool nor a timedelta; the message begins with ``what``.
    """
    if isinstance(keep, bool):
        return KEPT if keep else 0.0
    if not isinstance(keep, datetime.timedelta) or not 0 <= keep.total_seconds() <= LONGEST_KEEP:
        raise InvalidEvent(f"{what}: keep_result is {keep!r:.60}, not a bool or a timedelta")
    return keep.total_seconds()


class CallOptions:
    """The options of a call.

    Attributes:
        queue: the queue, or None for the task's.
        priority: the priority, or None for the task's.
        passed_on: what ``enqueue_event`` gets.
        keep: the seconds for which the result is kept, or None for the task's.
        is_scheduled: whether the default priority is that of ``schedule()``.
    """

    __slots__ = ("is_scheduled", "keep", "passed_on", "priority", "queue")

    def __init__(
        self,
        queue: str | None,
        priority: int | None,
        passed_on: dict[str, Any],
        keep: float | None = None,
    ) -> None:
        self.keep = keep
        self.queue = queue
        self.priority = priority
        self.passed_on = passed_on
        self.is_scheduled = False

    @classmethod
    def checked(cls, options: Mapping[str, Any]) -> CallOptions:
        """Return options that are valid by themselves.

        Raises:
            InvalidEvent: one isn't, or there is no such option.
        """
        for name in options:
            if name not in _NAMES:
                known = ", ".join(_NAMES)
                raise InvalidEvent(f"{name!r} is no option of a call; the options are {known}")
        passed_on = {name: options[name] for name in _PASSED_ON if name in options}
        at = options.get("at")
        if at is not None:
            if passed_on.get("delay") is not None:
                raise InvalidEvent("give at or delay, not both")
            if isinstance(at, datetime.timedelta):
                passed_on["delay"] = at
            elif isinstance(at, datetime.datetime) and at.utcoffset() is not None:
                passed_on["deliver_at"] = at
            else:
                raise InvalidEvent(
                    f"{at!r:.60} is neither a datetime with a time zone nor a timedelta from now"
                )
        queue = options.get("queue")
        if queue is not None:
            check_address("queue", queue)
            if not queue or len(queue.encode()) > 250:
                raise InvalidEvent(f"the queue {queue!r:.60} isn't a name of 1 to 250 bytes")
            task_queues.note(queue, None)
        id_ = options.get("id")
        if isinstance(id_, str) and not id_.isprintable():
            # Messages come from outside: of those with such ids workers keep nothing.
            raise InvalidEvent(
                f"the id {id_!r:.60} of a task has a character that isn't printable, such as a "
                "line break or a no-break space; leave it out, or pass repr() or a hash of it"
            )
        priority = checked_priority(options.get("priority"), "options")
        keep = None
        if "keep_result" in options:
            keep = checked_keep(options["keep_result"], "options")
        return cls(queue, priority, passed_on, keep)


class TaskOptions:
    """The options of a call that is yet to be named; see :func:`outbox.tasks.options`."""

    __slots__ = ("_options",)

    def __init__(self, options: CallOptions | None) -> None:
        """Call with ``options``."""
        self._options = options

    def later(self, call: Callable[..., R], /, *args: Any, **kwargs: Any) -> TaskHandle[R]:
        """Call ``call`` later; see :func:`outbox.tasks.later`."""
        target = getattr(call, "target", None)
        if isinstance(target, Target):
            return sent(target, call, args, kwargs, self._options)
        target = target_of(call)
        return sent(target, None, (*target.first, *args), kwargs, self._options)


def sent(
    target: Target,
    task: Any,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    options: CallOptions | None,
) -> TaskHandle[Any]:
    """Enqueue the call of ``target``, and return its handle.

    Args:
        target: what is called.
        task: the task that it is, with its queue and priority; None for an undecorated one.
        args: the arguments, an instance included.
        kwargs: likewise.
        options: the options, or None.
    """
    collector = EventCollector.current()
    is_plain = not kwargs and _SCALARS.issuperset(map(type, args))
    if options is None and task is not None and is_plain and sinks.bound is None:  # mostly
        event = collector.enqueue_event(
            target.parameters.plain(args),
            task.queue or task_queues.queue_of(_settings(collector)),
            headers=target.headers,
            priority=LATER if task.priority is None else task.priority,
            exchange="",
        )
        buffer, row = collector._innermost(), None
        if sinks.framework is not None:
            row = sinks.framework.followed(event, BOUND)
        return TaskHandle(event.id, event, buffer, None, target, task.keep_result, row)
    passed_on: dict[str, Any] = {}
    priority = queue = None
    headers: Mapping[str, Any] = target.headers
    if task is not None:
        priority, queue = task.priority, task.queue
    if options is not None:
        passed_on = options.passed_on
        priority = priority if options.priority is None else options.priority
        queue = options.queue or queue
        if priority is None and options.is_scheduled:
            priority = SCHEDULED
        if "headers" in passed_on:
            headers = {**(passed_on["headers"] or {}), **headers}
            passed_on = {name: value for name, value in passed_on.items() if name != "headers"}
        if options.keep is not None:
            headers = {**headers, KEEP_RESULT: round(options.keep)}
    transaction = None
    if not is_plain:
        transaction, passed_on = _transaction_for((*args, *kwargs.values()), passed_on)
    event = collector.enqueue_event(
        target.parameters.written(args, kwargs, transaction),
        queue or task_queues.queue_of(_settings(collector)),
        headers=headers,
        priority=LATER if priority is None else priority,
        exchange="",
        **passed_on,
    )
    engine = row = None
    if passed_on or sinks.bound is not None or sinks.framework is not None:
        engine, row = _followed(event, passed_on)
    keep = None if options is None else options.keep
    if keep is None:
        keep = KEPT if task is None else task.keep_result
    return TaskHandle(event.id, event, collector._innermost(), engine, target, keep, row)


def _settings(collector: EventCollector) -> Settings:
    publisher = collector._unit.publisher
    if publisher is None and configuration.provider is None:
        publisher = configuration.configured_publisher()
    publisher = publisher or configuration.publisher_if_any()
    return configuration.settings_to_store() if publisher is None else publisher.settings


def _transaction_for(
    values: Sequence[Any], passed_on: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Return the transaction that stores the task, as far as that decides what is written.

    With ``outbox.sql.bind()``, that is the session of the first instance among the arguments,
    whichever session is current: the task must not be visible before the instance is. With Django
    it is the alias of the database that takes the event, if a transaction of it is open here.
    """
    given = passed_on.get("session")
    if given is not None or passed_on.get("connection") is not None:
        return getattr(given, "sync_session", given), passed_on
    using = passed_on.get("using", BOUND)
    if sinks.bound is not None and using is BOUND and "session" not in passed_on:
        for value in values:
            session = mapped.session_of(value)
            if session is not None:
                return session, {**passed_on, "session": session}
        return None, passed_on
    if sinks.framework is not None and using is not None and "session" not in passed_on:
        return sinks.framework.open_transaction(using), passed_on
    return None, passed_on


def _followed(event: Event, passed_on: Mapping[str, Any]) -> tuple[Any, sinks.OpenRow | None]:
    """Return the engine of the transaction that the task was stored in, and its row; or None.

    With Django the engine is a function that returns it: it takes a while to find, and is seldom
    needed.
    """
    session, connection = passed_on.get("session", BOUND), passed_on.get("connection")
    if connection is not None:
        from outbox.sql.transaction import followed_on

        return connection.engine, followed_on(connection)
    using = passed_on.get("using", BOUND)
    if session is None or using is None:
        return None, None
    if session is BOUND and sinks.bound is None and sinks.framework is None:
        return None, None
    if sinks.framework is not None and session is BOUND and (using is not BOUND or not sinks.bound):
        engine = functools.partial(sinks.framework.engine_of, using) if passed_on else None
        return engine, sinks.framework.followed(event, using)
    from outbox.sql.transaction import followed

    return followed(event, None if session is BOUND else session)
