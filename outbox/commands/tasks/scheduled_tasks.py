"""What ``outbox tasks`` does about tasks that wait in a database: lists them, and those unknown."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import heapq
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from outbox import exit_codes
from outbox.commands.database_access import NoDatabase, open_store, translate_errors
from outbox.commands.printing import json_line, printable
from outbox.errors import UsageError
from outbox.messages.headers import TASK
from outbox.messages.rows import UNROUTED, headers_of
from outbox.settings import Settings
from outbox.url import BrokerURL

__all__ = ["add_list_options", "list_scheduled"]


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A task that waits; ``seq`` orders those that are due at the same time."""

    id: str
    task: str
    queue: str
    due: datetime.datetime
    seq: int


def add_list_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of :func:`list_scheduled` that no other listing has."""
    parser.add_argument(
        "--unknown",
        action="store_true",
        help="with --scheduled, show only tasks whose names no task of the modules has, as its "
        "name or an alias, and exit with 1 if there are any",
    )


def list_scheduled(options: argparse.Namespace) -> int:
    """Print the tasks that wait in the database, the next due first.

    Returns:
        An exit code.

    Raises:
        UsageError: no database is named, it has no table, or a module can't be imported.
        DatabaseUnavailable: the database failed.
    """
    modules = _modules(options)
    is_known = _names_of(modules) if options.unknown else None
    application = options.application
    settings = Settings.load(options.url or application.url, application.settings)
    broker = None if settings.url is None else BrokerURL.parse(settings.url)
    count = 0

    def selected(engine: Any) -> Iterator[_Waiting]:
        nonlocal count
        for waiting in _waiting(engine):
            if (
                options.task in (None, waiting.task)
                and options.queue in (None, waiting.queue)
                and not (is_known and is_known(waiting.task))
            ):
                count += 1
                yield waiting

    with _engine(options, broker) as engine:
        # It holds no more than it returns.
        first = heapq.nsmallest(options.limit, selected(engine), key=lambda it: (it.due, it.seq))
    for waiting in first:
        print(json_line(_shown(waiting)) if options.json else _line(waiting))
    if count > len(first) and not options.json:
        print(f"the next {len(first)} of {count}; --limit shows more", file=sys.stderr)
    if _is_rabbitmq(broker) and not options.json:
        print(
            "outbox: tasks that wait in RabbitMQ itself can't be looked at, and aren't counted",
            file=sys.stderr,
        )
    if is_known is None or not count:
        return exit_codes.SUCCESS
    have = "task that waits has" if count == 1 else "tasks that wait have"
    print(
        f"outbox: {count} {have} a name that {printable(', '.join(modules))} doesn't know; keep "
        "the old names of tasks in @task(aliases=...)",
        file=sys.stderr,
    )
    return exit_codes.UNFINISHED


def _modules(options: argparse.Namespace) -> Sequence[str]:
    """Return the names of the modules with the tasks that are known.

    Raises:
        UsageError: they are needed, and there are none; or they aren't needed.
    """
    modules: Sequence[str] = options.modules
    if not options.unknown:
        if modules:
            raise UsageError(f"add --unknown to show the tasks that {modules[0]!r} doesn't know")
        return ()
    if not modules and options.application.modules is not None:
        modules = options.application.modules()
    if not modules:
        raise UsageError(
            "--unknown needs modules with the tasks that are known, such as those of outbox-consume"
        )
    return modules


def _names_of(modules: Sequence[str]) -> Callable[[str], bool]:
    """Return a function that returns whether workers with these modules know a task's name."""
    # Not above: it takes a while, for each command.
    from outbox.consumers.discovery import load
    from outbox.consumers.tasks.task_queue import TaskQueue

    queues = [each for each in load(modules, warn=False) if isinstance(each, TaskQueue)]
    return lambda name: any(queue.knows(name) for queue in queues)


@contextlib.contextmanager
def _engine(options: argparse.Namespace, broker: BrokerURL | None) -> Iterator[Any]:
    """Yield the engine of the broker if that is a database, else that of the stored events.

    Raises:
        UsageError: there is neither.
        DatabaseUnavailable: the database failed.
    """
    if broker is None or not broker.is_database or options.database is not None:
        try:
            # Its check would wait for writers in SQLite.
            with open_store(options, check=False) as store:
                yield store.engine
        except NoDatabase:
            if not _is_rabbitmq(broker):
                raise
            raise UsageError(
                "messages in RabbitMQ's delay queues can't be looked at; keep a task's old name in "
                "@task(aliases=...) until they have run, or name the database of stored events: "
                "--database URL"
            ) from None
        return
    from outbox.transports.database.kinds import engine_at
    from outbox.transports.database.sqlite.location import Location

    if broker.scheme == "sqlite":
        Location.of(broker).check_exists()  # connecting would make it
    engine = engine_at(broker)
    try:
        with translate_errors():
            yield engine
    finally:
        engine.dispose()


def _is_rabbitmq(broker: BrokerURL | None) -> bool:
    return broker is not None and broker.scheme in ("amqp", "amqps")


def _waiting(engine: Any) -> Iterator[_Waiting]:
    from outbox.storage.task_statements import waiting_tasks

    for row in waiting_tasks(engine):
        try:
            task = headers_of(row.headers).get(TASK)
        except ValueError:  # another program wrote it
            continue
        if isinstance(task, str):
            # Before it is in its queue, a row says only whom it is for.
            queue = row.type if row.queue in ("", UNROUTED) else row.queue
            yield _Waiting(row.id, task, queue, row.available_at, row.seq)


def _shown(waiting: _Waiting) -> dict[str, Any]:
    due = waiting.due.astimezone(datetime.UTC).isoformat()
    return {"id": waiting.id, "task": waiting.task, "queue": waiting.queue, "due": due}


def _line(waiting: _Waiting) -> str:
    due = waiting.due.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")
    return printable("  ".join((waiting.id, waiting.task, waiting.queue, f"due {due}")))
