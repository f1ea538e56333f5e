"""Starts a service in the background, and returns when it is ready or has failed."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from outbox import exit_codes
from outbox.errors import UsageError
from outbox.service.identity.folder import open_folder
from outbox.service.identity.instance import START_VARIABLE
from outbox.service.identity.pid_file import holder_of, own_files
from outbox.service.identity.status_file import Status, has_password, status_path

__all__ = ["Started", "log_path", "start"]

_POLL = 0.05
_MARGIN = 5.0
"""Seconds beyond the start timeout in which a command has to say that it has begun."""
_LOG_LINES = 20
_LOG_BYTES = 16_384

_OF_UNIT = ("INVOCATION_ID", "NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC", "JOURNAL_STREAM")
"""What systemd means for the process that runs ``outbox workers start``, not for a service."""


@dataclass(frozen=True, slots=True)
class Started:
    """The result of a start.

    Attributes:
        code: 0 if the service is ready, else the exit code of the command.
        pid: the process id of its parent; None if it has ended.
        log: the last lines of its log, if it failed.
    """

    code: int
    pid: int | None
    log: tuple[str, ...] = ()


def log_path(folder: Path, id: str) -> Path:
    """Return the path of the log of a service that runs in the background."""
    return folder / f"outbox-{id}.log"


def start(
    command: Sequence[str],
    *,
    folder: Path,
    id: str,
    working_directory: str | None = None,
    start_timeout: float = 60.0,
) -> Started:
    """Run ``command`` detached from the terminal, until it is ready or has failed.

    It must be a service with this id. Its output is appended to ``log_path()``.

    Args:
        command: the program and its arguments, with the options of its id.
        folder: where the service's files are.
        id: the service's id.
        working_directory: where to run it; by default here.
        start_timeout: the seconds that the service has to get ready.

    Raises:
        UsageError: the command can't be started; or it holds a password, which every user of the
            machine could read for as long as it runs.
    """
    if has_password(command):
        raise UsageError(
            "a password in the command line can be read by every user of the machine; give the URL "
            "in OUTBOX_URL or OUTBOX_DATABASE_URL"
        )
    open_folder(folder)
    word = os.urandom(8).hex()
    variables = {name: value for name, value in os.environ.items() if name not in _OF_UNIT}
    variables[START_VARIABLE] = word
    if working_directory is not None:
        variables["PWD"] = working_directory
    path = log_path(folder, id)
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with open(os.open(path, flags, 0o600), "ab") as log:
            size = os.fstat(log.fileno()).st_size
            process = subprocess.Popen(
                command,
                cwd=working_directory,
                env=variables,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    except OSError as error:
        raise UsageError(f"cannot start {command[0]!r}: {error}") from None
    try:
        code, pid = _wait(process, folder, id, word, start_timeout)
    except BaseException:
        process.terminate()
        raise
    # The process outlives this one, on purpose.
    process.returncode = 0 if process.returncode is None else process.returncode
    return Started(code, pid, () if code == exit_codes.SUCCESS else _last_lines(path, size))


def _wait(
    process: subprocess.Popen[bytes], folder: Path, id: str, word: str, timeout: float
) -> tuple[int, int | None]:
    deadline = time.monotonic() + timeout + _MARGIN
    while True:
        code = process.poll()
        found = _started(folder, id, word)
        if found is not None and found.ready and found.owner:
            return exit_codes.SUCCESS, found.pid
        if found is None and code is not None:
            # A command that doesn't serve, such as one with --help, has failed as well.
            return (code if code > 0 else exit_codes.UNFINISHED), None
        if found is None and time.monotonic() >= deadline:
            process.terminate()
            return exit_codes.NOT_READY, None
        time.sleep(_POLL)


def _started(folder: Path, id: str, word: str) -> Status | None:
    """Return the state of the living process that was started with ``word``."""
    with contextlib.suppress(OSError):
        for _, key, own in own_files(folder, id):
            status = Status.read(status_path(folder, id, key))
            if status is not None and status.start == word and holder_of(own) is not None:
                return status
    return None


def _last_lines(path: Path, since: int) -> tuple[str, ...]:
    """Return the last lines of the log, of those that were added after the byte ``since``."""
    with contextlib.suppress(OSError):
        with path.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(0 if end < since else since, end - _LOG_BYTES))
            return tuple(file.read().decode(errors="replace").splitlines()[-_LOG_LINES:])
    return ()
