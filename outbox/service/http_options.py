"""The options of a service that answers probes: ``--http`` and ``--http-status``."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from outbox.errors import UsageError

if TYPE_CHECKING:
    from outbox.service.http import HTTPFace

__all__ = ["add_http_options", "http_address", "http_face"]

_VARIABLE = "OUTBOX_HTTP"


def add_http_options(group: argparse._ArgumentGroup) -> None:
    """Add the options to a group of a command's options."""
    group.add_argument(
        "--http",
        metavar="HOST:PORT",
        help="answer /livez, /readyz, /metrics and /status over HTTP, for example on "
        "127.0.0.1:9100, or :9100 for all addresses; implies -p 1 "
        f"(default: {_VARIABLE}, else not at all)",
    )
    group.add_argument(
        "--http-status",
        action="store_true",
        help="show /status, with host names and errors, to other machines as well",
    )


def http_face(options: argparse.Namespace, *, may_wait: bool = False) -> HTTPFace | None:
    """Listen as the options say, and return what answers; None without ``--http``.

    Args:
        options: the parsed command line.
        may_wait: see :class:`outbox.service.http.HTTPFace`.

    Raises:
        UsageError: the address is wrong, or can't be used.
    """
    text = http_address(options)
    if not text:
        return None
    # Only now: what it imports costs megabytes.
    from outbox.service.http import HTTPFace, parse_address

    try:
        address = parse_address(text)
    except ValueError as error:
        raise UsageError(f"--http: {error}") from error
    return HTTPFace(address, with_status=options.http_status, may_wait=may_wait)


def http_address(options: argparse.Namespace) -> str:
    """Return the address as it was given, by the option or else the variable; empty for none."""
    given: str | None = options.http
    return (os.environ.get(_VARIABLE, "") if given is None else given).strip()
