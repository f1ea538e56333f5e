"""``@task``: functions that can be called later."""

from __future__ import annotations

import datetime
import functools
import sys
from collections.abc import Callable, Coroutine, Sequence
from types import ModuleType
from typing import Any, Generic, Literal, ParamSpec, Protocol, TypeVar, get_args, overload

from outbox.errors import InvalidEvent, UsageError
from outbox.header_values import check_name
from outbox.messages import task_queues
from outbox.recurring.schedules import schedule_of
from outbox.tasks.call_arguments import parameters_of
from outbox.tasks.call_options import (
    KEPT,
    CallOptions,
    TaskOptions,
    checked_keep,
    checked_priority,
    sent,
)
from outbox.tasks.target import Target, check_function, name_of_function, note_task
from outbox.tasks.task_handle import TaskHandle

__all__ = ["KEPT", "Overlap", "Retries", "Task", "TaskCall", "later", "options", "schedule", "task"]

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

Overlap = Literal["publish", "skip"]

_LONGEST_QUEUE = 250
_MOST_RUNS = 10_000


class Retries(Protocol):
    """A policy for failed attempts: an ``outbox.consumers.RetryPolicy``."""

    @property
    def max_attempts(self) -> int: ...  # noqa: D102

    def delay_after(self, error: BaseException, attempts: int) -> float | None: ...  # noqa: D102


