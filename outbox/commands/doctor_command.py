"""``outbox doctor``: examines a set-up, and names what is wrong and the remedy."""

from __future__ import annotations

import argparse
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outbox import exit_codes
from outbox.commands.application import Application
from outbox.commands.database_access import NoDatabase, open_named_engine
from outbox.commands.options import broker_option, database_option
from outbox.commands.printing import json_line, printable

if TYPE_CHECKING:
    from outbox.doctor.examination import Diagnosis

__all__ = ["add_parser"]

_EXAMPLES = """\
examples:
  outbox doctor shop.consumers
      look at the settings, the broker OUTBOX_URL, the database OUTBOX_DATABASE_URL, and the module
  outbox doctor shop.consumers --management http://rabbit:15672
      look at policies, bindings, alarms and replicas, too, which only this API shows
  outbox doctor --json --fail-on error
      print one JSON object, and exit with 1 only for errors

It changes nothing. What could not be checked is listed as such: it may be right or wrong.

exit codes: 0 nothing found, 1 something found (--fail-on), 2 wrong usage, 130 interrupted by Ctrl-C
"""
_WIDTH = 100
_MANAGEMENT = "OUTBOX_MANAGEMENT_URL"


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``doctor`` to the sub-commands of ``outbox``; see ``parked_command.add_parser``."""
    doctor = commands.add_parser(
        "doctor",
        parents=[common, broker_option(), database_option(common.get_default("application"))],
        help="find out what is wrong with a set-up",
        description="Look at the settings, the broker, the database, the consumers and this "
        "machine, and name what is wrong, with the remedy.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    doctor.add_argument(
        "consumers",
        nargs="*",
        metavar="MODULE[:ATTR]",
        help="the consumers, as outbox-consume takes them; without them their queues are not "
        "checked",
    )
    doctor.add_argument(
        "--management",
        metavar="URL",
        help="RabbitMQ's management API, http://user:password@host:15672 (default: "
        f"{_MANAGEMENT}, or port 15672 of the broker's host with the broker's user and password)",
    )
    doctor.add_argument("--json", action="store_true", help="print one JSON object")
    doctor.add_argument(
        "--fail-on",
        choices=("warning", "error"),
        default="warning",
        help="the lowest severity for which to exit with 1 (default: warning)",
    )
    doctor.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from outbox.doctor.examination import examine
    from outbox.doctor.examined import SetUp
    from outbox.doctor.finding import SEVERITIES

    application: Application = options.application
    diagnosis = examine(
        SetUp(
            modules=options.consumers,
            url=options.url,
            application_url=application.url,
            settings=application.settings,
            open_engine=_engine_opener(options),
            management=options.management or os.environ.get(_MANAGEMENT, "").strip() or None,
            arguments=_command_line(),
            more_modules=application.modules,
        )
    )
    if options.json:
        print(_as_json(diagnosis))
    else:
        print(_as_text(diagnosis))
    worst = diagnosis.worst()
    fails = worst is not None and SEVERITIES.index(worst) >= SEVERITIES.index(options.fail_on)
    return exit_codes.UNFINISHED if fails else exit_codes.SUCCESS


def _engine_opener(options: argparse.Namespace) -> Callable[[], tuple[Any, bool]] | None:
    from outbox.doctor.finding import NotChecked

    open_engine = open_named_engine(options)
    if open_engine is None:
        return None

    def open_or_leave_out() -> tuple[Any, bool]:
        try:
            return open_engine()
        except NoDatabase as error:  # which is as it should be where nothing is stored
            raise NotChecked(str(error)) from None

    return open_or_leave_out


def _command_line() -> list[str]:
    """Return the arguments of this process, as everyone on the machine can read them."""
    try:
        return Path("/proc/self/cmdline").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return sys.orig_argv


def _as_json(diagnosis: Diagnosis) -> str:
    return json_line(
        {
            "findings": [
                {
                    "code": finding.check.code,
                    "severity": finding.problem.severity,
                    "title": finding.check.title,
                    "text": finding.problem.text,
                    "remedy": finding.remedy,
                    "docs": finding.check.docs,
                }
                for finding in diagnosis.findings
            ],
            "passed": [check.code for check in diagnosis.passed],
            "not_checked": [
                {"code": check.code, "title": check.title, "reason": reason}
                for check, reason in diagnosis.not_checked
            ],
        }
    )


def _as_text(diagnosis: Diagnosis) -> str:
    lines: list[str] = []
    for finding in diagnosis.findings:
        head = f"{finding.check.code} {finding.problem.severity}: {finding.problem.text}"
        lines += _wrapped(head, "    ")
        lines += _wrapped(f"    {finding.remedy}", "    ")
        lines += [f"    {finding.check.docs}", ""]
    reasons: dict[str, list[str]] = {}
    for check, reason in diagnosis.not_checked:
        reasons.setdefault(reason, []).append(check.code)
    for reason, codes in reasons.items():
        lines += _wrapped(f"not checked: {', '.join(codes)}: {reason}", "    ")
    if reasons:
        lines.append("")
    counts = f"{len(diagnosis.findings)} found, {len(diagnosis.passed)} checks passed"
    lines.append(f"{counts}, {len(diagnosis.not_checked)} not made or not complete")
    return "\n".join(lines)


def _wrapped(text: str, indent: str) -> list[str]:
    wrap: Callable[..., list[str]] = textwrap.wrap
    return wrap(
        printable(text),
        _WIDTH,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
