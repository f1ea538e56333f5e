"""A service with an id: how it takes the id over from another process, and leaves to a third.

Its process is a *successor* until all its workers consume; then it takes the id. The process that
had it finds that out by itself, and leaves: it begins nothing more, and ends when what runs has
ended. See ``outbox.service.identity.pid_file`` for how it is decided who has the id.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shlex
import time
from dataclasses import dataclass
from pathlib import Path

from outbox import exit_codes
from outbox.errors import OutboxError, UsageError
from outbox.service.identity.folder import open_folder
from outbox.service.identity.pid_file import ELSEWHERE, PidFile, holder_of, own_files, pid_path
from outbox.service.identity.status_file import Status, WorkerStatus, status_path, without_passwords
from outbox.service.own_command import own_command, working_directory
from outbox.service.state import Service, ServiceState, WorkerState

__all__ = ["START_VARIABLE", "Identity", "Instance"]

logger = logging.getLogger("outbox.service")

START_VARIABLE = "_OUTBOX_START"
"""The environment variable by which ``outbox workers start`` recognizes what it has started."""

_WRITE_EVERY = 1.0
"""Seconds between two versions of the state, unless it changes in between."""
_COMPLAIN_EVERY = 60.0
"""Seconds between two log lines on a folder that can't be written to."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What makes a command a service with an id.

    Attributes:
        id: the id.
        folder: where its pid file is.
        applications: the modules whose consumers it runs, or what else tells its application apart
            from others; empty if that is unknown.
        take_over: whether to take the id over also from another application, another container or
            another unit of systemd.
        start_timeout: the seconds that a successor has until all its workers consume.
        handover_timeout: the seconds after which a process that leaves stops; None for no limit.
        http: the address of its probes; None if it has none.
    """

    id: str
    folder: Path
    applications: tuple[str, ...] = ()
    take_over: bool = False
    start_timeout: float = 60.0
    handover_timeout: float | None = None
    http: str | None = None


class Instance:
    """One process of a service with an id, as a face of its supervisor. Used by one thread.

    Attributes:
        is_owner: whether it has the id. Its port is bound only then, and given up before it leaves.
        predecessor: the state of the process that had the id when this one was started; None if
            there was none.
    """

    def __init__(self, identity: Identity) -> None:
        """Make this process one that has the id, or is to take it over.

        Where no living process has it, this one takes it at once, ready or not.

        Raises:
            UsageError: the folder can't be used; or the id is another application's, or that of a
                process in another container or unit.
        """
        self._identity = identity
        self._folder = open_folder(identity.folder)
        self._command = own_command()
        self._cwd = working_directory()
        self._unit = _unit()
        self._start = os.environ.pop(START_VARIABLE, None)
        self._started_at = time.time()
        self._deadline = time.monotonic() + identity.start_timeout
        self._write_at = 0.0
        self._complain_at = 0.0
        self._has_been_ready = False
        self._is_leaving = False
        self._shown: object = None
        self._checked: int | None = None
        self.is_owner = False
        self.predecessor = _status_of_holder(self._folder, identity.id)
        if self._holder() is not None:
            self._check_predecessor()
        self._pid_file = PidFile(self._folder, identity.id)
        _clean(self._folder, identity.id, self._pid_file.key)
        try:
            self._write(ServiceState())
            if self._pid_file.standing() != "held":
                self._take()
        except OSError as error:
            self._pid_file.close()
            raise UsageError(
                f"cannot write to the folder {self._folder}: {error.strerror}"
            ) from None

    @property
    def in_background(self) -> bool:
        """Whether ``outbox workers start`` has started it."""
        return self._start is not None

    @property
    def shares_port(self) -> bool:
        """Whether the predecessor answers probes at the same address, and gives it up when it goes.

        Then this process may listen there only a moment after it has become the owner.
        """
        http = self._identity.http
        return http is not None and self.predecessor is not None and self.predecessor.http == http

    def turn(self, service: Service) -> None:
        """Look who has the id, and take it, leave, or do nothing; write the state down.

        A folder that can't be written to or read is logged, and changes nothing else.
        """
        try:
            state = service.state
            self._has_been_ready |= state.ready
            if not self._is_leaving and state.phase not in ("stopping", "leaving"):
                self._look(service)
            self._write_if_due(state)
        except (OSError, OutboxError) as error:
            if time.monotonic() >= self._complain_at:
                self._complain_at = time.monotonic() + _COMPLAIN_EVERY
                logger.error("the state of service %r can't be kept: %s", self._identity.id, error)

    def close(self) -> None:
        """Remove the files of this process."""
        with contextlib.suppress(OSError):
            self._status_path.unlink(missing_ok=True)
        self._pid_file.close()

    def _look(self, service: Service) -> None:
        standing = self._pid_file.standing()
        if standing == "own":
            self._check_start(service)
        elif self.is_owner and standing == "held":
            self._leave(service)
        elif self.is_owner:
            # Removed by a program that cleans temporary folders; or the successor has died at that
            # very moment: then nothing but this process consumes.
            logger.warning("%s was %s; writing it again", self._pid_file.path, _FATE[standing])
            self._take()
        elif standing != "held":
            logger.info("no process has the id %r any more; taking it", self._identity.id)
            self._take()
        elif service.state.ready:
            self._take_over(service)
        elif time.monotonic() >= self._deadline:
            self._give_up(service, "the other process goes on")

    def _take_over(self, service: Service) -> None:
        holder = self._holder()
        try:
            self._check_predecessor()  # it may be another than when this process was started
        except UsageError as error:
            logger.error("%s; stopping", error)
            service.stop(exit_codes.USAGE)
            return
        self._take()
        logger.info("took over %r from process %s", self._identity.id, holder)

    def _take(self) -> None:
        self._pid_file.take()
        self.is_owner = True

    def _leave(self, service: Service) -> None:
        self.is_owner = False
        self._is_leaving = True
        holder = self._holder()
        logger.info("process %s has taken over %r; leaving", holder, self._identity.id)
        service.leave(self._identity.handover_timeout)

    def _check_start(self, service: Service) -> None:
        """End a process that was started in the background, and does not get ready."""
        if self.in_background and not self._has_been_ready and time.monotonic() >= self._deadline:
            self._give_up(service, "; ".join(service.state.reasons) or "no worker consumes")

    def _give_up(self, service: Service, what: str) -> None:
        timeout = self._identity.start_timeout
        logger.error("not ready within %.0f s; stopping: %s", timeout, what)
        service.stop(exit_codes.NOT_READY)

    def _holder(self) -> int | None:
        return holder_of(pid_path(self._folder, self._identity.id))

    def _check_predecessor(self) -> None:
        """Raise a ``UsageError`` unless the id may be taken from the process that has it."""
        holder = self._holder()
        if self._identity.take_over or holder is None or holder == self._checked:
            return
        self._checked = holder
        id, anyway = self._identity.id, "; take it over with --take-over"
        if holder == ELSEWHERE:
            raise UsageError(f"the id {id!r} is held in another container{anyway}")
        status = _status_of_holder(self._folder, id)
        if status is None:
            return
        theirs, ours = set(status.applications), set(self._identity.applications)
        if theirs and ours and not theirs & ours:
            raise UsageError(
                f"the id {id!r} belongs to another application: process {holder} runs "
                f"{shlex.join(status.command)!r} and this is {shlex.join(self._command)!r}; choose "
                f"another --id or --pid-dir{anyway}"
            )
        if status.unit != self._unit:
            raise UsageError(
                f"the id {id!r} is held by process {holder}, and only one of the two belongs to "
                f"this unit of systemd, which would lose sight of the other; hand new code over "
                f"with systemctl reload{anyway}"
            )

    @property
    def _status_path(self) -> Path:
        return status_path(self._folder, self._identity.id, self._pid_file.key)

    def _write_if_due(self, state: ServiceState) -> None:
        shown = (state.phase, state.ready, self.is_owner, self._is_leaving, self._pid_file.key)
        now = time.monotonic()
        if shown != self._shown or now >= self._write_at:
            self._shown = shown
            self._write_at = now + _WRITE_EVERY
            self._write(state)

    def _write(self, state: ServiceState) -> None:
        Status(
            id=self._identity.id,
            pid=os.getpid(),
            command=without_passwords(self._command),
            folder=self._cwd,
            applications=self._identity.applications,
            started_at=self._started_at,
            written_at=time.time(),
            phase="leaving" if self._is_leaving else state.phase,
            ready=state.ready,
            owner=self.is_owner,
            reasons=state.reasons,
            processes=state.slots,
            workers=tuple(map(_described, state.workers)),
            restarts=dict(state.restarts),
            http=self._identity.http,
            unit=self._unit,
            start=self._start,
        ).write(self._status_path)


_FATE = {"absent": "removed", "stale": "replaced by a process that has died"}


def _described(worker: WorkerState) -> WorkerStatus:
    report = worker.report or {}
    return WorkerStatus(
        worker.slot,
        worker.pid,
        worker.phase,
        round(worker.age, 1),
        worker.restarts,
        in_flight=report.get("in_flight"),
        late=report.get("late"),
        oldest=report.get("oldest"),
        links=report.get("links") or {},
        limits=report.get("limits") or {},
        resident=report.get("resident"),
        cpu=worker.cpu,
        error=report.get("error"),
    )


def _status_of_holder(folder: Path, id: str) -> Status | None:
    """Return the state of the process that has the id, if it lives; None if that is unknown."""
    with contextlib.suppress(OSError):
        path = pid_path(folder, id)
        if holder_of(path) is None:
            return None
        status = path.lstat()
        for _, key, own in own_files(folder, id):
            if os.path.samestat(own.lstat(), status):
                return Status.read(status_path(folder, id, key))
    return None


def _clean(folder: Path, id: str, key: str) -> None:
    """Remove what dead processes of the id have left."""
    for _, other, own in own_files(folder, id):
        if other == key:  # this process's: opening it would release the lock
            continue
        with contextlib.suppress(OSError):
            if holder_of(own) is None:
                own.unlink()
                status_path(folder, id, other).unlink(missing_ok=True)


def _unit() -> str | None:
    """Return systemd's id of this start of a unit; None outside of a unit's main process."""
    return os.environ.get("INVOCATION_ID")
