"""``outbox tasks``: lists recurring tasks, and forgets those of the past."""

from __future__ import annotations

import argparse
from typing import Any

from outbox.commands.options import broker_option
from outbox.commands.tasks.recurring_tasks import (
    add_list_options,
    forget,
    list_recurring,
    queue_option,
)

__all__ = ["add_parser"]

_EXAMPLES = """\
examples:
  outbox tasks list --recurring
      show the recurring tasks that the broker OUTBOX_URL knows
  outbox tasks list --recurring shop.mail --next 3
      also show the next three times of those in the module shop.mail
  outbox tasks forget shop.mail:nightly
      delete what the broker has of a recurring task that no program has any more

exit codes: 0 done, 1 there is no such task, 2 wrong usage, 7 the broker cannot be reached
"""


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``tasks`` to the sub-commands of ``outbox``; see ``parked_command.add_parser``."""
    tasks = commands.add_parser(
        "tasks",
        help="list recurring tasks, and forget those of the past",
        description="List recurring tasks, and forget those of the past.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = tasks.add_subparsers(title="actions", metavar="ACTION", required=True)
    broker = broker_option()

    listing = actions.add_parser(
        "list",
        parents=[common, broker],
        help="show tasks, without changing anything",
        description="Show the recurring tasks: those that the broker knows, also of programs that "
        "no longer have them, and those of modules.",
    )
    listing.add_argument(
        "--recurring", action="store_true", required=True, help="show the recurring tasks"
    )
    listing.add_argument("--json", action="store_true", help="print one JSON object per line")
    queue_option(listing)
    add_list_options(listing)
    listing.set_defaults(run=list_recurring)

    forgetting = actions.add_parser(
        "forget",
        parents=[common, broker],
        help="delete what the broker has of a recurring task",
        description="Delete what the broker has of a recurring task that no program has any more. "
        "A worker that does have it begins anew.",
    )
    forgetting.add_argument("name", metavar="NAME", help="the name of the task")
    queue_option(forgetting)
    forgetting.set_defaults(run=forget)
