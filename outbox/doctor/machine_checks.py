"""Checks of this machine: limits, containers, log settings, what services have left."""

from __future__ import annotations

import contextlib
import os
import resource
from collections.abc import Iterator
from pathlib import Path

from outbox.doctor.check import Check
from outbox.doctor.code_checks import name_of, starts_programs
from outbox.doctor.examined import Examined
from outbox.doctor.finding import NotChecked, Problem
from outbox.errors import UsageError
from outbox.service.identity.folder import default_folder, open_folder
from outbox.service.identity.listing import listed
from outbox.service.identity.pid_file import holder_of

__all__ = ["CHECKS", "is_container"]

_FEWEST_FILES = 256
_LARGEST_LOG = 2**30  # bytes
_REAPERS = {
    *(
        "systemd",
        "init",
        "tini",
        "tini-static",
        "dumb-init",
        "docker-init",
        "catatonit",
        "s6-svscan",
    ),
    *("runit", "runsvdir", "supervisord", "pause", "launchd", "openrc-init", "busybox"),
}
"""Programs that collect the processes whose parents have ended."""


def _machine(examined: Examined) -> Iterator[Problem]:
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= soft < _FEWEST_FILES:
        yield Problem(
            "warning",
            f"a process may open {soft} files and sockets, fewer than {_FEWEST_FILES}",
            "Raise it: ulimit -n, or LimitNOFILE= in the unit.",
        )
    yield from _services()
    try:
        loaded = examined.load()
    except Exception:  # the application's code may raise anything
        raise NotChecked("log settings and child processes: no consumers are loaded") from None
    if loaded.disabled_loggers:
        yield Problem(
            "warning",
            "logging.config disables the loggers of outbox, so that only workers, which enable "
            "them again, log",
            "Set disable_existing_loggers to False in the configuration of logging.",
        )
    first = _first_process()
    starting = [consumer for consumer in loaded.consumers if starts_programs(consumer)]
    if starting and first and first not in _REAPERS and is_container():
        yield Problem(
            "warning",
            f"the first process of this container is {first!r}, which collects no orphans, and "
            f"{name_of(starting[0])} starts processes",
            "Start the container with an init: docker run --init, or init: true in compose.",
        )


def _services() -> Iterator[Problem]:
    """Yield what services with an id have left in their folder."""
    folder = default_folder()
    try:
        folder = open_folder(folder, create=False)
        if not folder.is_dir():
            return
        services = listed(folder)
        for path in sorted(folder.glob("outbox-*.pid")):
            if holder_of(path) is None:
                yield Problem(
                    "warning",
                    f"the pid file {path} is stale: the process that wrote it has died",
                    "Start the service again, which needs no clean-up; or remove the file.",
                )
        for service in services:
            if service.is_owner and service.is_elsewhere:
                yield Problem(
                    "note",
                    f"the service {service.id!r} of {folder} runs in another container, so that it "
                    "can't be stopped or restarted from here",
                    "Give each container its own folder (OUTBOX_PID_DIR).",
                )
            status = service.status
            if service.is_alive and status is not None and status.phase == "given up":
                why = "; ".join(status.reasons)
                yield Problem(
                    "error",
                    f"the service {service.id!r} has given up: {why}",
                    f"Look at its log, correct the code, then outbox workers restart --id "
                    f"{service.id}.",
                )
        for path in sorted(folder.glob("outbox-*.log")):
            if (size := path.lstat().st_size) > _LARGEST_LOG:
                yield Problem(
                    "warning",
                    f"the log {path} has {size / 2**30:.1f} GiB",
                    "Rotate it with copytruncate; see docs/service.md.",
                )
    except UsageError as error:
        yield Problem("warning", str(error), "Choose another folder: OUTBOX_PID_DIR.")
    except OSError as error:
        raise NotChecked(f"the services of {folder}: {error.strerror}") from None


def _first_process() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/1/comm").read_text().strip()
    return ""


def is_container() -> bool:
    """Return whether this process seems to run in a container."""
    if os.path.exists("/.dockerenv") or os.path.exists("/run/.containerenv"):
        return True
    return "KUBERNETES_SERVICE_HOST" in os.environ


CHECKS = (
    Check(
        "OBX303",
        "this machine: limits, containers, log settings, services",
        "Correct what the text names.",
        _machine,
    ),
)
