"""``outbox sql``: creates the table of stored events, prints its DDL, and checks it."""

from __future__ import annotations

import argparse
from typing import Any

from outbox import exit_codes
from outbox.commands.database_access import open_store
from outbox.commands.options import database_option

__all__ = ["add_parser"]


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``sql`` to the sub-commands of ``outbox``; see ``parked_command.add_parser``."""
    sql = commands.add_parser(
        "sql",
        help="create or check the table of stored events",
        description="Create or check the table of stored events.",
    )
    actions = sql.add_subparsers(title="actions", metavar="ACTION", required=True)
    database = database_option(common.get_default("application"))

    create = actions.add_parser(
        "create",
        parents=[common, database],
        help="create the table if it doesn't exist",
        description="Create the table and its indexes if they don't exist, also those that a later "
        "version has added. For migrations use "
        "outbox.sql.metadata, or the output of `outbox sql ddl`.",
    )
    create.set_defaults(run=_create)

    upgrade = actions.add_parser(
        "upgrade",
        parents=[common, database],
        help="add what the tables of an earlier version lack",
        description="Add the tables and indexes that a later version has added, while the tables "
        "are in use: PostgreSQL builds the indexes without keeping writers waiting. Processes of "
        "the earlier version can go on.",
    )
    upgrade.set_defaults(run=_upgrade)

    show = actions.add_parser(
        "ddl",
        parents=[common],
        help="print the statements that create the table",
        description="Print the statements that create the table and its indexes.",
    )
    show.add_argument(
        "--dialect", required=True, metavar="NAME", help="postgresql, mariadb or sqlite"
    )
    show.set_defaults(run=_ddl)

    rights = actions.add_parser(
        "grants",
        parents=[common],
        help="print the statements that give roles their rights",
        description="Print the statements that give the rights they need to the role of those that "
        "only store events, and to that of relays and workers.",
    )
    rights.add_argument(
        "--dialect", default="postgresql", metavar="NAME", help="postgresql (default) or mariadb"
    )
    rights.add_argument("--role", metavar="NAME", help="the role of those that only store events")
    rights.add_argument(
        "--workers", metavar="NAME", help="the role of relays, workers and the fast path"
    )
    rights.add_argument(
        "--schema", default="", metavar="NAME", help="the tables' schema; MariaDB: their database"
    )
    rights.set_defaults(run=_grants)

    check = actions.add_parser(
        "check",
        parents=[common, database],
        help="report what the table lacks",
        description="Report what the table lacks; exit with 2 if anything is missing.",
    )
    check.set_defaults(run=_check)


def _create(options: argparse.Namespace) -> int:
    with open_store(options, check=False) as store:
        created = store.create()
        store.check(complete=True)
    print(f"the table outbox_events {'was created' if created else 'already exists'}")
    return exit_codes.SUCCESS


def _upgrade(options: argparse.Namespace) -> int:
    import outbox.sql.inbox  # noqa: F401  which adds its table
    from outbox.storage.creating import upgrade

    with open_store(options, check=False) as store:
        added = upgrade(store.engine)
    print(f"added {', '.join(added)}" if added else "nothing was missing")
    return exit_codes.SUCCESS


def _ddl(options: argparse.Namespace) -> int:
    import outbox.sql.inbox  # noqa: F401  which adds its table
    from outbox.storage.creating import ddl

    print(ddl(options.dialect), end="")
    return exit_codes.SUCCESS


def _grants(options: argparse.Namespace) -> int:
    import outbox.sql.inbox  # noqa: F401  which adds its table
    from outbox.storage.grants import grants

    for statement in grants(options.dialect, options.role, options.workers, options.schema):
        print(f"{statement};")
    return exit_codes.SUCCESS


def _check(options: argparse.Namespace) -> int:
    with open_store(options, check=False) as store:
        store.check(complete=True)
        print("the table outbox_events is complete")
    return exit_codes.SUCCESS
