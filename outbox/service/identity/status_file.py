"""What a service writes down about itself each second, for commands that ask about it."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Status", "WorkerStatus", "has_password", "status_path", "without_passwords"]

VERSION = 1
_LARGEST = 1 << 20  # bytes
_PASSWORD = re.compile(r"(://[^/\s:@]*:)\S*@")


@dataclass(frozen=True, slots=True)
class WorkerStatus:
    """A worker process, at one moment.

    Attributes:
        slot: the number of its slot, from 1.
        pid: its process id.
        phase: ``starting``, ``ready``, ``leaving`` or ``stuck``.
        age: the seconds since it was started.
        restarts: the processes that have been started in its slot after the first.
        in_flight: the messages that it has begun; None before its first report.
        late: its handlers that are past their timeout; likewise.
        oldest: the seconds since the oldest message in flight was begun; None if there is none.
        links: whether each of its connections is up, by name.
        limits: the present value and the limit at which it is replaced, a pair each, by name.
        resident: its resident memory in bytes; None if unknown.
        cpu: its CPU time in percent of one core; None if it isn't limited.
        error: the last error that it has logged: ``at``, ``logger``, ``class`` and ``text``; None
            if there was none.
    """

    slot: int
    pid: int
    phase: str
    age: float
    restarts: int = 0
    in_flight: int | None = None
    late: int | None = None
    oldest: float | None = None
    links: dict[str, bool] = field(default_factory=dict)
    limits: dict[str, Any] = field(default_factory=dict)
    resident: int | None = None
    cpu: float | None = None
    error: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """A service, at one moment. It holds no password, no payload and no id of an event.

    Attributes:
        id: the service's id.
        pid: the process id of the parent, in its own PID namespace.
        command: the command line that starts it again, passwords masked.
        folder: the working directory for that, with the links in its path as they were given.
        applications: the modules whose consumers it runs, or what else tells its application
            apart; empty if that is unknown.
        started_at: when it was started, in seconds of Unix time.
        written_at: when this was written.
        phase: the parent's: ``starting``, ``ready``, ``quiet``, ``leaving``, ``stopping`` or
            ``given up``.
        ready: whether all its workers consume.
        owner: whether it has the id, and isn't still to take it over, or leaving.
        reasons: why it isn't ready.
        processes: the workers asked for.
        workers: the workers there are.
        restarts: the restarts of workers, by reason.
        http: the address of its probes; None if it has none.
        unit: systemd's invocation id; None if systemd hasn't started it.
        start: the word by which ``outbox workers start`` finds it; None in the foreground.
        version: the version of this format.
    """

    id: str
    pid: int
    command: tuple[str, ...]
    folder: str
    applications: tuple[str, ...] = ()
    started_at: float = 0.0
    written_at: float = 0.0
    phase: str = "starting"
    ready: bool = False
    owner: bool = False
    reasons: tuple[str, ...] = ()
    processes: int = 1
    workers: tuple[WorkerStatus, ...] = ()
    restarts: dict[str, int] = field(default_factory=dict)
    http: str | None = None
    unit: str | None = None
    start: str | None = None
    version: int = VERSION

    def write(self, path: Path) -> None:
        """Replace the file at once, readable by this user alone.

        Raises:
            OSError: it can't be written.
        """
        draft = path.with_name(f".{path.name}.new")
        draft.unlink(missing_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with open(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, ensure_ascii=True)
            file.write("\n")
        os.replace(draft, path)

    @classmethod
    def read(cls, path: Path) -> Status | None:
        """Return what the file says; None if there is none, or another version wrote it."""
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
            with path.open("rb") as file:
                values = json.loads(file.read(_LARGEST))
            if values.get("version") == VERSION:
                return cls._from(values)
        return None

    @classmethod
    def _from(cls, values: dict[str, Any]) -> Status:
        known = {name: values[name] for name in cls.__slots__ if name in values}
        workers = tuple(
            WorkerStatus(**{name: one[name] for name in WorkerStatus.__slots__ if name in one})
            for one in known.pop("workers", ())
        )
        lists = {name: tuple(known[name]) for name in known if isinstance(known[name], list)}
        return cls(**{**known, **lists, "workers": workers})


def status_path(folder: Path, id: str, key: str) -> Path:
    """Return the path of the state that a process of the service writes down."""
    return folder / f"outbox-{id}.{key}.json"


def without_passwords(command: Sequence[str]) -> tuple[str, ...]:
    """Return a command line with ``***`` for the passwords of its URLs."""
    return tuple(_PASSWORD.sub(r"\1***@", argument) for argument in command)


def has_password(command: Sequence[str]) -> bool:
    """Return whether a command line has a URL with a password, or with a masked one."""
    return any(_PASSWORD.search(argument) for argument in command)
