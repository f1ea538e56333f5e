"""The consumers of queues of tasks: one for each queue, and behind it one for each task.

A message is processed by its task's consumer, with the task's retries, timeout, filters and
callbacks. Which that is, a header says, so that nothing needs to be decoded before.
"""

from __future__ import annotations

import functools
import inspect
import logging
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from outbox import UsageError
from outbox.configuration import configured_publisher, provided_publisher
from outbox.consumers.definition import Consumer
from outbox.consumers.outcome import NotYet, Reject
from outbox.consumers.tasks.task_instances import TaskSession, session_provider
from outbox.consumers.tasks.task_record import record_here
from outbox.consumers.tasks.task_table import Entry, TaskTable, tasks_of
from outbox.messages import task_queues
from outbox.messages.delivery import Delivery
from outbox.messages.headers import TASK
from outbox.messages.received_event import ReceivedEvent
from outbox.recurring.recurring_task import RecurringTask
from outbox.results.open_results import results_writer_of
from outbox.settings import Settings
from outbox.tasks.call_arguments import DoesNotFit, parts_of
from outbox.tasks.decorator import KEPT
from outbox.tasks.mapped import reading
from outbox.tasks.recurring_calls import recurring_task_of

if TYPE_CHECKING:
    from outbox.results.results_writer import ResultsWriter

__all__ = ["TaskQueue", "UnknownTask", "open_results", "queues_of_tasks", "task_queues_of"]

logger = logging.getLogger("outbox.consumer")

_LONGEST_NAME = 255


class UnknownTask(NotYet):
    """A failed attempt: no task of this worker has the name. Another worker may know it."""

    delays = (1.0, 5.0, 30.0, 60.0)


class TaskQueue(Consumer):
    """The consumer of one queue of tasks."""

    exchange = ""
    _is_paced = True

    def __init__(self, queue: str, table: TaskTable, settings: Settings) -> None:
        """Consume from ``queue`` what ``table`` knows.

        Raises:
            UsageError: a task's ``consumer`` or another of its attributes is invalid.
        """
        spec = task_queues.spec_of(queue, settings)
        entries = table.entries.values()
        # Instance attributes: each queue has others.
        self.queue = queue  # type: ignore[misc]
        if spec is not None:
            self.max_priority = spec.max_priority  # type: ignore[misc]
        self._table = table
        self._settings = settings
        self._consumers = {
            name: _consumer_of(entry, queue, self) for name, entry in table.entries.items()
        }
        self._unknown = _Unknown(queue, settings.unknown_task_after)
        self.deduplicate = any(  # type: ignore[misc]
            one.deduplicate for one in self._consumers.values()
        )
        kinds = {entry.is_async for entry in entries if entry.task is not None} or {False}
        if any(entry.task is None for entry in entries):
            kinds |= {entry.is_async for entry in entries}
        self.is_async = kinds == {True}  # type: ignore[misc]
        self._is_mixed = len(kinds) > 1  # type: ignore[misc]
        # Of the queue this only says whether results are kept at all.
        self._keeps = KEPT  # type: ignore[misc]

    def __repr__(self) -> str:
        return f"<tasks of {self.queue!r}>"

    def _for(self, delivery: Delivery) -> Consumer:
        name = (delivery.headers or {}).get(TASK)
        known = self._consumers.get(name) if type(name) is str else None
        return self._unknown if known is None else known

    def knows(self, name: str) -> bool:
        """Return whether a message may call ``name``: a task, under any of its names."""
        return name in self._consumers

    def process(self, event: ReceivedEvent) -> None:
        """Do nothing: each message is processed by its task's consumer."""
        raise AssertionError("a task is processed by its own consumer")

    def _recurring(self) -> list[RecurringTask]:
        """Return the recurring tasks of this queue."""
        tasks = [self._table.entries[name].task for name in self.decorated()]
        recurring = [recurring_task_of(task, self._settings) for task in tasks if task is not None]
        return [each for each in recurring if each is not None]

    def decorated(self) -> dict[str, Consumer]:
        """Return the consumers of the decorated tasks of this queue, by the tasks' names."""
        default = task_queues.queue_of(self._settings)
        return {
            name: self._consumers[name]
            for name, entry in self._table.entries.items()
            if entry.task is not None
            and entry.task.name == name
            and (entry.task.queue or default) == self.queue
        }

    def session(self) -> TaskSession:
        """Return the session of an attempt, not opened yet."""
        provider = session_provider(self._settings.task_session)
        return TaskSession(provider, self._table.classes)


