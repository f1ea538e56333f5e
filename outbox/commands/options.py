"""Options that several commands share."""

from __future__ import annotations

import argparse
import datetime

from outbox.commands.application import Application
from outbox.system.version import installed_version

__all__ = [
    "DATABASE_VARIABLE",
    "Version",
    "age",
    "broker_option",
    "database_option",
    "not_negative",
    "positive",
]

DATABASE_VARIABLE = "OUTBOX_DATABASE_URL"


class Version(argparse.Action):
    """The option ``--version``: prints the version and exits.

    argparse's action needs the version when the parser is created, and looking it up is slow.
    """

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        """Print the version, and exit."""
        print(parser.prog, installed_version())
        parser.exit()


def broker_option(default: str = "OUTBOX_URL") -> argparse.ArgumentParser:
    """Return a parent parser with the option ``--url``, whose default is at ``default``."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--url",
        help="the broker, amqp://user:password@host:5672/vhost, or a database, postgresql://, "
        f"mariadb:// or sqlite:///outbox.db (default: {default}, which keeps the password out of "
        "the process list)",
    )
    return parser


def database_option(application: Application) -> argparse.ArgumentParser:
    """Return a parent parser with the option ``--database``: a URL, or an application's alias."""
    parser = argparse.ArgumentParser(add_help=False)
    if application.engine_of is not None:
        parser.add_argument(
            "--database",
            metavar="ALIAS",
            help="the alias of the database with the stored events (default: the one that the "
            "application stores them in)",
        )
        return parser
    parser.add_argument(
        "--database",
        metavar="URL",
        help="the database with the stored events, postgresql://user:password@host/database or "
        f"sqlite:///file.db (default: {DATABASE_VARIABLE}, which keeps the password out of the "
        "process list)",
    )
    return parser


def positive(text: str) -> int:
    """Parse a positive integer; for ``type=`` of an argument."""
    if not (text.isdecimal() and int(text)):
        raise argparse.ArgumentTypeError(f"invalid positive integer: {text!r}")
    return int(text)


def not_negative(text: str) -> int:
    """Parse an integer that is 0 or more; for ``type=`` of an argument."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"invalid integer from 0 on: {text!r}")
    return int(text)


_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def age(text: str) -> datetime.timedelta:
    """Parse a time such as ``90s``, ``30m``, ``12h``, ``7d`` or ``2w``; for ``type=``."""
    number, unit = text[:-1], text[-1:]
    try:
        if number.isdecimal() and number.isascii() and unit in _UNITS:
            span = datetime.timedelta(**{_UNITS[unit]: int(number)})
            if span <= datetime.timedelta(days=36525):
                return span
    except OverflowError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a time; use for example 30m, 12h or 7d")
