"""``outbox spool``: shows, publishes and recovers kept events on the disk."""

from __future__ import annotations

import argparse
import datetime
import sys
from pathlib import Path
from typing import Any

from outbox import exit_codes
from outbox.commands.options import broker_option
from outbox.commands.printing import json_line, printable
from outbox.errors import BrokerError, UsageError
from outbox.publisher import Publisher
from outbox.report import Withdrawn
from outbox.settings import Settings
from outbox.spool.inspection import FileState, look_at, salvage
from outbox.spool.spool import WINDOW, WINDOW_BYTES
from outbox.spool.spool_file import NewerFormat, SpoolFile, Unreadable, Unwritable
from outbox.spool.spool_folder import BAD, digest_of, files_in, lock_path
from outbox.system.disk.private_folder import private_folder
from outbox.url import BrokerURL

__all__ = ["add_parser"]

_CONFIRMS = 30.0  # seconds to wait for those of a window

_EXAMPLES = """\
examples:
  outbox spool status
      show the files in the folder OUTBOX_SPOOL, whose they are, and what they hold
  outbox spool drain --spool /var/lib/shop/spool
      publish to the broker OUTBOX_URL what ended processes have left for it
  outbox spool drain /var/lib/shop/spool/3f2a9c04d1be-20261127T134008-4aa46c98.spool
      publish this file, also if it was written for another broker or exchange
  outbox spool salvage 3f2a9c04d1be-20261127T134008-4aa46c98.spool.bad-20261127T140000
      copy what can be read of a damaged file to a new one, which is then published like others

A file that a process has is never taken from it: the process publishes its events. If drain fails
in between, no event is lost, but some may be delivered twice, with the same id.

exit codes: 0 done, 1 done in part (the output names what is left, other than the files of running
processes), 2 wrong usage or no such folder, 7 the broker cannot be reached, 130 interrupted by
Ctrl-C
"""


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``spool`` to the sub-commands of ``outbox``; see ``parked_command.add_parser``."""
    spool = commands.add_parser(
        "spool",
        help="show, publish or recover kept events on the disk",
        description="Show, publish or recover the kept events that publishers have written to the "
        "disk.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = spool.add_subparsers(title="actions", metavar="ACTION", required=True)
    folder = argparse.ArgumentParser(add_help=False)
    folder.add_argument(
        "--spool", metavar="FOLDER", help="the folder of the files (default: OUTBOX_SPOOL)"
    )

    status = actions.add_parser(
        "status",
        parents=[common, folder],
        help="show the files, without changing anything",
        description="Show the files, whose they are, and how many events they hold.",
    )
    status.add_argument("--json", action="store_true", help="print one JSON object per line")
    status.set_defaults(run=_status, url=None)

    drain = actions.add_parser(
        "drain",
        parents=[common, broker_option(), folder],
        help="publish what ended processes have left",
        description="Publish the events that ended processes have left for this broker and "
        "exchange (OUTBOX_EXCHANGE), or those of the files given.",
    )
    drain.add_argument(
        "file",
        nargs="*",
        type=Path,
        metavar="FILE",
        help="publish the events of this file, whatever broker and exchange they were kept for",
    )
    drain.set_defaults(run=_drain)

    recover = actions.add_parser(
        "salvage",
        parents=[common],
        help="recover what can be read of a damaged file",
        description="Copy what can be read of a damaged file to a new one in its folder, which "
        "the next publisher adopts. The damaged one stays.",
    )
    recover.add_argument("file", type=Path, metavar="FILE", help="the file, usually ….bad-<time>")
    recover.set_defaults(run=_salvage)


def _status(options: argparse.Namespace) -> int:
    folder = _folder(options, _settings(options))
    total = 0
    for digest, path in files_in(folder):
        if path.name.endswith(".lock"):
            continue
        try:
            state = look_at(path)
        except FileNotFoundError:  # its process has just deleted it
            continue
        holder = _holder(path)
        total += state.events
        if options.json:
            print(json_line(_as_json(digest, path, state, holder)))
        else:
            print(_as_text(path, state, holder))
    # Standard output has one JSON object per line, for programs: the total isn't one.
    print(f"{folder}: {_events(total)}", file=sys.stderr if options.json else sys.stdout)
    return exit_codes.SUCCESS


def _drain(options: argparse.Namespace) -> int:
    settings = _settings(options)
    url = BrokerURL.parse(settings.url or "")
    own = digest_of(url, settings.exchange)
    if options.file:
        files = [(own, path) for path in options.file]
        for path in options.file:
            if not path.exists():
                raise UsageError(f"there is no file {path}")
    else:
        files = files_in(_folder(options, settings))
    overrides: Any = {**options.application.settings, "spool": ""}
    left = done = 0
    with Publisher(options.url or options.application.url, **overrides) as publisher:
        for digest, path in files:
            if path.name.endswith(".lock"):
                continue
            why = _why_not(path, is_own=digest == own)
            if not why:
                published, why = _publish(publisher, path)
                done += published
            if why:
                left += not why.startswith("process ")
                print(f"not drained: {path.name}: {printable(why)}", file=sys.stderr)
    print(f"{_events(done)} published")
    return exit_codes.UNFINISHED if left else exit_codes.SUCCESS


def _why_not(path: Path, *, is_own: bool) -> str:
    """Return why a file isn't to be taken; "" if it is, and ``process …`` if one has it."""
    if BAD in path.name:
        return "it is damaged; use outbox spool salvage"
    holder = _holder(path)
    if holder is not None:
        return f"{holder} has it"
    if not is_own:
        return "its events are for another broker or exchange; name the file to publish them here"
    return ""


