"""Checks of the consumers, loaded as a worker loads them."""

from __future__ import annotations

import dis
import inspect
import itertools
import time
from collections.abc import Iterator
from types import CodeType, FunctionType, ModuleType
from typing import Any

from outbox import sinks
from outbox.consumers.definition import Consumer, check_process
from outbox.consumers.tasks.task_queue import TaskQueue
from outbox.doctor.check import Check
from outbox.doctor.examined import Examined, database_variable_is_set
from outbox.doctor.finding import NotApplicable, NotChecked, Problem
from outbox.errors import OutboxError, UsageError

__all__ = ["CHECKS", "function_of", "starts_programs"]

_BLOCKING = (
    *("requests", "urllib.request", "psycopg2", "pymysql", "MySQLdb", "sqlite3", "pika", "boto3"),
    *("subprocess", "smtplib"),
)
"""Modules whose calls block the event loop."""
_ELSEWHERE = {"to_thread", "run_in_executor"}
_PROGRAMS = ("subprocess", "multiprocessing")
_CONSUMER_TIMEOUT = 1800.0
"""Seconds after which RabbitMQ by default closes the channel of a message that isn't acked."""
_HAS_TIMEOUT = (3, 8)


def _modules(examined: Examined) -> Iterator[Problem]:
    try:
        loaded = examined.load()
    except OutboxError as error:
        # The reason of an import error stands in the last line of its traceback.
        lines = [line for line in str(error).splitlines() if line.strip()]
        text = lines[0] if len(lines) < 2 else f"{lines[0]} {lines[-1].strip()}"
        yield Problem("error", text, "Correct the module: run `python -c 'import MODULE'`.")
        return
    except NotChecked:
        raise
    except Exception as error:
        yield Problem("error", f"a module can't be imported: {type(error).__name__}: {error}")
        return
    for line in loaded.warnings:
        yield Problem("warning", line)
    queues: dict[str, Consumer] = {}
    for consumer in loaded.consumers:
        name = name_of(consumer)
        try:
            check_process(consumer)
        except UsageError as error:
            yield Problem("error", str(error), "Correct the consumer.")
        if consumer.queue in queues:
            yield Problem(
                "error",
                f"{name} and {name_of(queues[consumer.queue])} have the same queue "
                f"{consumer.queue!r}",
                "Give each consumer its own queue.",
            )
        queues.setdefault(consumer.queue, consumer)
        if isinstance(consumer, TaskQueue):
            yield from _tasks_without_timeout(consumer)
        elif consumer.time_limit is None:
            yield Problem(
                "warning",
                f"{name} has no timeout: a handler that hangs keeps its thread for ever",
                "Set timeout = SECONDS in the consumer.",
            )
        yield from _blocking_calls(consumer, name)
    yield from _deduplication(examined)


def _tasks_without_timeout(queue: TaskQueue) -> Iterator[Problem]:
    for name, task in queue.decorated().items():
        if task.time_limit is None:
            yield Problem(
                "warning",
                f"the task {name} has no timeout: if it hangs it keeps its thread for ever",
                "Set @task(timeout=SECONDS).",
            )


def _deduplication(examined: Examined) -> Iterator[Problem]:
    deduplicating = [consumer for consumer in examined.consumers if consumer.deduplicate]
    has_database = sinks.inbox is not None or database_variable_is_set()
    if deduplicating and not has_database and examined.is_rabbitmq:
        yield Problem(
            "error",
            f"{name_of(deduplicating[0])} deduplicates, which needs a database",
            "Set OUTBOX_DATABASE_URL.",
        )


def _blocking_calls(consumer: Consumer, name: str) -> Iterator[Problem]:
    function = function_of(consumer)
    if not consumer.is_async or function is None:
        return
    elsewhere = {second for _, second in _attributes(function)} & _ELSEWHERE
    for module in () if elsewhere else _modules_used(function):
        if module in _BLOCKING:
            yield Problem(
                "warning",
                f"{name} is asynchronous, and uses {module}, which blocks the event loop",
                "Use an asyncio library, or await asyncio.to_thread(...); or make process() a "
                "plain function.",
            )
    namespace = function.__globals__
    if any(
        getattr(namespace.get(first), second, None) is time.sleep
        for first, second in _attributes(function)
    ):
        yield Problem(
            "warning",
            f"{name} is asynchronous, and calls time.sleep(), which blocks the event loop",
            "Await asyncio.sleep().",
        )


