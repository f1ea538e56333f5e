"""What ``outbox tasks`` does about recurring tasks: lists them, and forgets those of the past."""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from typing import Any

from outbox import exit_codes
from outbox.commands.options import positive
from outbox.commands.printing import json_line, printable
from outbox.recurring.recurring_task import TickRecord
from outbox.settings import Settings
from outbox.tasks.decorator import Task
from outbox.transports.registry import open_tick_records

__all__ = ["add_list_options", "forget", "list_recurring", "queue_option"]


def queue_option(parser: argparse.ArgumentParser) -> None:
    """Add the option for the queue of the tasks."""
    parser.add_argument(
        "--queue",
        metavar="QUEUE",
        help="the queue of the tasks (default: OUTBOX_TASKS_QUEUE, or tasks)",
    )


def add_list_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of :func:`list_recurring`, except for the queue and ``--json``."""
    parser.add_argument(
        "modules",
        nargs="*",
        metavar="MODULE",
        help="modules with recurring tasks, whose next times are shown; with --unknown, with the "
        "tasks that are known",
    )
    parser.add_argument(
        "--next",
        type=positive,
        default=1,
        metavar="N",
        help="show the next N times of the tasks of the modules (default: 1)",
    )


def list_recurring(options: argparse.Namespace) -> int:
    """Print the recurring tasks of a queue: those in the broker, and those of the modules.

    Returns:
        An exit code.

    Raises:
        UsageError: a module can't be imported, or the broker has no recurring tasks.
        BrokerError: the broker can't be reached.
    """
    settings = _settings(options)
    queue = options.queue or settings.tasks_queue
    tasks = {task.name: task for task in _tasks(options.modules, queue, settings)}
    with open_tick_records(settings) as records:
        found = {record.name: record for record in records.all(queue)}
    for name in sorted(found.keys() | tasks.keys()):
        shown = _shown(queue, name, found.get(name), tasks.get(name), options.next)
        print(json_line(shown) if options.json else _text(shown))
    if not found and not tasks and not options.json:
        print(f"outbox: no recurring task of the queue {queue!r} has run", file=sys.stderr)
    return exit_codes.SUCCESS


def forget(options: argparse.Namespace) -> int:
    """Delete what the broker has of a recurring task.

    Returns:
        An exit code.

    Raises:
        UsageError: the broker has no recurring tasks.
        BrokerError: the broker can't be reached.
    """
    settings = _settings(options)
    queue = options.queue or settings.tasks_queue
    with open_tick_records(settings) as records:
        if records.forget(queue, options.name):
            print(f"forgot the recurring task {printable(options.name)}")
            return exit_codes.SUCCESS
    print(
        f"outbox: the queue {queue!r} has no recurring task {options.name!r}; "
        "outbox tasks list --recurring shows them",
        file=sys.stderr,
    )
    return exit_codes.UNFINISHED


def _settings(options: argparse.Namespace) -> Settings:
    application = options.application
    return Settings.load(options.url or application.url, application.settings)


def _tasks(names: Sequence[str], queue: str, settings: Settings) -> list[Task[Any, Any]]:
    """Return the recurring tasks of modules that go to a queue."""
    if not names:
        return []
    # Not above: it takes a while, for each command.
    from outbox.consumers.discovery import load
    from outbox.consumers.tasks.task_table import tasks_of

    load(names, warn=False)
    modules = [sys.modules[name.partition(":")[0]] for name in names]
    return [
        task
        for module in modules
        for task in tasks_of(module)
        if task.schedule is not None and (task.queue or settings.tasks_queue) == queue
    ]


def _shown(
    queue: str, name: str, record: TickRecord | None, task: Task[Any, Any] | None, count: int
) -> dict[str, Any]:
    schedule = None if record is None else record.schedule
    planned = None if record is None else record.next_at
    runs = [] if planned is None else [planned]
    if task is not None and task.schedule is not None:
        schedule, runs = task.schedule.text, task.next_runs(count=count)
    last_at = None if record is None else record.last_at
    return {
        "task": name,
        "queue": queue,
        "schedule": schedule,
        "next": [run.isoformat() for run in runs],
        "last": None if last_at is None else last_at.isoformat(),
        "has_worker": False if record is None else record.has_worker,
    }


def _text(shown: dict[str, Any]) -> str:
    parts = [printable(shown["task"]), printable(shown["schedule"] or "held by a worker")]
    parts += [f"next {', '.join(map(_short, shown['next']))}"] if shown["next"] else []
    parts += [f"last {_short(shown['last'])}"] if shown["last"] else []
    parts += [] if shown["has_worker"] else ["no worker has it"]
    return "  ".join(parts)


def _short(text: str) -> str:
    return datetime.datetime.fromisoformat(text).isoformat(" ", "seconds")
