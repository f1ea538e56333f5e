"""Checks of the settings and the command line."""

from __future__ import annotations

import re
from collections.abc import Iterator

from outbox.doctor.check import Check
from outbox.doctor.examined import Examined
from outbox.doctor.finding import Problem
from outbox.errors import OutboxError
from outbox.url import BrokerURL

__all__ = ["CHECKS"]

_PASSWORD = re.compile(r"[a-z][a-z0-9+.-]*://[^/@\s:]*:(?P<password>[^/\s]*)@", re.IGNORECASE)
_WELL_KNOWN = ("guest", "***")


def _settings(examined: Examined) -> Iterator[Problem]:
    yield from _command_line(examined)
    try:
        settings = examined.read_settings()
        if not settings.url:
            yield Problem("error", "no broker is known", "Set OUTBOX_URL, or pass --url.")
            return
        url = BrokerURL.parse(settings.url)
    except OutboxError as error:
        yield Problem("error", str(error))
        return
    if url.scheme == "memory":
        yield Problem(
            "warning", "memory:// keeps events in the process that made them, and sends them to no "
            "one", "Name a broker: amqp://host, postgresql://host/database or sqlite:///outbox.db.",
        )  # fmt: skip
    for what, text in (("user", url.user), ("vhost", url.vhost)):
        if text != text.strip():
            yield Problem("warning", f"the {what} in the broker URL begins or ends with a space")


def _command_line(examined: Examined) -> Iterator[Problem]:
    for argument in examined.set_up.arguments:
        found = _PASSWORD.search(argument)
        if found is not None and found["password"] not in _WELL_KNOWN:
            yield Problem(
                "warning",
                "the command line holds a password, which every user of the machine can read",
                "Give the URL in OUTBOX_URL, OUTBOX_DATABASE_URL or the settings.",
            )
            return


CHECKS = (
    Check(
        "OBX101",
        "the settings and the broker URL",
        "Correct the setting that the text names.",
        _settings,
    ),
)
