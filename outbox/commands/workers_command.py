"""``outbox workers``: starts, stops, restarts and shows services by their ids.

It neither connects to a broker nor imports the application: what it shows is what the services
have written down themselves.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from outbox import exit_codes
from outbox.commands.options import broker_option
from outbox.commands.printing import json_line, printable
from outbox.errors import UsageError
from outbox.service.identity import background
from outbox.service.identity.folder import default_folder, open_folder
from outbox.service.identity.identity_options import (
    START_TIMEOUT,
    folder_option,
    seconds,
    take_over_option,
    valid_id,
)
from outbox.service.identity.listing import Listed, Signalled, listed
from outbox.service.identity.status_file import Status, WorkerStatus
from outbox.settings import Settings
from outbox.system.signals import BURST

if TYPE_CHECKING:
    from outbox.presence import Announcement

__all__ = ["add_parser", "service_command"]

_EXAMPLES = """\
examples:
  outbox workers start --id mail -- outbox-consume shop.consumers -Q high,medium -p 2
      run these consumers in the background; where the id runs already, take over from it
  outbox workers restart
      start all services of the folder anew, with the code of now; each takes over when it is ready
  outbox workers stop --id mail
      stop it, and wait for its end; without --id: all services of the folder
  outbox workers status
      show which run, and what their workers do
  outbox workers status --all
      besides, show the processes of all machines that the RabbitMQ hears of

Services that run in the foreground with --id are shown, stopped and taken over as well.

exit codes of status, as of init scripts: 0 running, 1 dead with a pid file, 3 not running,
4 unknown: it runs in another container; of the others: 0 done, 1 some could not be stopped in time,
2 wrong usage; start and restart end with the exit code of a service that fails
"""

_RUNNING, _DEAD, _NOT_RUNNING, _UNKNOWN = 0, 1, 3, 4
"""Exit codes of ``status``, as the Linux Standard Base has them for init scripts."""


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Add ``workers`` to the sub-commands of ``outbox``; see ``parked_command.add_parser``."""
    workers = commands.add_parser(
        "workers",
        help="start, stop, restart and show workers and relays by their ids",
        description="Start, stop, restart and show workers and relays by their ids.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = workers.add_subparsers(title="actions", metavar="ACTION", required=True)

    def add(
        name: str,
        run: Callable[[argparse.Namespace], int],
        *parents: argparse.ArgumentParser,
        **texts: str,
    ) -> Any:
        action = actions.add_parser(name, parents=[common, *parents], **texts)
        folder_option(action)
        action.set_defaults(run=run)
        return action

    start = add(
        "start",
        _start,
        help="start a command in the background",
        description="Start a command in the background, and return when it is ready or has failed.",
    )
    start.add_argument(
        "--id", type=valid_id, required=True, metavar="ID", help="the id to run it under"
    )
    _add_start_options(start)
    _add_command(start, "+", "the command: outbox-consume or outbox relay with its options")

    restart = add(
        "restart",
        _restart,
        help="start services anew, which take over from the old ones",
        description="Start services anew in the background, each with the command that it was "
        "started with, or with the one given here. It takes over when it is ready; the old one "
        "finishes what it has begun.",
    )
    _add_ids(restart)
    _add_start_options(restart)
    _add_command(restart, "*", "another command than before; for one --id")

    stop = add(
        "stop",
        _stop,
        help="stop services, and wait for their end",
        description="Stop services in an orderly way, those included that leave, and wait for "
        "their end.",
    )
    _add_ids(stop)
    stop.add_argument("--now", action="store_true", help="kill their workers after a second")
    stop.add_argument(
        "--timeout",
        type=seconds,
        metavar="SECONDS",
        help="how long to wait (default: until the end)",
    )
    stop.add_argument(
        "--kill",
        action="store_true",
        help="kill what has not ended after --timeout, such as a parent that hangs; its workers "
        "then stop by themselves",
    )

    def add_signal(name: str, number: signal.Signals, asked: str, help: str, more: str) -> None:
        description = f"{help.capitalize()}.{more}"
        _add_ids(add(name, _signal_command(number, asked), help=help, description=description))

    add_signal(
        "quiet",
        signal.SIGTSTP,
        "asked to begin nothing more",
        "have services begin no more messages, but stay",
        " It cannot be undone.",
    )
    add_signal(
        "dump",
        signal.SIGUSR1,
        "asked to write its stacks to its log",
        "have services write the stacks of their workers to their logs",
        "",
    )

    status = add(
        "status",
        _status,
        broker_option(),
        help="show which services run",
        description="Show which services run, and what their workers do.",
    )
    _add_ids(status)
    status.add_argument("--json", action="store_true", help="print one JSON object per process")
    status.add_argument(
        "--all",
        action="store_true",
        help="besides, show the worker and relay processes of all machines that announce "
        "themselves: to the RabbitMQ, which takes 13 seconds of listening, or in the database",
    )


def _add_ids(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--id",
        type=valid_id,
        action="append",
        default=[],
        metavar="ID",
        help="only the service with this id; repeatable (default: all of the folder)",
    )


def _add_start_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--start-timeout",
        type=seconds,
        metavar="SECONDS",
        help=f"how long it may take until it is ready (default: {START_TIMEOUT:.0f})",
    )
    take_over_option(parser)


