"""``outbox tasks``: tasks that have begun, their results, those that wait, and recurring ones."""

from __future__ import annotations

import argparse
from typing import Any

from outbox.commands.options import broker_option, database_option
from outbox.commands.tasks import kept_tasks, recurring_tasks, scheduled_tasks
from outbox.errors import UsageError

__all__ = ["add_parser"]

_EXAMPLES = """\
examples:
  outbox tasks list --status failed --task shop.mail:send_receipt
      show the last calls of this task that have failed, with their exceptions
  outbox tasks show 0199f3a2-...
      show all that is kept of a task: arguments, result, traceback, times
  outbox tasks retry 0199f3a2-...
      call it once more, with the same id and arguments
  outbox tasks cancel 0199f3a2-...
      cancel a task that waits for a worker or for its next attempt
  outbox tasks list --scheduled
      show the tasks that wait in the database, the next due first
  outbox tasks list --scheduled --unknown shop.mail
      show those whose names this module doesn't know, before it is deployed
  outbox tasks list --recurring
      show the recurring tasks that the broker OUTBOX_URL knows
  outbox tasks list --recurring shop.mail --next 3
      also show the next three times of those in the module shop.mail
  outbox tasks forget shop.mail:nightly
      delete what the broker has of a recurring task that no program has any more

Without --scheduled and --recurring, tasks are shown once a worker has begun with them, or they were
cancelled, if their results are kept (OUTBOX_RESULTS).

exit codes: 0 done, 1 done in part, no such task, or --unknown found tasks, 2 wrong usage, or no
results are kept, 7 the broker or the database cannot be reached
"""


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``tasks`` to the sub-commands of ``outbox``; see ``parked_command.add_parser``."""
    tasks = commands.add_parser(
        "tasks",
        help="show, retry, cancel and forget tasks, recurring ones included",
        description="Show tasks that have begun, and recurring ones; call tasks once more, cancel "
        "and forget them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = tasks.add_subparsers(title="actions", metavar="ACTION", required=True)
    parents = (common, broker_option(), kept_tasks.results_option())

    listing = actions.add_parser(
        "list",
        parents=[*parents, database_option(common.get_default("application"))],
        help="show tasks, without changing anything",
        description="Show tasks that have begun, the latest first. With --scheduled, the tasks "
        "that wait in a database, the next due first: the broker, or else the one with the stored "
        "events. With --recurring, the recurring tasks: those that the broker knows, also of "
        "programs that no longer have them, and those of modules.",
    )
    which = listing.add_mutually_exclusive_group()
    which.add_argument("--scheduled", action="store_true", help="show the tasks that wait")
    which.add_argument("--recurring", action="store_true", help="show the recurring tasks")
    listing.add_argument("--json", action="store_true", help="print one JSON object per line")
    recurring_tasks.queue_option(listing)
    kept_tasks.add_list_options(listing)
    scheduled_tasks.add_list_options(listing)
    recurring_tasks.add_list_options(listing)
    listing.set_defaults(run=_list)

    kept_tasks.add_actions(actions, *parents)

    forgetting = actions.add_parser(
        "forget",
        parents=parents,
        help="delete what is kept of tasks, or what the broker has of a recurring one",
        description="Delete what is kept of tasks, by their ids; or what the broker has of a "
        "recurring task that no program has any more: a worker that does have it begins anew.",
    )
    forgetting.add_argument(
        "name", nargs="?", metavar="NAME", help="the name of the recurring task"
    )
    forgetting.add_argument(
        "--id",
        action="append",
        default=[],
        dest="ids",
        metavar="ID",
        help="the id of a task whose result is to be deleted; repeatable",
    )
    recurring_tasks.queue_option(forgetting)
    forgetting.set_defaults(run=_forget)


def _list(options: argparse.Namespace) -> int:
    if options.scheduled:
        if options.status:
            raise UsageError("--status selects tasks that have begun, so not with --scheduled")
        return scheduled_tasks.list_scheduled(options)
    if options.unknown:
        raise UsageError("add --scheduled to show the tasks that wait and aren't known")
    if options.recurring:
        return recurring_tasks.list_recurring(options)
    if options.modules:
        raise UsageError(f"add --recurring to show the recurring tasks of {options.modules[0]!r}")
    return kept_tasks.list_kept(options)


def _forget(options: argparse.Namespace) -> int:
    if bool(options.name) == bool(options.ids):
        raise UsageError("name a recurring task, or tasks with --id")
    return recurring_tasks.forget(options) if options.name else kept_tasks.forget_kept(options)
