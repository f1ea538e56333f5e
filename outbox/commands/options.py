"""Options that several sub-commands have."""

from __future__ import annotations

import argparse

__all__ = ["DATABASE_VARIABLE", "broker_option", "database_option", "positive"]

DATABASE_VARIABLE = "OUTBOX_DATABASE_URL"


def broker_option() -> argparse.ArgumentParser:
    """Return a parser of the option ``--url``, for sub-commands to inherit."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--url",
        help="the broker, amqp://user:password@host:5672/vhost or sqlite:///outbox.db (default: "
        "OUTBOX_URL, which does not show a password in the list of processes)",
    )
    return parser


def database_option() -> argparse.ArgumentParser:
    """Return a parser of the option ``--database``, for sub-commands to inherit."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument(
        "--database",
        metavar="URL",
        help="where the events are stored, postgresql://user:password@host/database or "
        f"sqlite:///file.db (default: {DATABASE_VARIABLE}, which does not show a password in the "
        "list of processes)",
    )
    return parser


def positive(text: str) -> int:
    """Return the number from 1 on that ``text`` is, for ``type=`` of an argument."""
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


positive.__name__ = "number from 1 on"  # what argparse calls it in its errors
