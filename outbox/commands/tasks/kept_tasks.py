"""What ``outbox tasks`` does about tasks that have begun: shows them, calls and cancels them."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from outbox import auto_publishing, configure, enqueue_event, exit_codes
from outbox.commands.database_access import translate_errors
from outbox.commands.options import positive
from outbox.commands.printing import json_line, printable
from outbox.errors import BrokerError, InvalidEvent, NoResults
from outbox.messages import task_queues
from outbox.messages.headers import TASK
from outbox.results.open_results import results_store_of
from outbox.results.result_row import CANCELLED, FAILED, STATUSES, ResultRow
from outbox.settings import SettingOverrides, Settings
from outbox.tasks.call_arguments import DoesNotFit, parts_of
from outbox.tasks.task_handle import TaskHandle

if TYPE_CHECKING:
    from outbox.results.results_store import ResultsStore

__all__ = [
    "add_actions",
    "add_list_options",
    "forget_kept",
    "list_kept",
    "results_option",
]

_LISTED = 50
_OTHERWISE = (
    "if it is among the dead letters, replay it with outbox parked replay, else have your program "
    "call it again"
)


def results_option() -> argparse.ArgumentParser:
    """Return a parent parser with the option ``--results``."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--results",
        metavar="URL",
        help="the database with the results of tasks (default: OUTBOX_RESULTS, or that of the "
        "broker if it is a database)",
    )
    return parser


def add_list_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of :func:`list_kept`, except for the queue and ``--json``."""
    parser.add_argument(
        "--status",
        action="append",
        default=[],
        choices=STATUSES,
        help="select tasks with this status; repeatable",
    )
    parser.add_argument("--task", metavar="NAME", help="select the calls of this task")
    parser.add_argument(
        "--limit",
        type=positive,
        default=_LISTED,
        metavar="N",
        help=f"at most N tasks, the latest first, or the next due (default: {_LISTED})",
    )


def add_actions(actions: Any, *parents: argparse.ArgumentParser) -> None:
    """Add ``show``, ``retry`` and ``cancel``."""
    show = actions.add_parser(
        "show",
        parents=parents,
        help="show all that is kept of tasks",
        description="Show all that is kept of tasks: arguments, result, exception and times.",
    )
    _add_ids(show)
    show.add_argument("--json", action="store_true", help="print one JSON object per line")
    show.set_defaults(run=_show)

    retry = actions.add_parser(
        "retry",
        parents=parents,
        help="call tasks once more that have failed or were cancelled",
        description="Call tasks once more that have failed or were cancelled, with the same ids "
        "and arguments. What is in the dead letters stays there. A cancelled task whose message "
        "still waits is not called, but runs when a worker receives that.",
    )
    _add_ids(retry)
    retry.set_defaults(run=_retry)

    cancel = actions.add_parser(
        "cancel",
        parents=parents,
        help="cancel tasks that don't run",
        description="Cancel tasks that wait for a worker, or for their next attempt.",
    )
    _add_ids(cancel)
    cancel.set_defaults(run=_cancel)


def _add_ids(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("ids", nargs="+", metavar="ID", help="the ids of the tasks")


def list_kept(options: argparse.Namespace) -> int:
    """Print the tasks that have begun or were cancelled, the latest first.

    Returns:
        An exit code.

    Raises:
        UsageError: no results are kept.
        DatabaseUnavailable: the database failed.
    """
    with _store(options) as store:
        rows = store.find(
            statuses=options.status, task=options.task, queue=options.queue, limit=options.limit
        )
    for row in rows:
        print(json_line(_shown(row)) if options.json else _line(row))
    if len(rows) == options.limit and not options.json:
        print(f"the latest {options.limit}; --limit shows more", file=sys.stderr)
    return exit_codes.SUCCESS


def forget_kept(options: argparse.Namespace) -> int:
    """Delete what is kept of tasks that don't run.

    Returns:
        An exit code.

    Raises:
        UsageError: no results are kept.
        DatabaseUnavailable: the database failed.
    """
    with _store(options) as store:
        kept = [id_ for id_ in options.ids if not store.forget([id_])]
    left = [f"{id_}: it runs, or nothing is kept of it" for id_ in kept]
    count = len(options.ids) - len(left)
    print(f"forgot {count} task{'' if count == 1 else 's'}")
    return _left(left)


def _show(options: argparse.Namespace) -> int:
    with _store(options) as store:
        rows = [store.read([id_]).get(id_) for id_ in options.ids]
    for row in rows:
        if row is not None:
            print(json_line(_shown(row)) if options.json else _text(row))
    return _missing([id_ for id_, row in zip(options.ids, rows, strict=True) if row is None])


def _retry(options: argparse.Namespace) -> int:
    left: list[str] = []
    with _store(options) as store:
        _configure(options)
        for id_ in options.ids:
            reason = _called_again(store, id_)
            if reason:
                left.append(f"{id_}: {reason}")
    return _left(left)


def _called_again(store: ResultsStore, id_: str) -> str:
    """Have a task run once more; return why it can't, or empty text."""
    row = store.read([id_]).get(id_)
    if row is None:
        return "nothing is kept of it"
    if row.status not in (FAILED, CANCELLED):
        return f"it is {row.status}"
    name = f"{printable(row.task or '(unknown)')}, {printable(id_)}"
    if row.status == CANCELLED and not row.is_dropped:
        # Another call would run beside the message that waits.
        if not store.revive(id_, is_dropped=False):
            return _called_again(store, id_)  # a worker has dropped it at this moment
        print(f"no longer cancelled: {name}; it runs when a worker receives its message")
        return ""
    reason = _refusal(row)
    if reason:
        return reason
    if row.status == CANCELLED and not store.revive(id_, is_dropped=True):
        return _called_again(store, id_)  # another command was faster
    try:
        _call(row)
    except BaseException as error:
        if row.status == CANCELLED:
            call = {"task": row.task, "queue": row.queue, "args": row.args}
            store.cancel(id_, row.task, 0.0, call)
        if isinstance(error, InvalidEvent):
            return f"{error}; {_OTHERWISE}"
        raise
    print(f"called {printable(row.task)} once more, {printable(id_)}")
    return ""


