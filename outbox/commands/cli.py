"""The command ``outbox``: its parser, and the exit codes of errors."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import sys
from collections.abc import Sequence

from outbox import exit_codes
from outbox.commands.application import Application
from outbox.commands.options import Version
from outbox.commands.printing import printable
from outbox.errors import BrokerError, OutboxError, UsageError

__all__ = ["code_of", "main", "run"]

_EPILOG = """\
'outbox COMMAND --help' shows more, with examples.

exit codes: 0 done, 1 done in part, 2 wrong usage, 7 the broker or the database cannot be reached,
130 interrupted by Ctrl-C
"""

_MODULES = {
    "relay": "relay_command",
    "workers": "workers_command",
    "status": "stored_command",
    "retry": "stored_command",
    "purge": "stored_command",
    "sql": "sql_command",
    "parked": "parked_command",
    "spool": "spool_command",
    "migrate-transport": "migrating.migrate_command",
    "tasks": "tasks.tasks_command",
    "tail": "tail_command",
    "doctor": "doctor_command",
    "init": "init_command",
}
"""The modules of the commands, in the order of the help. Only that of the command is imported:
importing all of them takes longer than what most commands do."""


def main(arguments: Sequence[str] | None = None, *, application: Application | None = None) -> int:
    """Run the command and return its exit code, one of ``outbox.exit_codes``.

    Args:
        arguments: the command line; the default is that of the process.
        application: whose broker and database are meant where the command line names none.
    """
    application = application or Application()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # escape what the encoding can't represent
            stream.reconfigure(errors="backslashreplace")
    try:
        code = run(arguments, application)
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader, such as head, has closed the pipe. Python's flush at exit would fail as well.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return exit_codes.SUCCESS
    except OutboxError as error:
        print(f"outbox: {printable(str(error))}", file=sys.stderr)
        return code_of(error)
    except KeyboardInterrupt:
        print("outbox: interrupted", file=sys.stderr)
        return exit_codes.INTERRUPTED
    return code


def run(arguments: Sequence[str] | None, application: Application) -> int:
    """Run the command as ``main`` does, and return its exit code.

    Raises:
        OutboxError: what the user is to be shown; ``code_of`` has the exit code.
        SystemExit: the command line is wrong, or asks for help.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = _parser(application, arguments)
    options = parser.parse_args(arguments)
    options.application = application
    if options.run is None:
        parser.print_help(sys.stderr)
        return exit_codes.USAGE
    logging.basicConfig(
        level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    code: int = options.run(options)
    return code


def code_of(error: OutboxError) -> int:
    """Return the exit code for an error that ends the command."""
    # To a long-running process, a database without a table is like one that can't be reached: it
    # waits for both. A command doesn't wait.
    if isinstance(error, BrokerError) and not isinstance(error.__cause__, UsageError):
        return exit_codes.UNAVAILABLE
    return exit_codes.USAGE


def _parser(application: Application, arguments: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=application.prog,
        description="Publish stored events, manage parked and spooled ones, watch what passes by, "
        "and examine or begin set-ups.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=Version, nargs=0, help="show the version and exit")
    parser.set_defaults(run=None)
    common = argparse.ArgumentParser(add_help=False)
    common.set_defaults(application=application)
    common.add_argument(
        "--log-level",
        default="CRITICAL",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
        help="the lowest level to log to standard error (default: CRITICAL; the command reports "
        "its errors in any case)",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for module in _modules_for(arguments):
        importlib.import_module(f"outbox.commands.{module}").add_parser(commands, common)
    return parser


def _modules_for(arguments: Sequence[str]) -> list[str]:
    for argument in arguments:
        if not argument.startswith("-"):  # the options before the command have no values
            if argument in _MODULES:
                return [_MODULES[argument]]
            break
    return list(dict.fromkeys(_MODULES.values()))


if __name__ == "__main__":
    sys.exit(main())