def _publish(publisher: Publisher, path: Path) -> tuple[int, str]:
    """Publish the events of a file, then delete it; return how many, and why some are left.

    Raises:
        BrokerError: the broker can't be reached; the rest is still in the file.
    """
    try:
        file = SpoolFile.adopt(path)
    except (Unreadable, Unwritable, NewerFormat) as error:
        return 0, str(error)
    if file is None:
        return 0, "process unknown has it"
    done = 0
    try:
        while spooled := file.read(WINDOW, WINDOW_BYTES):
            report = publisher.publish(
                [each.event for each in spooled], keep=False, timeout=_CONFIRMS
            )
            withdrawn = {id(each.event) for each in report.rejected if isinstance(each, Withdrawn)}
            for event, reason in report.rejected:
                if id(event) not in withdrawn:
                    print(f"rejected: {event.id}: {printable(reason)}", file=sys.stderr)
            gone = [each.seq for each in spooled if id(each.event) not in withdrawn]
            file.change((), gone)
            done += len(gone)
            if withdrawn:
                print(f"{_events(done)} of {path.name} published before the error", file=sys.stderr)
                raise report.error or BrokerError("the broker has not confirmed the events")
    except (Unreadable, Unwritable) as error:
        return done, str(error)
    finally:
        if file.events:
            file.close()
        else:
            file.remove()
    return done, ""


def _salvage(options: argparse.Namespace) -> int:
    path: Path = options.file
    digest = next((each for each, found in files_in(path.parent) if found.name == path.name), "")
    if not digest:
        raise UsageError(f"{path} is no file of a spool, or doesn't exist")
    if BAD not in path.name and _holder(path) is not None:
        raise UsageError(f"{path} is in use by {_holder(path)}")
    try:
        new, events, missing = salvage(path, digest)
    except Unwritable as error:
        raise UsageError(f"cannot salvage {error}") from None
    if new is None:
        print(f"nothing in {path} can be read", file=sys.stderr)
        return exit_codes.UNFINISHED
    print(f"{_events(events)} copied to {new}; {missing} known to be missing; delete {path}")
    return exit_codes.SUCCESS


def _settings(options: argparse.Namespace) -> Settings:
    application = options.application
    return Settings.load(options.url or application.url, application.settings)


def _folder(options: argparse.Namespace, settings: Settings) -> Path:
    named = options.spool or settings.spool
    if not named:
        raise UsageError("no spool is named: give --spool FOLDER, or set OUTBOX_SPOOL")
    folder = private_folder(Path(named), "name another: --spool", create=False)
    if not folder.exists():
        raise UsageError(f"there is no folder {folder}")
    return folder


def _holder(path: Path) -> str | None:
    """Return a text for the process that has a file, or None."""
    from outbox.service.identity.pid_file import ELSEWHERE, holder_of

    pid = holder_of(lock_path(path))
    if pid is None:
        return None
    return "process of another container" if pid == ELSEWHERE else f"process {pid}"


def _as_json(digest: str, path: Path, state: FileState, holder: str | None) -> dict[str, Any]:
    return {
        "file": str(path),
        "publisher": digest,
        "held_by": holder,
        "state": state.state,
        "events": state.events,
        "bytes": state.size,
        "oldest": None if state.oldest is None else state.oldest.isoformat(),
        "reason": state.why or None,
    }


def _as_text(path: Path, state: FileState, holder: str | None) -> str:
    if state.state == "newer":
        what = "of a newer version of outbox"
    elif state.state == "unreadable":
        what = f"unreadable: {printable(state.why)}"
    else:
        what = f"{_events(state.events)}, {holder or 'left by an ended process'}"
        if state.oldest is not None:
            age = datetime.datetime.now(datetime.UTC) - state.oldest
            what += f", the oldest {max(0, round(age.total_seconds()))} s ago"
    return f"{path.name}: {what}; {state.size} bytes"


def _events(count: int) -> str:
    return f"{count} event{'' if count == 1 else 's'}"
