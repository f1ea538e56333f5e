"""The options that make a command a service with an id."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from outbox.errors import UsageError
from outbox.service.http_options import http_address
from outbox.service.identity.folder import default_folder
from outbox.service.identity.instance import Identity
from outbox.service.identity.pid_file import check_id

__all__ = [
    "add_identity_options",
    "folder_option",
    "identity_of",
    "seconds",
    "take_over_option",
    "valid_id",
]

START_TIMEOUT = 60.0


def add_identity_options(group: argparse._ArgumentGroup) -> None:
    """Add ``--id`` and the options that belong to it."""
    group.add_argument(
        "--id",
        type=valid_id,
        metavar="ID",
        help="run under this id, and take over from the process that has it: that one leaves once "
        "this one is ready (implies -p 1)",
    )
    folder_option(group)
    take_over_option(group)
    group.add_argument(
        "--start-timeout",
        type=seconds,
        default=START_TIMEOUT,
        metavar="SECONDS",
        help="how long it may take until all processes are ready to take over; then the command "
        "ends with 6, and the other goes on (default: 60)",
    )
    group.add_argument(
        "--handover-timeout",
        type=seconds,
        metavar="SECONDS",
        help="how long messages may go on running after another process has taken over, before "
        "--shutdown-timeout begins (default: as long as they take)",
    )


def folder_option(group: argparse._ActionsContainer) -> None:
    """Add ``--pid-dir``."""
    group.add_argument(
        "--pid-dir",
        type=Path,
        metavar="DIR",
        help="the folder of pid files, states and logs (default: OUTBOX_PID_DIR, else "
        "RUNTIME_DIRECTORY, else outbox-<uid> in the folder for temporary files)",
    )


def take_over_option(group: argparse._ActionsContainer) -> None:
    """Add ``--take-over``."""
    group.add_argument(
        "--take-over",
        action="store_true",
        help="take the id over also from another application, container or systemd unit",
    )


def identity_of(options: argparse.Namespace, applications: Sequence[str]) -> Identity | None:
    """Return the identity that the options ask for; None if there is no ``--id``.

    Args:
        options: the parsed command line.
        applications: what identifies the application; see ``Identity``.

    Raises:
        UsageError: an option needs ``--id``.
    """
    if options.id is None:
        if options.take_over:
            raise UsageError("--take-over needs --id")
        return None
    return Identity(
        options.id,
        options.pid_dir or default_folder(),
        tuple(applications),
        take_over=options.take_over,
        start_timeout=options.start_timeout,
        handover_timeout=options.handover_timeout,
        http=http_address(options) or None,
    )


def valid_id(text: str) -> str:
    """Parse an id; for ``type=`` of an argument."""
    try:
        return check_id(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def seconds(text: str) -> float:
    """Parse a number of seconds, 0 or more; for ``type=`` of an argument."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return number