def _add_command(parser: argparse.ArgumentParser, count: str, text: str) -> None:
    parser.add_argument("command", nargs=count, metavar="-- COMMAND", help=text)


def _start(options: argparse.Namespace) -> int:
    options.take_over |= "--take-over" in options.command
    return _run_in_background(options, options.id, _program(options.command), None)


def _restart(options: argparse.Namespace) -> int:
    if options.command:
        if len(options.id) != 1:
            raise UsageError("a command needs one --id, under which to run it")
        return _start(argparse.Namespace(**{**vars(options), "id": options.id[0]}))
    folder = _folder(options)
    found = [one for one in _selected(options, folder) if one.is_owner]
    if not found:
        raise UsageError(f"no service in {folder}; start one: outbox workers start")
    worst = exit_codes.SUCCESS
    for one in found:
        if one.status is None:
            raise UsageError(
                f"{one.id}: its command is not known; give it: restart --id {one.id} -- ..."
            )
        code = _run_in_background(options, one.id, list(one.status.command), one.status)
        worst = worst or code
    return worst


def _run_in_background(
    options: argparse.Namespace, id: str, command: list[str], before: Status | None
) -> int:
    folder = _folder(options)
    command = service_command(
        command, id, folder, start_timeout=options.start_timeout, take_over=options.take_over
    )
    started = background.start(
        command,
        folder=folder,
        id=id,
        working_directory=None if before is None else before.folder,
        start_timeout=_start_timeout(command),
    )
    if started.code == exit_codes.SUCCESS:
        print(f"{id}: started (process {started.pid})")
        return started.code
    for line in started.log:
        print(f"  {printable(line)}", file=sys.stderr)
    print(
        f"outbox: {id} was not started: its command ended with {started.code}; see "
        f"{background.log_path(folder, id)}",
        file=sys.stderr,
    )
    return started.code


def _start_timeout(command: Sequence[str]) -> float:
    """Return the last ``--start-timeout`` of a command, which is the one that counts."""
    for name, value in reversed(list(itertools.pairwise(command))):
        if name == "--start-timeout":
            with contextlib.suppress(ValueError):
                return float(value)
    return START_TIMEOUT


def service_command(
    command: Sequence[str],
    id: str,
    folder: Path,
    *,
    start_timeout: float | None = None,
    take_over: bool = False,
) -> list[str]:
    """Return a command line that runs ``command`` under an id.

    It may be one that this function has returned before: an option replaces the same one.
    """
    # Taking over from another application was meant once.
    line = [argument for argument in command if argument != "--take-over"]
    line = _with_option(line, "--id", id)
    line = _with_option(line, "--pid-dir", str(folder))
    if start_timeout is not None:
        line = _with_option(line, "--start-timeout", f"{start_timeout:g}")
    return [*line, "--take-over"] if take_over else line


def _with_option(command: list[str], name: str, value: str) -> list[str]:
    if name in command[:-1]:
        place = command.index(name) + 1
        return [*command[:place], value, *command[place + 1 :]]
    return [*command, name, value]


