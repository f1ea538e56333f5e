"""``outbox status``, ``retry`` and ``purge``: show and manage stored events."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from outbox import exit_codes
from outbox.commands.database_access import open_store
from outbox.commands.options import database_option, positive
from outbox.commands.printing import json_line, printable
from outbox.errors import UsageError

__all__ = ["add_parser"]

_COUNTED = 10_000  # events of one priority in one queue; of more, the status says only that

_EXAMPLES = """\
examples:
  outbox retry --reason NOT_FOUND --dry-run
      show which dead events with this text in their reason would be published again
  outbox retry --all
      make all of them due again
  outbox purge --id 0199f3a2-... --yes
      delete one dead event

Only dead events are selected: those that could not be published. A relay publishes the events that
are due again, with the same ids.

exit codes: 0 done, 1 cancelled at the prompt, 2 wrong usage or no such table, 7 the database cannot
be reached, 130 interrupted by Ctrl-C
"""


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add these sub-commands to ``outbox``; see ``parked_command.add_parser``."""
    database = database_option(common.get_default("application"))
    status = commands.add_parser(
        "status",
        parents=[common, database],
        help="show the backlog of stored events",
        description="Show how many stored events are waiting, since when, and how many are dead, "
        "by reason. Of large numbers only the beginning is counted: 10,000+.",
    )
    status.add_argument("--json", action="store_true", help="print one JSON object")
    status.add_argument(
        "--exact", action="store_true", help="count all events, which reads the whole table"
    )
    status.set_defaults(run=_status)

    filters = argparse.ArgumentParser(add_help=False)
    filters.add_argument(
        "--id", action="append", default=[], metavar="ID", help="select this event; repeatable"
    )
    filters.add_argument("--reason", metavar="TEXT", help="select by text in the reason")
    filters.add_argument("--target", metavar="TARGET", help="select by target")
    filters.add_argument("--all", action="store_true", help="select all dead events")
    filters.add_argument("--limit", type=positive, metavar="N", help="at most N events")
    filters.add_argument("--dry-run", action="store_true", help="show what would be done")

    retry = commands.add_parser(
        "retry",
        parents=[common, database, filters],
        help="make dead stored events due again",
        description="Make dead stored events due again.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    retry.set_defaults(run=_retry)

    purge = commands.add_parser(
        "purge",
        parents=[common, database, filters],
        help="delete dead stored events",
        description="Delete dead stored events permanently.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    purge.add_argument("--yes", action="store_true", help="don't ask for confirmation")
    purge.set_defaults(run=_purge)


def _status(options: argparse.Namespace) -> int:
    with open_store(options) as store:
        status = store.status(at_most=None if options.exact else _COUNTED)
    if options.json:
        print(
            json_line(
                {
                    "waiting": status.waiting,
                    "scheduled": status.scheduled,
                    "leased": status.leased,
                    "oldest": status.oldest,
                    "dead": sum(status.dead.values()),
                    "dead_by_reason": status.dead,
                    "queues": status.queues,
                    "kept": status.kept,
                    "complete": status.is_complete,
                }
            )
        )
        return exit_codes.SUCCESS
    alive = status.alive
    age = "" if alive.oldest is None else f", the oldest for {_duration(alive.oldest)}"
    print(f"{_events(alive.waiting, alive.waiting_is_complete)} waiting{age}")
    print(f"{_events(alive.scheduled, alive.later_is_complete)} scheduled for later")
    print(f"{_events(alive.leased, alive.later_is_complete)} in flight")
    print(f"{_events(sum(status.dead.values()), status.dead_is_complete)} dead")
    for reason, count in status.dead.items():
        print(f"    {count}: {printable(reason)}")
    for queue, of_queue in status.by_queue.items():
        if queue:
            print(f"queue {printable(queue)}: {_events(of_queue.total, of_queue.is_complete)}")
    if status.kept:
        print(f"{_events(status.kept, status.kept_is_complete)} kept since they were published")
    return exit_codes.SUCCESS


def _retry(options: argparse.Namespace) -> int:
    _check_selection(options)
    with open_store(options) as store:
        chosen = _chosen(options, store)
        if options.dry_run:
            return _print_plan("would be due again", chosen)
        return _done("due again", store.retry([seq for seq, *_ in chosen]))


def _purge(options: argparse.Namespace) -> int:
    _check_selection(options)
    with open_store(options) as store:
        chosen = _chosen(options, store)
        if options.dry_run:
            return _print_plan("would be deleted", chosen)
        if chosen and not options.yes and not _confirmed(len(chosen)):
            print("nothing was deleted", file=sys.stderr)
            return exit_codes.UNFINISHED
        return _done("deleted", store.purge([seq for seq, *_ in chosen]))


def _check_selection(options: argparse.Namespace) -> None:
    if not (options.all or options.id or options.reason is not None or options.target is not None):
        raise UsageError("select events with --id, --reason, --target, or --all")


def _chosen(options: argparse.Namespace, store: Any) -> list[tuple[int, str, str, str]]:
    chosen: list[tuple[int, str, str, str]] = store.dead(
        ids=options.id, reason=options.reason, target=options.target, limit=options.limit
    )
    return chosen


def _print_plan(what: str, chosen: list[tuple[int, str, str, str]]) -> int:
    for _, id, target, reason in chosen:
        print(f"{printable(id)}  {printable(target)}  {printable(reason)}")
    return _done(what, len(chosen))


def _done(what: str, count: int) -> int:
    print(f"{_events(count)} {what}")
    return exit_codes.SUCCESS


def _confirmed(count: int) -> bool:
    if not sys.stdin.isatty():
        raise UsageError("purge deletes events permanently; confirm with --yes, or try --dry-run")
    try:
        answer = input(f"Delete {_events(count)} permanently? [y/N] ")
    except EOFError:  # Ctrl-D
        return False
    return answer.strip().lower() in ("y", "yes")


def _events(count: int, is_complete: bool = True) -> str:
    more = "" if is_complete else "+"
    return f"{count:,}{more} event{'' if count == 1 else 's'}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:,.0f} min" if seconds < 7200 else f"{seconds / 3600:,.1f} h"