class _Unknown(Consumer):
    """The consumer of messages that call nothing which is known here."""

    def __init__(self, queue: str, seconds: float) -> None:
        self.queue = queue  # type: ignore[misc]
        self._keeps = KEPT  # type: ignore[misc]  # those who wait see that it failed
        self._seconds = seconds
        self._warned: set[str] = set()

    def __repr__(self) -> str:
        return f"<unknown tasks of {self.queue!r}>"

    def process(self, event: ReceivedEvent) -> None:
        """Put the message back for a while, unless no worker could know it.

        Raises:
            Reject: it isn't a task.
            UnknownTask: another worker may know it.
        """
        name = event.task
        if not name:
            raise Reject(f"it names no task: the header {TASK} is missing, or isn't text")
        if len(name.encode(errors="replace")) > _LONGEST_NAME or not name.isprintable():
            raise Reject(f"it names no task: {name[:60]!r}...")
        _arguments(event)
        if name not in self._warned and len(self._warned) < 1000:
            self._warned.add(name)
            logger.warning(
                "no task of this worker is named %r; its messages are put back for %.0f s, for a "
                "worker that knows it",
                name,
                self._seconds,
            )
        error = UnknownTask(f"no task is named {name!r}, for {self._seconds:.0f} s now")
        error.lasts = self._seconds
        raise error


def _arguments(event: ReceivedEvent) -> tuple[list[Any], dict[str, Any], set[int | str]]:
    try:
        return parts_of(event.payload)
    except DoesNotFit as error:
        raise Reject(str(error)) from None


def _consumer_of(entry: Entry, queue: str, shared: TaskQueue) -> Consumer:
    """Return the consumer of a task.

    Raises:
        UsageError: an attribute of the task is invalid.
    """
    task = entry.task
    attributes: dict[str, Any] = {"queue": queue, "exchange": "", "topics": (), "_keeps": KEPT}
    base: type[Consumer] = Consumer
    if task is not None:
        base = task.consumer or Consumer
        if not (isinstance(base, type) and issubclass(base, Consumer)):
            raise UsageError(f"the consumer of the task {task.name} is no class of consumers")
        for name in ("retry", "timeout", "deduplicate"):
            if getattr(task, name):
                attributes[name] = getattr(task, name)
        attributes["_keeps"] = task.keep_result
        attributes["_hides_errors"] = task.hide_errors
    deduplicates = attributes.get("deduplicate", base.deduplicate)
    if not _sets_auto_publish(base):
        # With deduplicate the transaction of the task notes it, so its events must go before.
        attributes["auto_publish"] = not deduplicates
    attributes["process"] = _process_of(entry, shared)
    attributes["__repr__"] = lambda self: f"<task {entry.name}>"
    attributes["__qualname__"] = f"task {entry.name}"
    made: type[Consumer] = type("TaskConsumer", (base,), attributes)
    return made()


def _sets_auto_publish(kind: type[Consumer]) -> bool:
    return any("auto_publish" in vars(base) for base in kind.__mro__ if base is not Consumer)


def _process_of(entry: Entry, shared: TaskQueue) -> Callable[..., Any]:
    """Return ``process`` of a task's consumer."""
    call, parameters = entry.call, entry.parameters
    needs_session = entry.takes_instance or parameters.takes_session

    if entry.is_async:

        async def process_async(self: Consumer, event: ReceivedEvent) -> None:
            _, _, typed = _arguments(event)
            async with shared.session() as session:
                with reading(session):
                    read = functools.partial(_read, entry, event)
                    args, kwargs = await session.reading(read) if typed else read()
                if parameters.takes_session:
                    kwargs["session"] = session.opened()
                result = await call(*args, **kwargs)
                if (record := record_here()) is not None:
                    await session.in_sync(
                        lambda: record.returned(result, parameters, session.connections())
                    )

        return process_async

    def process(self: Consumer, event: ReceivedEvent) -> None:
        body = event.payload
        if not needs_session and type(body) is dict and "typed" not in body:
            try:
                args, kwargs = parameters.read(body)
            except DoesNotFit as error:
                raise Reject(str(error)) from None
            result = call(*args, **kwargs)
            _refuse_pending(result, entry)
            if (record := record_here()) is not None:
                record.returned(result, parameters)
            return
        with shared.session() as session:
            with reading(session):
                args, kwargs = _read(entry, event)
            if parameters.takes_session:
                kwargs["session"] = session.opened()
            result = call(*args, **kwargs)
            _refuse_pending(result, entry)
            if (record := record_here()) is not None:
                record.returned(result, parameters, session.connections())

    return process