class Task(Generic[P, R]):
    """A function that can be called later; made by :func:`task`. Calling it calls the function.

    Attributes:
        function: the function.
        name: the name under which workers know it.
        aliases: other names that they know it by.
        queue: the queue that it names, or None: then it goes to that of ``tasks_queue``.
        retry, timeout, deduplicate, consumer: see :func:`task`.
        max_priority: the highest priority that has an effect in its queue, or None for the setting.
        schedule: its times, if it is a recurring task; else None.
        catch_up, overlap: see :func:`task`.
        keep_result: the seconds for which results are kept; 0 if they aren't.
        hide_errors: whether results have only the class of an exception.
        target: what a call of it calls.
        also_in: further queues that its workers consume from, since calls may name them.
    """

    also_in: Sequence[str] = ()

    __wrapped__: Callable[P, R]

    def __init__(
        self,
        function: Callable[P, R],
        *,
        name: str | None,
        aliases: Sequence[str],
        queue: str | None,
        max_priority: int | None,
        retry: Retries | None,
        timeout: float | datetime.timedelta | None,
        deduplicate: bool | datetime.timedelta,
        priority: int | None,
        consumer: type[Any] | None,
        every: float | datetime.timedelta | None,
        cron: str | None,
        timezone: str | None,
        catch_up: bool,
        overlap: Overlap,
        keep_result: bool | datetime.timedelta,
        hide_errors: bool,
    ) -> None:
        """Make a task of ``function``; see :func:`task`."""
        check_function(function)
        functools.update_wrapper(self, function)
        self.function = function
        own_name = name_of_function(function)  # type: ignore[arg-type]  # it was checked
        if "." in own_name.partition(":")[2]:
            raise UsageError(
                f"@task: {own_name} is in a class; use later() for methods, which needs no "
                "decorator, or move the function to the module"
            )
        self.name = own_name if name is None else _checked_name(name, own_name)
        if isinstance(aliases, str):
            raise UsageError(f"@task: aliases of {own_name} are {aliases!r}, not a list of names")
        self.aliases = tuple(_checked_name(alias, own_name) for alias in aliases)
        self.queue = None if queue is None else checked_queue(queue, own_name)
        self.max_priority = _checked_highest(max_priority, queue, own_name)
        self.priority = checked_priority(priority, f"@task of {own_name}")
        if retry is not None and not callable(getattr(retry, "delay_after", None)):
            raise UsageError(f"@task: retry of {own_name} is {retry!r:.60}, not a RetryPolicy")
        if consumer is not None and not hasattr(consumer, "callbacks"):
            raise UsageError(
                f"@task: consumer of {own_name} is {consumer!r:.60}, not a class derived from "
                "outbox.consumers.Consumer"
            )
        self.retry = retry
        self.timeout = timeout
        self.deduplicate = deduplicate
        self.consumer = consumer
        self.keep_result = checked_keep(keep_result, f"@task of {own_name}")
        self.hide_errors = hide_errors
        self.target = Target(
            self.name, parameters_of(function, self.name), is_kept=self.keep_result > 0
        )
        self.schedule = schedule_of(every, cron, timezone, f"@task of {own_name}")
        self.catch_up = catch_up
        self.overlap = overlap
        self._check_schedule(own_name)
        _register(self, own_name)
        if queue is not None:
            task_queues.note(queue, self.max_priority)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function here and now."""
        return self.function(*args, **kwargs)

    def __repr__(self) -> str:
        return f"<task {self.name}>"

    @overload
    def later(
        self: Task[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> TaskHandle[T]: ...

    @overload
    def later(self, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[R]: ...

    def later(self, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[Any]:
        """Call the function later, in a worker, once this unit of work has succeeded.

        The arguments are written now: changing them afterwards has no effect.

        Returns:
            The handle of the call, with its id.

        Raises:
            InvalidEvent: the arguments don't fit, or one can't be carried without a change.
            UsageError: an annotation can't be resolved.
            OutboxError: what :meth:`outbox.EventCollector.enqueue_event` raises.
        """
        return sent(self.target, self, args, kwargs, None)

    def next_runs(
        self, after: datetime.datetime | None = None, count: int = 1
    ) -> list[datetime.datetime]:
        """Return the next times of a recurring task, in its time zone; nothing for any other task.

        Args:
            after: an aware datetime, after which they are; by default now.
            count: how many, 1 to 10,000.

        Raises:
            UsageError: an argument is invalid.
        """
        if type(count) is not int or not 1 <= count <= _MOST_RUNS:
            raise UsageError(f"count is {count!r:.60}, not an int from 1 to {_MOST_RUNS}")
        if after is None:
            after = datetime.datetime.now(datetime.UTC)
        elif not isinstance(after, datetime.datetime) or after.utcoffset() is None:
            raise UsageError(f"after is {after!r:.60}, not a datetime with a time zone")
        runs: list[datetime.datetime] = []
        while self.schedule is not None and len(runs) < count:
            after = self.schedule.next_after(after)
            runs.append(after.astimezone(self.schedule.zone))
        return runs

    def _check_schedule(self, own_name: str) -> None:
        if not isinstance(self.catch_up, bool):
            raise UsageError(f"@task of {own_name}: catch_up is {self.catch_up!r:.60}, not a bool")
        if self.overlap not in get_args(Overlap):
            raise UsageError(
                f"@task of {own_name}: overlap is {self.overlap!r:.60}, not 'publish' or 'skip'"
            )
        if self.schedule is None:
            if self.catch_up or self.overlap != "publish":
                raise UsageError(
                    f"@task of {own_name}: catch_up and overlap are of recurring tasks; give every "
                    "or cron, too"
                )
        elif required := self.target.parameters.required:
            raise UsageError(
                f"@task of {own_name}: a recurring task is called without arguments, so each "
                f"parameter needs a default, and {', '.join(map(repr, required))} has none"
            )

    def options(self, **options: Any) -> TaskCall[P, R]:
        """Return what calls this task with other options; see :func:`outbox.tasks.options`.

        Raises:
            InvalidEvent: an option is invalid; the message names it.
        """
        return TaskCall(self, CallOptions.checked(options))


class TaskCall(Generic[P, R]):
    """A task with the options of a call."""

    __slots__ = ("_options", "_task")

    def __init__(self, called: Task[P, R], options: CallOptions) -> None:
        """Call ``called`` with ``options``; see ``Task.options``."""
        self._task = called
        self._options = options

    @overload
    def later(
        self: TaskCall[P, Coroutine[Any, Any, T]], *args: P.args, **kwargs: P.kwargs
    ) -> TaskHandle[T]: ...

    @overload
    def later(self, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[R]: ...

    def later(self, *args: P.args, **kwargs: P.kwargs) -> TaskHandle[Any]:
        """Call the function later; see :meth:`Task.later`."""
        return sent(self._task.target, self._task, args, kwargs, self._options)


_tasks: dict[str, tuple[Task[Any, Any], str]] = {}


def _register(new: Task[Any, Any], own_name: str) -> None:
    """Note the names of a task.

    Raises:
        UsageError: another one has one of them.
    """
    for name in (new.name, *new.aliases):
        known = _tasks.get(name)
        if known is not None and known[1] != own_name:
            raise UsageError(
                f"two tasks have the name {name!r}: {known[1]} and {own_name}; give one another "
                "name, @task(name=...)"
            )
    for name in (new.name, *new.aliases):
        _tasks[name] = new, own_name
        note_task(name, new.target.parameters)


def module_of_task(name: str) -> ModuleType | None:
    """Return the module that has the task or function ``name``, if this process has imported it."""
    known = _tasks.get(name)
    module = name.partition(":")[0] if known is None else known[0].function.__module__
    return sys.modules.get(module)


def _checked_name(name: Any, of: str) -> str:
    try:
        check_name("name of a task", name)
    except InvalidEvent as error:
        raise UsageError(f"@task of {of}: {error}") from None
    if not name or not name.isprintable() or " " in name:
        raise UsageError(f"@task of {of}: {name!r:.60} isn't a name without spaces")
    return str(name)


def checked_queue(queue: Any, of: str) -> str:
    """Return the name of a queue.

    Raises:
        UsageError: it isn't one; the message begins with ``of``.
    """
    if (
        not isinstance(queue, str)
        or not queue
        or "\0" in queue
        or len(queue.encode(errors="replace")) > _LONGEST_QUEUE
    ):
        raise UsageError(f"{of}: queue is {queue!r:.60}, not a name of 1 to 250 bytes in UTF-8")
    return queue


def _checked_highest(highest: int | None, queue: str | None, of: str) -> int | None:
    if highest is None:
        return None
    if type(highest) is not int or not 1 <= highest <= 255:
        raise UsageError(f"@task of {of}: max_priority is {highest!r}, not an int from 1 to 255")
    if queue is None:
        raise UsageError(
            f"@task of {of}: max_priority is of a queue, so name one with queue=; for the queue of "
            "all others there is the setting tasks_max_priority"
        )
    before = task_queues.noted(queue)
    if before not in (None, highest):
        raise UsageError(
            f"@task of {of}: max_priority of the queue {queue!r} is {highest}, and {before} "
            "elsewhere"
        )
    return highest


@overload
def task(function: Callable[P, R], /) -> Task[P, R]: ...


@overload
def task(
    *,
    name: str | None = ...,
    aliases: Sequence[str] = ...,
    queue: str | None = ...,
    max_priority: int | None = ...,
    retry: Retries | None = ...,
    timeout: float | datetime.timedelta | None = ...,
    deduplicate: bool | datetime.timedelta = ...,
    priority: int | None = ...,
    consumer: type[Any] | None = ...,
    every: float | datetime.timedelta | None = ...,
    cron: str | None = ...,
    timezone: str | None = ...,
    catch_up: bool = ...,
    overlap: Overlap = ...,
    keep_result: bool | datetime.timedelta = ...,
    hide_errors: bool = ...,
) -> Callable[[Callable[P, R]], Task[P, R]]: ...


def task(
    function: Callable[..., Any] | None = None,
    /,
    *,
    name: str | None = None,
    aliases: Sequence[str] = (),
    queue: str | None = None,
    max_priority: int | None = None,
    retry: Retries | None = None,
    timeout: float | datetime.timedelta | None = None,
    deduplicate: bool | datetime.timedelta = False,
    priority: int | None = None,
    consumer: type[Any] | None = None,
    every: float | datetime.timedelta | None = None,
    cron: str | None = None,
    timezone: str | None = None,
    catch_up: bool = False,
    overlap: Overlap = "publish",
    keep_result: bool | datetime.timedelta = True,
    hide_errors: bool = False,
) -> Any:
    """Make a task of a function or coroutine function of a module.

    Args:
        function: the function, without parentheses: ``@task``.
        name: the name under which workers know it; by default ``module:function``. A name that is
            given survives that the function moves.
        aliases: names of the past, under which calls may still be on their way.
        queue: the queue; by default that of the setting ``tasks_queue``.
        max_priority: the highest priority that has an effect in that queue, as for a consumer.
        retry: the policy for failed attempts, a ``RetryPolicy``; None to never retry.
        timeout: the time limit of an attempt, in seconds or as a timedelta; as for a consumer.
        deduplicate: True, or a timedelta, to run each call only once; as for a consumer.
        priority: the priority of calls, 0 to 9; by default 5, and 3 for ``schedule()``.
        consumer: a class derived from ``Consumer``, without ``queue`` and ``process``, whose
            filters, callbacks and attributes apply to the task.
        every: run it at each multiple of this interval since the Unix epoch: at least 1 second, as
            seconds or a timedelta. The workers that have the task agree on one call for each time.
        cron: run it at the times of a cron expression of five fields, or of ``@hourly``,
            ``@daily``, ``@weekly``, ``@monthly`` or ``@yearly``. Needs the extra ``[tasks]``.
        timezone: the time zone of ``cron``, such as ``Europe/Berlin``; by default UTC.
        catch_up: whether one call is made up for all times at which no worker ran.
        overlap: ``skip`` to leave out a time while the call of the last one has not ended, which
            needs a database as the broker; ``publish`` to call it at each time.
        keep_result: how long the result is kept, if there is a database for results; True for seven
            days, False not at all, and nothing else of the task.
        hide_errors: True to keep only the class of an exception with the result, neither its text
            nor its traceback, which may hold data.

    Raises:
        UsageError: the function can't be a task, or an argument is invalid; the message says why.
        MissingExtra: ``cron`` needs cronsim, which is not installed.
    """

    def decorate(decorated: Callable[..., Any]) -> Task[Any, Any]:
        return Task(
            decorated,
            name=name,
            aliases=aliases,
            queue=queue,
            max_priority=max_priority,
            retry=retry,
            timeout=timeout,
            deduplicate=deduplicate,
            priority=priority,
            consumer=consumer,
            every=every,
            cron=cron,
            timezone=timezone,
            catch_up=catch_up,
            overlap=overlap,
            keep_result=keep_result,
            hide_errors=hide_errors,
        )

    return decorate if function is None else decorate(function)


def options(**values: Any) -> TaskOptions:
    """Return the options of a call: ``options(delay=60).later(order.remind)``.

    Args:
        **values: ``at``, an aware datetime or a timedelta from now; ``delay``, seconds or a
            timedelta; ``priority``, 0 to 9; ``queue``; ``keep_result`` as for :func:`task`;
            ``key``, ``id``, ``headers``, ``session``, ``connection`` and ``using`` as in
            :meth:`outbox.EventCollector.enqueue_event`.

    Raises:
        InvalidEvent: an option is invalid; the message names it.
    """
    return TaskOptions(CallOptions.checked(values))


def later(call: Callable[..., R], /, *args: Any, **kwargs: Any) -> TaskHandle[R]:
    """Call ``call`` later, in a worker, once this unit of work has succeeded.

    Args:
        call: a task; a function, class method or static method of a module that the workers load;
            or a method of a mapped instance, of which its class and primary key travel.
        *args: the arguments, all of them for ``call``; see :meth:`Task.later`.
        **kwargs: likewise.

    Raises:
        UsageError: no worker could call it; the message says why.
        InvalidEvent: the arguments don't fit, or one can't be carried without a change.
        OutboxError: what :meth:`outbox.EventCollector.enqueue_event` raises.
    """
    return _NO_OPTIONS.later(call, *args, **kwargs)


def schedule(
    when: datetime.datetime | datetime.timedelta,
    call: Callable[..., R],
    /,
    *args: Any,
    **kwargs: Any,
) -> TaskHandle[R]:
    """Call ``call`` at a time, with a lower priority than :func:`later`; see there.

    Args:
        when: an aware datetime, or a timedelta from now.
        call: see :func:`later`.
        *args: the arguments.
        **kwargs: likewise.

    Raises:
        InvalidEvent: ``when`` is invalid.
        OutboxError: what :func:`later` raises.
    """
    scheduled = CallOptions.checked({"at": when})
    scheduled.is_scheduled = True
    return TaskOptions(scheduled).later(call, *args, **kwargs)


_NO_OPTIONS = TaskOptions(None)
