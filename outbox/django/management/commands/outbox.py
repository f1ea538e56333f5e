"""``manage.py outbox``: the commands ``outbox`` and ``outbox-consume`` for a Django project."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from outbox import NotConfigured, OutboxError, exit_codes
from outbox.commands import cli
from outbox.commands.printing import printable
from outbox.django import commanding

__all__ = ["Command"]

_COMMANDS = """\
commands:
  consume   run the consumers of the project's apps, with a relay beside them
  relay     publish stored events
  status    show the backlog of stored events
  retry     make dead stored events due again
  purge     delete dead stored events
  parked    list, replay or delete parked events and dead letters
  sql       check the tables, or print their DDL
  doctor    find out what is wrong with the project's set-up
  init      write a first consumer, its test, and a unit file
  tail      show the events that pass through the broker

'manage.py outbox COMMAND --help' shows more. The broker is OUTBOX["URL"] of the settings, or else
OUTBOX_URL; the database is the alias OUTBOX["STORE"], unless --database names another one.

exit codes: 0 done, 1 done in part, 2 wrong usage, 7 the broker or the database cannot be reached
"""


class Command(BaseCommand):
    """Runs a sub-command, with the options that it has outside of Django, too."""

    help = "Consume events, publish stored ones, and manage what is left of either."

    def create_parser(self, prog_name: str, subcommand: str, **options: Any) -> CommandParser:
        """Return the parser, which leaves the sub-command's options to the sub-command."""
        parser = super().create_parser(prog_name, subcommand, **options)
        parser.formatter_class = argparse.RawDescriptionHelpFormatter
        parser.epilog = _COMMANDS
        return parser

    def add_arguments(self, parser: CommandParser) -> None:
        """Take all that follows the name of the sub-command."""
        parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="COMMAND ...")

    def handle(self, *, arguments: list[str], **options: Any) -> None:
        """Run the sub-command.

        Raises:
            CommandError: it failed; in one line, with the exit code of the command line.
            SystemExit: it ended with another exit code than 0.
        """
        if not arguments:
            self.print_help("manage.py", "outbox")
            raise SystemExit(exit_codes.USAGE)
        with contextlib.ExitStack() as stack:
            for name, redirect in (
                ("stdout", contextlib.redirect_stdout),
                ("stderr", contextlib.redirect_stderr),
            ):
                if options.get(name) is not None:
                    stack.enter_context(redirect(options[name]))
            code = _run(arguments)
        if code:
            raise SystemExit(code)


def _run(arguments: list[str]) -> int:
    try:
        name, *rest = commanding.without_djangos(arguments)
        if name == "consume":
            from outbox.consumers.command import consume

            return consume.main(
                rest, prog="manage.py outbox consume", framework=commanding.framework()
            )
        code = cli.run([name, *rest], commanding.application())
        sys.stdout.flush()
        return code
    except NotConfigured:
        raise CommandError(commanding.NO_URL, returncode=exit_codes.USAGE) from None
    except OutboxError as error:
        raise CommandError(printable(str(error)), returncode=cli.code_of(error)) from error
    except KeyboardInterrupt:
        raise CommandError("interrupted", returncode=exit_codes.INTERRUPTED) from None