def _timeouts(examined: Examined) -> Iterator[Problem]:
    probe = examined.probe
    if probe.version and probe.version < _HAS_TIMEOUT:
        raise NotApplicable
    unknown = None
    try:
        management = examined.management
    except NotChecked as error:
        unknown = error
    for consumer in examined.consumers:
        limit, where = _CONSUMER_TIMEOUT, "RabbitMQ's default"
        if unknown is None:
            limit, where = _limit_by_policy(management, consumer.queue) or (limit, where)
        if consumer.time_limit is not None and consumer.time_limit >= limit:
            yield Problem(
                "warning",
                f"{name_of(consumer)} may take {consumer.time_limit:.0f} s, but {where} closes "
                f"its channel after {limit:.0f} s without an ack, and the message runs again",
            )
        elif consumer.time_limit is None and limit != _CONSUMER_TIMEOUT:
            yield Problem(
                "warning",
                f"{name_of(consumer)} has no timeout, but {where} closes its channel after "
                f"{limit:.0f} s without an ack, and the message runs again",
                "Set a shorter timeout in the consumer.",
            )
    if unknown is not None:
        raise NotChecked(f"only against the default of 30 minutes: {unknown}")


def _limit_by_policy(management: Any, queue: str) -> tuple[float, str] | None:
    from outbox.doctor.management_checks import policy_of

    found = management.queue(queue)
    policy = policy_of(queue, found, management.policies())
    milliseconds = policy.get("consumer-timeout")
    if not isinstance(milliseconds, int) or milliseconds <= 0:
        return None
    return milliseconds / 1000, "a policy"


def name_of(consumer: Consumer) -> str:
    """Return the name by which its author knows a consumer."""
    function = function_of(consumer)
    if type(consumer).__module__.startswith("outbox.") and function is not None:
        return f"the consumer {function.__qualname__}()"
    return f"the consumer {type(consumer).__qualname__}"


def function_of(consumer: Consumer) -> FunctionType | None:
    """Return the function that handles a message, without decorators; None if it isn't one."""
    handler: Any = getattr(consumer, "__wrapped__", None) or type(consumer).process
    function = inspect.unwrap(handler) if callable(handler) else handler
    return function if isinstance(function, FunctionType) else None


def starts_programs(consumer: Consumer) -> bool:
    """Return whether the handler itself uses a module that starts processes."""
    function = function_of(consumer)
    return function is not None and bool(set(_modules_used(function)) & set(_PROGRAMS))


def _modules_used(function: FunctionType) -> list[str]:
    """Return the modules that a function names in its code: as they are, and without the rest."""
    used: dict[str, None] = {}
    for instruction in _instructions(function.__code__):
        if instruction.opname == "IMPORT_NAME":
            used[str(instruction.argval)] = None
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            value = function.__globals__.get(instruction.argval)
            is_module = isinstance(value, ModuleType)
            name = getattr(value, "__name__" if is_module else "__module__", None)
            used[str(name)] = None
    for first, second in _attributes(function):
        inner = getattr(function.__globals__.get(first), second, None)
        if isinstance(inner, ModuleType):
            used[inner.__name__] = None
    return list(used | dict.fromkeys(name.partition(".")[0] for name in used))


def _instructions(code: CodeType) -> list[dis.Instruction]:
    inner = [each for each in code.co_consts if isinstance(each, CodeType)]
    return [*dis.get_instructions(code), *(line for each in inner for line in _instructions(each))]


def _attributes(function: FunctionType) -> list[tuple[str, str]]:
    """Return the attributes of globals in the code, such as ``time`` and ``sleep``."""
    lines = _instructions(function.__code__)
    return [
        (str(first.argval), str(second.argval))
        for first, second in itertools.pairwise(lines)
        if first.opname in ("LOAD_GLOBAL", "LOAD_NAME")
        and second.opname in ("LOAD_ATTR", "LOAD_METHOD")
    ]


CHECKS = (
    Check(
        "OBX113",
        "the handlers' timeouts beside RabbitMQ's",
        "Raise consumer_timeout in rabbitmq.conf or by a policy, or split the work.",
        _timeouts,
    ),
    Check(
        "OBX301",
        "the modules and their consumers",
        "Correct the module, as outbox-consume would ask for.",
        _modules,
    ),
)