def _program(command: Sequence[str]) -> list[str]:
    """Return ``command`` with the commands of outbox as those of the present installation."""
    name, *arguments = command
    modules = {"outbox": "outbox", "outbox-consume": "outbox.consumers"}
    if name not in modules:
        return list(command)
    # Beside this program, through the same links: after a deployment they lead to the new code.
    beside = Path(sys.argv[0]).absolute().with_name(name)
    if os.access(beside, os.X_OK) and beside.is_file():
        return [str(beside), *arguments]
    return [sys.executable, "-m", modules[name], *arguments]


def _stop(options: argparse.Namespace) -> int:
    if options.kill and options.timeout is None:
        raise UsageError("--kill needs --timeout, after which to kill")
    folder = _folder(options)
    code = exit_codes.SUCCESS
    with contextlib.ExitStack() as stack:
        signalled = []
        for one, process in _signalled(_selected(options, folder), signal.SIGTERM):
            stack.callback(process.close)
            signalled.append((one, process))
        if not signalled:
            print("nothing to stop")
        end = None if options.timeout is None else time.monotonic() + options.timeout
        if options.now and signalled:
            time.sleep(BURST + 0.1)  # a second signal within a burst means the same as the first
            for _, process in signalled:
                process.send(signal.SIGTERM)
        for one, process in signalled:
            if process.wait(None if end is None else max(0.0, end - time.monotonic())):
                print(f"{one.id}: stopped (process {one.holder})")
            elif options.kill:
                process.send(signal.SIGKILL)
                process.wait(None)
                print(f"{one.id}: killed (process {one.holder})")
            else:
                print(f"{one.id}: still stopping (process {one.holder})", file=sys.stderr)
                code = exit_codes.UNFINISHED
    return code


def _signal_command(number: signal.Signals, done: str) -> Callable[[argparse.Namespace], int]:
    def run(options: argparse.Namespace) -> int:
        code = exit_codes.UNFINISHED
        for one, process in _signalled(_selected(options, _folder(options)), number):
            process.close()
            print(f"{one.id}: {done} (process {one.holder})")
            code = exit_codes.SUCCESS
        if code != exit_codes.SUCCESS:
            print("outbox: no service runs here", file=sys.stderr)
        return code

    return run


def _signalled(
    found: Sequence[Listed], number: signal.Signals
) -> Iterator[tuple[Listed, Signalled]]:
    """Send a signal to the living processes; yield those that have got it."""
    for one in found:
        if one.is_elsewhere:
            raise UsageError(f"{one.id} is held in another container, where it has to be done")
    for one in found:
        with contextlib.suppress(ProcessLookupError):
            process = Signalled(one)
            try:
                process.send(number)
            except PermissionError:
                process.close()
                raise UsageError(
                    f"{one.id}: process {one.holder} belongs to another user"
                ) from None
            yield one, process


def _folder(options: argparse.Namespace) -> Path:
    return open_folder(options.pid_dir or default_folder(), create=False)


def _selected(options: argparse.Namespace, folder: Path) -> list[Listed]:
    try:
        return [one for one in listed(folder) if not options.id or one.id in options.id]
    except OSError as error:
        raise UsageError(f"cannot read the folder {folder}: {error}") from None


def _status(options: argparse.Namespace) -> int:
    folder = _folder(options)
    found = _selected(options, folder)
    for one in found:
        print(_json(one) if options.json else "\n".join(_lines(one)))
    missing = [id for id in options.id if not any(one.id == id for one in found)]
    if not options.json:
        for id in missing:
            print(f"{id}: not running (none)")
        if not found and not missing:
            print(f"no service in {folder}")
    ids = {one.id for one in found}
    codes = [_code([one for one in found if one.id == id]) for id in ids]
    codes += [_NOT_RUNNING for _ in missing]
    code = max(codes, default=_NOT_RUNNING)
    if options.all:
        heard = _hear(options)
        for announcement in heard:
            print(_announced_json(announcement) if options.json else _announced(announcement))
        if code == _NOT_RUNNING and heard and not missing:
            code = _RUNNING
    return code