def _read(entry: Entry, event: ReceivedEvent) -> tuple[list[Any], dict[str, Any]]:
    try:
        args, kwargs = entry.parameters.read(event.payload)
    except DoesNotFit as error:
        raise Reject(str(error)) from None
    if entry.takes_instance and not (args and isinstance(args[0], _owner(entry))):
        raise Reject(f"{entry.name} is a method, and its first argument isn't an instance")
    return args, kwargs


def _owner(entry: Entry) -> Any:
    return entry.parameters.owner or object


def _refuse_pending(result: object, entry: Entry) -> None:
    if result is not None and inspect.isawaitable(result):
        if inspect.iscoroutine(result):
            result.close()  # else Python warns that it was never awaited
        raise TypeError(
            f"{entry.name} returned {type(result).__qualname__!r}, which nothing awaits; make the "
            "function, or its decorator's wrapper, `async def`"
        )


def task_queues_of(modules: Iterable[types.ModuleType], *, has_undecorated: bool) -> list[Consumer]:
    """Return the consumers of the queues that the tasks of ``modules`` go to.

    Args:
        modules: the modules that the worker was given.
        has_undecorated: whether functions or classes without a task were given, too.

    Raises:
        UsageError: a task is invalid.
    """
    modules = list(modules)
    # No publisher is made: that of an SQLite file makes the file, and a look changes nothing.
    publisher = provided_publisher() or configured_publisher()
    settings = Settings.load(None, {}) if publisher is None else publisher.settings
    default = task_queues.queue_of(settings)
    tasks = [task for module in modules for task in tasks_of(module)]
    queues = {queue or default: None for task in tasks for queue in (task.queue, *task.also_in)}
    if has_undecorated:
        queues[default] = None
    if not queues:
        return []
    found = queues_of_tasks(modules, queues, settings)
    _check_sessions(found[0]._table, settings)
    return list(found)


def queues_of_tasks(
    modules: Iterable[types.ModuleType], queues: Iterable[str], settings: Settings
) -> list[TaskQueue]:
    """Return the consumers of ``queues``, which all know the same tasks.

    Raises:
        UsageError: a task is invalid.
    """
    table = TaskTable(modules)
    return [TaskQueue(queue, table, settings) for queue in queues]


def open_results(settings: Settings, consumers: Iterable[Consumer]) -> ResultsWriter | None:
    """Return what writes the results of the tasks among ``consumers``; None if none are kept.

    Raises:
        UsageError: results can't be kept in the database of the setting, or the table is missing.
        MissingExtra: SQLAlchemy or the database's driver is not installed.
    """
    if all(consumer._keeps is None for consumer in consumers):
        return None
    return results_writer_of(settings)


def _check_sessions(table: TaskTable, settings: Settings) -> None:
    """Check that the instances of SQLAlchemy's which decorated tasks take can be loaded.

    Raises:
        UsageError: nothing was configured for that.
    """
    if session_provider(settings.task_session) is not None:
        return
    for entry in table.entries.values():
        if entry.task is None:
            continue
        if entry.parameters.takes_session:
            raise UsageError(
                f"the task {entry.name} takes a session, and nothing opens one; "
                "configure(task_session=sessionmaker(...)), or give a scoped_session to "
                "outbox.sql.bind()"
            )
        for name, hint in entry.parameters.hints.items():
            if name != "return" and "__mapper__" in getattr(hint, "__dict__", ()):
                raise UsageError(
                    f"the task {entry.name} takes an instance of {hint.__qualname__}, and nothing "
                    "opens a session to load it in; configure(task_session=sessionmaker(...)), or "
                    "give a scoped_session to outbox.sql.bind()"
                )