def _refusal(row: ResultRow) -> str:
    """Return why a task can't be called by what is kept of it; empty if it can."""
    if not row.task or not row.queue or row.args is None:
        return f"its call isn't kept; {_OTHERWISE}"
    try:
        parts_of(_parsed(row.args))
    except DoesNotFit:  # also if it isn't JSON
        return f"its arguments can't be read; {_OTHERWISE}"
    return ""


def _call(row: ResultRow) -> None:
    """Publish the call that a row has kept.

    Raises:
        InvalidEvent: it can't be carried.
        BrokerError: the broker has not confirmed it.
    """
    task_queues.note(row.queue, None)
    with auto_publishing() as block:
        enqueue_event(
            _parsed(row.args),
            row.queue,
            exchange="",
            headers={TASK: row.task},
            priority=5,
            id=row.id,
        )
    report = block.report
    if report is not None and not report.ok:  # this process ends before it could be tried again
        raise report.error or BrokerError(f"the broker has not confirmed the call of {row.id!r}")


def _cancel(options: argparse.Namespace) -> int:
    left = []
    with _store(options):
        _configure(options)
        for id_ in options.ids:
            handle: TaskHandle[Any] = TaskHandle(id_)
            if handle.cancel():
                print(f"cancelled {printable(id_)}")
            else:
                left.append(f"{id_}: it is {handle.status}")
    return _left(left)


def _settings(options: argparse.Namespace) -> Settings:
    return Settings.load(options.url or options.application.url, _overrides(options))


def _overrides(options: argparse.Namespace) -> SettingOverrides:
    overrides: SettingOverrides = options.application.settings.copy()
    if options.results:
        overrides["results"] = options.results
    return overrides


def _configure(options: argparse.Namespace) -> None:
    """Make the publisher of what is called, and of handles.

    Raises:
        NotConfigured: no broker is named.
    """
    configure(options.url or options.application.url, **_overrides(options))


@contextlib.contextmanager
def _store(options: argparse.Namespace) -> Iterator[ResultsStore]:
    """Yield the store of results.

    Raises:
        NoResults: there is none.
        DatabaseUnavailable: the database failed.
    """
    store = results_store_of(_settings(options))
    if store is None:
        raise NoResults(
            "no database of results is named; pass --results URL, or set OUTBOX_RESULTS"
        )
    with translate_errors():
        store.prepare()
        yield store


def _shown(row: ResultRow) -> dict[str, Any]:
    shown = asdict(row)
    for name in ("args", "value"):
        shown[name] = _parsed(shown[name])
    for name, value in shown.items():
        if isinstance(value, datetime.datetime):
            shown[name] = value.astimezone(datetime.UTC).isoformat()
    return shown


def _parsed(text: str | None) -> Any:
    """Return what ``text`` says as JSON; the text itself if it isn't JSON that can be printed.

    It may come from any program: in another format, with NaN, numbers of thousands of digits, or
    nested so deeply that Python gives up.
    """
    if text is None:
        return None
    try:
        value = json.loads(text)
        # What is printed later is nested a little more.
        json.dumps({"": [value]}, allow_nan=False)
    except (ValueError, RecursionError):
        return text
    return value


def _line(row: ResultRow) -> str:
    parts = [row.id, row.status, row.task or "(unknown)"]
    when = row.ended_at or row.attempted_at
    parts += [_moment(when)] if when is not None else []
    parts += [f"attempt {row.attempt}"] if row.attempt > 1 else []
    parts += [": ".join(filter(None, (row.error_type, row.error)))]
    return printable("  ".join(filter(None, parts)))


def _text(row: ResultRow) -> str:
    lines = []
    for name, value in _shown(row).items():
        if name in ("is_typed", "is_final", "is_dropped", "traceback") or value in (None, ""):
            continue
        text = value if isinstance(value, str) else json.dumps(value)
        lines.append(f"{name}: {printable(text)}")
    lines += [f"    {printable(line)}" for line in row.traceback.splitlines()]
    return "\n".join(lines)


def _moment(moment: datetime.datetime) -> str:
    return moment.astimezone(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _missing(ids: list[str]) -> int:
    return _left([f"{id_}: nothing is kept of it" for id_ in ids])


def _left(reasons: list[str]) -> int:
    for reason in reasons:
        print(f"outbox: {printable(reason)}", file=sys.stderr)
    return exit_codes.UNFINISHED if reasons else exit_codes.SUCCESS