def _hear(options: argparse.Namespace) -> list[Announcement]:
    """Return what the processes of the wanted ids say of themselves, after an interval if need be.

    Raises:
        UsageError: processes announce nothing there, or the broker refuses it.
    """
    # With asyncio and aio-pika, or SQLAlchemy, which nothing else here needs.
    from outbox.presence import listener

    def on_wait() -> None:
        print(f"listening for {seconds:.0f} s to what is announced", file=sys.stderr)

    seconds = listener.WHOLE_INTERVAL
    application = options.application
    settings = Settings.load(options.url or application.url, application.settings)
    found = listener.listen(seconds, settings=settings, on_wait=on_wait)
    return [one for one in found if not options.id or one.id in options.id]


def _announced(one: Announcement) -> str:
    line = f"{one.host}: {one.kind} {one.id or '-'} (process {one.pid}): {one.phase}"
    line += f", {one.in_flight} in flight, started {_time(one.age)} ago"
    if one.queues:
        more = f" and {one.more_queues} more" if one.more_queues else ""
        line += f"; {', '.join(one.queues)}{more}"
    if one.error:
        line += f"; last error {one.error}, {_time(one.error_age or 0.0)} ago"
    return printable(line)


def _announced_json(one: Announcement) -> str:
    return json_line({"announced": asdict(one)})


def _code(processes: Sequence[Listed]) -> int:
    """Return the exit code for the processes of one id."""
    if any(one.is_elsewhere for one in processes):
        return _UNKNOWN
    if any(one.is_alive for one in processes):
        return _RUNNING
    return _DEAD


def _lines(one: Listed) -> list[str]:
    status = one.status
    if one.is_elsewhere:
        return [f"{one.id}: held in another container"]
    if not one.is_alive:
        return [f"{one.id}: NOT running (process {one.number} has died)"]
    if status is None:
        return [f"{one.id}: running (process {one.holder})"]
    lines = [f"{one.id}: {_described(one, status)}; {printable(shlex.join(status.command))}"]
    if not one.is_owner or status.phase in ("leaving", "stopping"):
        reasons: tuple[str, ...] = ()
    else:
        reasons = status.reasons
    lines += [f"  not ready: {printable(reason)}" for reason in reasons]
    for worker in status.workers:
        line = f"  worker {worker.slot} (process {worker.pid}): {worker.phase}"
        if worker.in_flight is not None:
            line += f", {worker.in_flight} in flight"
        if worker.oldest is not None:
            line += f", the oldest for {_time(worker.oldest)}"
        if worker.late:
            line += f", {worker.late} past the timeout"
        line += f", started {_time(worker.age)} ago"
        if worker.resident:
            line += f", {worker.resident / 2**20:.0f} MiB"
        lines.append(line)
        lines += [f"    {printable(text)}" for text in _details(worker)]
    return lines


def _details(worker: WorkerStatus) -> Iterator[str]:
    """Yield what deserves a line: limits, links that are down, the last error."""
    for name, (present, limit) in worker.limits.items():
        yield f"{name}: {_number(present)} of {_number(limit)}"
    for name, is_up in worker.links.items():
        if not is_up:
            yield f"no connection: {name}"
    if worker.error:
        age = _time(max(0.0, time.time() - worker.error.get("at", 0.0)))
        yield f"last error, {age} ago: {worker.error.get('text', '')}"


def _number(value: object) -> str:
    return f"{value:,.0f}" if isinstance(value, int | float) else str(value)


def _described(one: Listed, status: Status) -> str:
    ready = sum(worker.phase == "ready" for worker in status.workers)
    what = "running"
    if status.phase in ("quiet", "leaving", "stopping", "given up"):
        what = status.phase
    elif not one.is_owner:
        what = "starting, to take over"
    age = _time(max(0.0, time.time() - status.started_at))
    return f"{what} (process {one.holder}), {ready} of {status.processes} ready, started {age} ago"


def _json(one: Listed) -> str:
    return json.dumps(
        {
            "id": one.id,
            "pid": one.number if one.holder is None else one.holder,
            "running": one.is_alive,
            "elsewhere": one.is_elsewhere,
            "owner": one.is_owner,
            "status": None if one.status is None else asdict(one.status),
        }
    )


def _time(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
